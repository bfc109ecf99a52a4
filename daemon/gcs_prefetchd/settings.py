"""The daemon's settings: a TOML file, `GCS_PREFETCHD_*` variables, flags; later sources win. See `docs/configuration.md`."""

import os
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from gcs_prefetchd.shared.byte_sizes import format_exact_size, format_size, parse_size
from gcs_prefetchd.shared.errors import InvalidNameError, SettingsError
from gcs_prefetchd.shared.item_patterns import IMAGE_PATTERN, LABEL_PATTERN, ItemPatterns
from gcs_prefetchd.shared.objects import DataRoot

__all__ = [
    "ENVIRONMENT_PREFIX",
    "MAX_CONCURRENCY",
    "Settings",
    "change_settings",
    "check_cache_fits_disk",
    "format_value",
    "load_settings",
]

ENVIRONMENT_PREFIX = "GCS_PREFETCHD_"
MAX_SHOWN_CHARACTERS = 200  # of an invalid value
MAX_CONCURRENCY = 1024
CORES_PER_FETCH_PROCESS, MAX_FETCH_PROCESSES = 4, 8


def _refuse_boolean(value: object) -> object:
    """Python counts True as 1; in a configuration file `concurrency = true` is a mistake."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


Integer = Annotated[int, BeforeValidator(_refuse_boolean)]
Number = Annotated[float, BeforeValidator(_refuse_boolean)]
Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(format_size, when_used="json")]


class Settings(BaseModel):
    """All settings. Each field is a key of the TOML file and, with the prefix, an environment variable.

    `docs/configuration.md` has a table for each group of fields, which begins with the field's description.
    """

    # label_pattern's default must differ from image_pattern, so defaults are validated, too.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    # What to serve
    data_roots: list[str] = Field(
        min_length=1, description="The data roots to serve, each `gs://bucket/prefix`. None may be within another."
    )
    image_pattern: str = Field(IMAGE_PATTERN, description="The location of an item's image below the data root.")
    label_pattern: str = Field(
        LABEL_PATTERN, description="The location of an item's label below the data root. Must differ from `image_pattern`."
    )

    # The cache
    cache_dir: Path = Field(description="The cache directory: new, empty, or made by this daemon.")
    cache_size: Size = Field(
        description="The most bytes of objects that the cache holds, downloads in progress included, such as 200GB or 1.5TiB."
    )
    min_free: Size = Field(10**9, description="The free space that the daemon leaves on the cache's file system.")
    policy: Literal["plan", "lru"] = Field(
        "plan", description="What to evict first: `plan` goes by the readers' plans, `lru` evicts the least recently used."
    )
    rescan_s: Number = Field(
        300.0, ge=1, allow_inf_nan=False, description="The pause between two comparisons of the index with the files."
    )
    watch_opens: bool = Field(
        False, description="Count files that other programs open by path as recently used. Costs 10 to 20 us of CPU per open."
    )

    # Prefetching
    seed: Integer = Field(
        0, ge=0, lt=2**63, description="The seed of the order that is prefetched before the first reader connects."
    )
    window_items: Integer | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="How many items ahead of each reader are prefetched. By default as many as the reader's rate requires.",
    )
    fetch_processes: Integer | None = Field(
        None,
        ge=0,
        le=64,
        description="How many processes prefetch for the daemon; 0 means the daemon itself. By default one per four cores.",
    )
    read_ahead: bool = Field(True, description="Read cached files into memory shortly before a reader with a plan opens them.")

    # Limits
    concurrency: Integer = Field(256, ge=1, le=MAX_CONCURRENCY, description="The most downloads at a time.")
    min_concurrency: Integer = Field(
        8,
        ge=1,
        le=MAX_CONCURRENCY,
        description="The fewest downloads at a time to which the adaptive limit falls, or `concurrency` if that is less.",
    )
    max_requests_per_s: Number | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="The most requests to GCS per second. GCS's ramp rule applies with or without it.",
    )
    max_bytes_per_s: Size | None = Field(
        None, description="The most bytes of objects per second from GCS, such as 500MB. By default unlimited."
    )
    deadline_s: Number = Field(
        60.0, gt=0, le=3600, description="After how long the daemon gives up on an object or a listing page, retries included."
    )

    # Google Cloud Storage
    endpoint: str | None = Field(None, description="The root URL of an emulator or a private endpoint. By default GCS itself.")
    anonymous: bool = Field(False, description="Send no credentials: for public buckets and emulators.")
    credentials: Path | None = Field(None, description="A key file. By default application default credentials are used.")
    user_project: str | None = Field(None, description="The project that pays for requests to requester-pays buckets.")
    relist_s: Number = Field(3600.0, ge=1, allow_inf_nan=False, description="The pause between two listings of a data root.")

    # The service
    http: str = Field("127.0.0.1:8484", description="The address of the statistics, `HOST:PORT`. Port 0 picks a free one.")
    stop_deadline_s: Number = Field(
        10.0, gt=0, le=600, description="After how long a stop no longer waits and the process exits."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least severe level to log.")
    log_file: Path | None = Field(
        None, description="The log file. By default stderr with `--foreground`, otherwise `daemon.log` in the cache directory."
    )

    @property
    def roots(self) -> list[DataRoot]:
        """The parsed data roots."""
        return [DataRoot.parse(uri) for uri in self.data_roots]

    @property
    def fetch_process_count(self) -> int:
        """How many fetch processes to start: one for every four cores, from one to eight.

        More must be set explicitly: eight fill a link of 20 Gbit/s, and a container may have fewer cores than it sees.
        """
        if self.fetch_processes is not None:
            return self.fetch_processes
        return min(max(1, len(os.sched_getaffinity(0)) // CORES_PER_FETCH_PROCESS), MAX_FETCH_PROCESSES)

    @property
    def item_patterns(self) -> ItemPatterns:
        """Where the parts of an item are."""
        return ItemPatterns((self.image_pattern, self.label_pattern))

    @property
    def http_address(self) -> tuple[str, int]:
        """Host and port of the statistics."""
        return _split_address(self.http)

    @field_validator("data_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("data_roots")
    @classmethod
    def _check_roots(cls, value: list[str]) -> list[str]:
        try:
            roots = [DataRoot.parse(uri) for uri in value]
        except InvalidNameError as exc:
            raise ValueError(str(exc)) from None
        for one in roots:
            for other in roots:
                if one is not other and one.bucket == other.bucket and other.folder.startswith(one.folder):
                    raise ValueError(f"{other.uri} lies within {one.uri}; name it once")
        return [root.uri for root in roots]

    @field_validator("cache_size", "max_bytes_per_s")
    @classmethod
    def _check_positive(cls, value: int | None) -> int | None:
        if value is not None and value <= 0:
            raise ValueError("must be more than 0, as in 200GB")
        return value

    @field_validator("cache_dir", "credentials", "log_file")
    @classmethod
    def _make_absolute(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        if "\0" in str(value):
            raise ValueError("is not a valid path: it contains a NUL character")
        try:
            return value.expanduser().absolute()
        except RuntimeError:  # ~somebody
            raise ValueError("names a user who has no home directory on this machine") from None

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            url = urlsplit(value)
            is_root = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            is_root = False
        # A password in the URL would be logged. urlsplit ignores spaces and line breaks.
        if not is_root or url.username is not None or url.query or url.fragment or url.path.strip("/") or not _is_plain(value):
            raise ValueError("is not a valid root URL; write http://HOST:PORT")
        return value.rstrip("/")

    @field_validator("http")
    @classmethod
    def _check_http(cls, value: str) -> str:
        _split_address(value)
        return value

    @field_validator("image_pattern", "label_pattern")
    @classmethod
    def _check_pattern(cls, value: str, info: ValidationInfo) -> str:
        patterns = (
            (value, info.data["image_pattern"])
            if info.field_name == "label_pattern" and "image_pattern" in info.data
            else (value,)
        )
        try:
            ItemPatterns(patterns)
        except SettingsError as exc:
            raise ValueError(str(exc)) from None
        return value


_OPTIONAL = {name for name, field in Settings.model_fields.items() if field.default is None}
_REQUIRED = {name for name, field in Settings.model_fields.items() if field.is_required()}


def load_settings(flags: Mapping[str, object], config: Path | None, environment: Mapping[str, str] | None = None) -> Settings:
    """Merge the sources and check every value. `flags` win over the environment, and the environment over the file.

    Raises SettingsError with one line, which names the source of a bad value.
    """
    environment = os.environ if environment is None else environment
    if config is None and (named := environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")):
        config = Path(named)
    sources = {
        f"in {config}": _read_file(config) if config else {},
        "in the environment": _read_environment(environment),
        "on the command line": {key: value for key, value in flags.items() if value is not None},
    }
    merged: dict[str, object] = {}
    source_of: dict[str, str] = {}
    for source, values in sources.items():
        for key, value in values.items():
            if key not in Settings.model_fields:
                name = key if key.isidentifier() and len(key) <= MAX_SHOWN_CHARACTERS else _shorten(key)
                raise SettingsError(f"setting {name} {source} is unknown; docs/configuration.md lists the settings")
            if value == "" and key in _REQUIRED:
                merged.pop(key, None)
            else:
                merged[key] = None if value == "" and key in _OPTIONAL else value
            source_of[key] = source
    return _validate(merged, source_of)


def change_settings(settings: Settings, changes: Mapping[str, object], source: str) -> Settings:
    """A copy of the settings with these changes, which come from `source`. Raises SettingsError with one line."""
    return _validate(settings.model_dump() | dict(changes), dict.fromkeys(changes, source))


def format_value(name: str, value: object) -> str:
    """The value of a setting that can be changed while the daemon runs, with its unit; "none" for None."""
    if value is None:
        return "none"
    if name == "max_bytes_per_s" and isinstance(value, int):
        return f"{format_exact_size(value)}/s"
    unit = "requests/s" if name == "max_requests_per_s" else "downloads"
    return f"{value:.15g} {unit}" if isinstance(value, float) else f"{value} {unit}"


def check_cache_fits_disk(settings: Settings) -> None:
    """Raise SettingsError if the cache's file system is smaller than `cache_size`."""
    try:
        existing = next(path for path in (settings.cache_dir, *settings.cache_dir.parents) if path.exists())
        file_system = os.statvfs(existing)
    except OSError as exc:
        raise SettingsError(f"setting cache_dir: {_shorten(str(settings.cache_dir))}: {exc.strerror}") from None
    disk_bytes = file_system.f_blocks * file_system.f_frsize
    if settings.cache_size > disk_bytes:
        raise SettingsError(
            f"setting cache_size: {format_size(settings.cache_size)} is more than the disk of {settings.cache_dir} holds "
            f"({format_size(disk_bytes)})"
        )


