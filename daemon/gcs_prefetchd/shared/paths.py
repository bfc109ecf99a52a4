"""Maps an object's name to its path in the cache, and back.

The mapping is a pure function: total over the names that GCS allows, injective, and never outside its root. Ordinary names
(folders without a file extension, a file with one) map to themselves; `docs/cache-layout.md` lists the rules for the others.
"""

import hashlib
import re

from gcs_prefetchd.shared.errors import InvalidNameError
from gcs_prefetchd.shared.objects import MAX_NAME_BYTES, ObjectName, parse_object_uri, validate_bucket, validate_object_name

__all__ = ["cache_path", "cache_path_of_uri", "object_at_path"]

MAX_SEGMENT_BYTES = 255  # NAME_MAX of every Linux file system
MAX_PATH_BYTES = 2048  # leaves half of PATH_MAX (4,096) to the cache directory's own path

# Distinguishes a file from a folder by its name alone. A letter comes first, so that the folder `v1.0` keeps its name.
_EXTENSION = re.compile(r".\.[A-Za-z][A-Za-z0-9]{0,7}\Z", re.DOTALL)
# Recognizes names that map to themselves, as nearly all do, in a tenth of the time that the rules take: no dot except that of
# the file's extension, nothing to escape, no segment that is too long. In a URI the bucket's name has no dot either.
_ORDINARY_NAME = r"(?:[A-Za-z0-9_-]{1,200}/)*[A-Za-z0-9_-]{1,200}\.[A-Za-z][A-Za-z0-9]{0,7}"
_ORDINARY = re.compile(_ORDINARY_NAME)
_ORDINARY_URI = re.compile("gs://[a-z0-9][a-z0-9_-]{1,61}[a-z0-9]/" + _ORDINARY_NAME)
_TO_ESCAPE = re.compile(r"[%\x00-\x1f\x7f]")
_ESCAPED = re.compile(r"%([0-9A-F]{2})")

_EMPTY = "%e"
_FILE = "%f"
_FOLDER = "%d"
_HASHED = "%h"


def cache_path(bucket: str, name: str) -> str:
    """The object's path relative to the cache's `objects/`. Pure: any program can compute it.

    A folder and a file never share a path (`d` and `d/e` can both be objects), because files without an extension and
    folders with one get a suffix.
    """
    if len(name) <= MAX_NAME_BYTES and _ORDINARY.fullmatch(name):
        return f"{bucket}/{name}"
    return f"{bucket}/{_path_by_rules(name)}"


def cache_path_of_uri(uri: str) -> str:
    """The `cache_path` of the object with this URI. Raises InvalidNameError."""
    if len(uri) <= MAX_NAME_BYTES and _ORDINARY_URI.fullmatch(uri):
        return uri[len("gs://") :]
    name = parse_object_uri(uri)
    return cache_path(name.bucket, name.name)


def _path_by_rules(name: str) -> str:
    *folders, file = name.split("/")
    segments = [_escape(folder, is_file=False) for folder in folders]
    segments.append(_escape(file, is_file=True))
    path = "/".join(segments)
    if len(path.encode()) > MAX_PATH_BYTES or any(len(segment.encode()) > MAX_SEGMENT_BYTES for segment in segments):
        digest = hashlib.sha256(name.encode()).hexdigest()
        return f"{_HASHED}/{digest[:2]}/{digest}"
    return path


def object_at_path(path: str) -> ObjectName | None:
    """The object at `path` (relative to `objects/`); None if the path is a hash or no object maps to it."""
    bucket, _, rest = path.partition("/")
    segments = rest.split("/")
    if segments[0] == _HASHED:
        return None
    try:
        validate_bucket(bucket)
        name = "/".join(_unescape(segment) for segment in segments)
        validate_object_name(name, path)
    except InvalidNameError:
        return None
    return ObjectName(bucket, name) if cache_path(bucket, name) == path else None


def _escape(segment: str, *, is_file: bool) -> str:
    if segment in (".", ".."):
        escaped = segment.replace(".", "%2E")
    else:
        escaped = _TO_ESCAPE.sub(lambda match: f"%{ord(match[0]):02X}", segment) or _EMPTY
    looks_like_file = _EXTENSION.search(segment) is not None
    if is_file == looks_like_file:
        return escaped
    return escaped + (_FILE if is_file else _FOLDER)


def _unescape(segment: str) -> str:
    plain = segment.removesuffix(_FILE).removesuffix(_FOLDER)
    return "" if plain == _EMPTY else _ESCAPED.sub(lambda match: chr(int(match[1], 16)), plain)
