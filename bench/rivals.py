"""Loaders on the alternatives that users would choose, if installed: gcsfs with simplecache, obstore, an rclone mount.

    pip install gcsfs obstore      apt-get install rclone fuse3

Each is created in the measuring process; its `loader(uri)` returns a PIL image.
"""

import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from gcs_prefetchd.shared.objects import parse_object_uri
from rig import BUCKET

__all__ = ["RIVALS", "Rival"]

Loader = Callable[[str], Image.Image]
Reader = Callable[[str], bytes]  # of an object's name


class _Decoding:
    """Decodes the bytes of a reader, which `open_reader` creates in each process: readers' threads do not survive a fork."""

    def __init__(self, open_reader: Callable[[], Reader]) -> None:
        self._open_reader = open_reader
        self._opened: tuple[int, Reader] | None = None

    def __call__(self, uri: str) -> Image.Image:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self._open_reader())
        return Image.open(io.BytesIO(self._opened[1](parse_object_uri(uri).name))).convert("RGB")


@contextmanager
def _gcsfs(url: str, scratch: Path) -> Iterator[Loader]:
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # otherwise it probes over gRPC
    import gcsfs  # noqa: F401 - here, so that no worker's time includes it
    from fsspec.implementations.cached import SimpleCacheFileSystem

    with tempfile.TemporaryDirectory(dir=scratch) as cache:

        def open_reader() -> Reader:
            options = {"token": "anon", "endpoint_url": url}
            files = SimpleCacheFileSystem(target_protocol="gcs", target_options=options, cache_storage=cache)
            return lambda name: bytes(files.cat_file(f"{BUCKET}/{name}"))

        yield _Decoding(open_reader)


@contextmanager
def _obstore(url: str, scratch: Path) -> Iterator[Loader]:
    from obstore.store import GCSStore

    def open_reader() -> Reader:
        store = GCSStore(BUCKET, base_url=url, skip_signature=True, client_options={"allow_http": True})
        return lambda name: bytes(store.get(name).bytes())

    yield _Decoding(open_reader)


@contextmanager
def _rclone(url: str, scratch: Path) -> Iterator[Loader]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        mount, cache = Path(folder, "mount"), Path(folder, "cache")
        mount.mkdir()
        remote = f":gcs,anonymous,bucket_policy_only,endpoint='{url}/storage/v1/':{BUCKET}"
        command = [
            "rclone",
            "mount",
            remote,
            mount,
            "--daemon",
            "--read-only",
            "--vfs-cache-mode",
            "full",
            "--cache-dir",
            cache,
        ]
        subprocess.run([str(word) for word in command], check=True)
        try:
            yield _Decoding(lambda: lambda name: (mount / name).read_bytes())
        finally:
            subprocess.run(["fusermount3", "-u", mount], check=True)


@dataclass(frozen=True, slots=True)
class Rival:
    """One alternative: `open(url, scratch)` is a context manager that yields its loader."""

    name: str
    is_installed: bool
    open: Callable[[str, Path], AbstractContextManager[Loader]]


RIVALS = [
    Rival("gcsfs with simplecache", find_spec("gcsfs") is not None, _gcsfs),
    Rival("obstore", find_spec("obstore") is not None, _obstore),
    Rival("rclone mount", shutil.which("rclone") is not None and Path("/dev/fuse").exists(), _rclone),
]