def _read_file(config: Path) -> dict[str, object]:
    try:
        return tomllib.loads(config.read_bytes().decode())  # TOML is UTF-8, whatever the locale
    except OSError as exc:
        raise SettingsError(f"setting config: {config}: {exc.strerror}") from None
    except (ValueError, RecursionError) as exc:
        raise SettingsError(f"setting config: {config}: is not valid TOML: {exc}") from None


def _read_environment(environment: Mapping[str, str]) -> dict[str, object]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and value and name != f"{ENVIRONMENT_PREFIX}CONFIG"
    }


def _validate(values: Mapping[str, object], source_of: Mapping[str, str]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as exc:
        raise SettingsError(_describe_first_error(exc, source_of)) from None


def _split_address(value: str) -> tuple[str, int]:
    host, separator, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    if not separator or not host or not is_port or not _is_plain(host):
        raise ValueError("is not a valid address; write HOST:PORT, as in 127.0.0.1:8484")
    if ":" in host:
        ip_address(host)
    return host, int(port)


def _describe_first_error(exc: ValidationError, source_of: Mapping[str, str]) -> str:
    first = exc.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        flag = {"data_roots": "--data-root gs://bucket/prefix"}.get(name, "--" + name.replace("_", "-"))
        return f"setting {name} is missing: use {flag}, set {ENVIRONMENT_PREFIX}{name.upper()} or add it to the config file"
    return f"setting {name} {source_of.get(name, 'by default')}: {_shorten(first['input'])} {_reason(first['msg'])}"


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= MAX_SHOWN_CHARACTERS else shown[:MAX_SHOWN_CHARACTERS] + "..."


def _is_plain(text: str) -> bool:
    return text.isprintable() and " " not in text


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "should be")
