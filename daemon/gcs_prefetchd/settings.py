"""The daemon's settings: TOML file, environment (`GCS_PREFETCHD_*`), flags; the later wins. See `docs/configuration.md`."""

import os
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from gcs_prefetchd.shared.byte_sizes import exact_size, format_size, parse_size
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
SHOWN_AT_MOST = 200  # characters of a bad value
MAX_CONCURRENCY = 1024
CORES_A_FETCH_PROCESS, MOST_FETCH_PROCESSES = 4, 8

Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(format_size, when_used="json")]


class Settings(BaseSettings):
    """What the daemon does. Every field is a key of the TOML file and, with the prefix, an environment variable."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    data_roots: Annotated[list[str], NoDecode] = Field(
        min_length=1, description="The data roots to serve, gs://bucket/prefix; in the environment separated by commas."
    )
    cache_dir: Path = Field(description="The cache directory: empty, new, or a cache that this daemon made.")
    cache_size: Size = Field(description="The most bytes of objects that the cache holds, such as 200GB or 1.5TiB.")
    min_free: Size = Field(10**9, description="The free space that is always left on the cache's file system.")
    seed: int = Field(0, ge=0, lt=2**63, description="The seed of the order that is prefetched before any reader has come.")
    endpoint: str | None = Field(None, description="The root URL of GCS, for a stand-in or a private endpoint.")
    anonymous: bool = Field(False, description="Send no credentials: for public buckets and stand-ins.")
    credentials: Path | None = Field(
        None, description="A service account's key file; without one, application default credentials are used."
    )
    user_project: str | None = Field(None, description="The project that pays for requests to requester-pays buckets.")
    http: str = Field("127.0.0.1:8484", description="Where statistics are served, HOST:PORT; port 0 picks a free one.")
    concurrency: int = Field(256, ge=1, le=MAX_CONCURRENCY, description="The most downloads at a time.")
    min_concurrency: int = Field(
        8, ge=1, le=MAX_CONCURRENCY, description="The fewest downloads to which the limit adapts, within concurrency."
    )
    max_requests_per_s: float | None = Field(
        None, ge=1, le=1_000_000, description="The most requests to GCS a second; GCS's ramp rule holds with and without it."
    )
    max_bytes_per_s: Size | None = Field(None, description="The most bytes a second from GCS, such as 500MB; without it any.")
    window_items: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="How many items ahead of a reader are kept on disk; without it as many as it takes.",
    )
    policy: Literal["plan", "lru"] = Field(
        "plan", description="What is dropped first: by the readers' plans, or the least recently used whatever they plan."
    )
    fetch_processes: int | None = Field(
        None,
        ge=0,
        le=64,
        description="How many processes prefetch for the daemon; 0: it does so itself. By default by cores.",
    )
    deadline_s: float = Field(60.0, gt=0, le=3600, description="After how many seconds of trying an object is given up.")
    relist_s: float = Field(
        3600.0, ge=1, allow_inf_nan=False, description="After how many seconds a data root is listed again."
    )
    rescan_s: float = Field(
        300.0, ge=1, allow_inf_nan=False, description="After how many seconds the index is held against the files again."
    )
    read_ahead: bool = Field(
        True, description="Have cached files read into memory shortly before a reader with a plan opens them."
    )
    watch_opens: bool = Field(
        False,
        description="Let files that other programs open by path count as recently used. Costs 10 to 20 us of CPU an open.",
    )
    stop_deadline_s: float = Field(10.0, gt=0, le=600, description="After how many seconds a stop no longer waits.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least severe line that is logged.")
    log_file: Path | None = Field(
        None, description="Where to log; without it stderr in the foreground, daemon.log in the cache directory otherwise."
    )
    image_pattern: str = Field(IMAGE_PATTERN, description="Where an item's image lies below the data root.")
    label_pattern: str = Field(LABEL_PATTERN, description="Where an item's label lies below the data root.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # load_settings merges the sources, to say which one a bad value came from

    @property
    def roots(self) -> list[DataRoot]:
        """The data roots, read."""
        return [DataRoot.parse(uri) for uri in self.data_roots]

    @property
    def fetch_process_count(self) -> int:
        """How many fetch processes there are to be: one for every four cores, from one to eight.

        More are for who knows the node: eight fill a link of 20 Gbit/s, and a container may have fewer cores than it sees.
        """
        if self.fetch_processes is not None:
            return self.fetch_processes
        return min(max(1, len(os.sched_getaffinity(0)) // CORES_A_FETCH_PROCESS), MOST_FETCH_PROCESSES)

    @property
    def item_patterns(self) -> ItemPatterns:
        """Where the parts of an item lie."""
        return ItemPatterns((self.image_pattern, self.label_pattern))

    @property
    def http_address(self) -> tuple[str, int]:
        """Host and port."""
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
    def _check_more_than_0(cls, value: int | None) -> int | None:
        if value is not None and value <= 0:
            raise ValueError("must be more than 0, as in 200GB")
        return value

    @field_validator("cache_dir", "credentials", "log_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        if "\0" in str(value):
            raise ValueError("is no path: it holds a NUL character")
        try:
            return value.expanduser().absolute()
        except RuntimeError:  # ~somebody
            raise ValueError("names a user who has no home directory here") from None

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
        # A password in it would be logged; spaces and line breaks are what urlsplit passes over.
        if not is_root or url.username is not None or url.query or url.fragment or url.path.strip("/") or not _is_plain(value):
            raise ValueError("is no root URL; write http://HOST:PORT")
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
    """The settings in force. `flags` wins over the environment, and that over the file. Raises SettingsError with one line."""
    environment = os.environ if environment is None else environment
    if config is None and (named := environment.get(f"{ENVIRONMENT_PREFIX}CONFIG")):
        config = Path(named)
    sources = {
        f"in {config}": _read_file(config) if config else {},
        "in the environment": _read_environment(environment),
        "on the command line": {key: value for key, value in flags.items() if value is not None},
    }
    merged: dict[str, object] = {}
    origin: dict[str, str] = {}
    for source, values in sources.items():
        for key, value in values.items():
            if key not in Settings.model_fields:  # before pydantic, to which `_env_file` and its like mean something
                name = key if key.isidentifier() and len(key) <= SHOWN_AT_MOST else _shown(key)
                raise SettingsError(f"setting {name} {source} is unknown; docs/configuration.md names the settings")
            if value == "" and key in _REQUIRED:
                merged.pop(key, None)
            else:
                merged[key] = None if value == "" and key in _OPTIONAL else value
            origin[key] = source
    try:
        return Settings(**merged)  # type: ignore[arg-type]  # pydantic checks every value
    except ValidationError as exc:
        raise SettingsError(_one_line(exc, origin)) from None


def change_settings(settings: Settings, changes: Mapping[str, object], source: str) -> Settings:
    """The same settings but for these, which came from `source`. Raises SettingsError with one line."""
    try:
        return Settings(**(settings.model_dump() | dict(changes)))
    except ValidationError as exc:
        raise SettingsError(_one_line(exc, dict.fromkeys(changes, source))) from None


def format_value(name: str, value: object) -> str:
    """The value of a setting that can be changed while the daemon runs, as a user would write it; "none" for None."""
    if value is None:
        return "none"
    if name == "max_bytes_per_s" and isinstance(value, int):
        return f"{exact_size(value)}/s"
    unit = "requests/s" if name == "max_requests_per_s" else "downloads"
    return f"{value:.15g} {unit}" if isinstance(value, float) else f"{value} {unit}"


def check_cache_fits_disk(settings: Settings) -> None:
    """Raise SettingsError where the cache's file system is smaller than `cache_size`."""
    try:
        existing = next(path for path in (settings.cache_dir, *settings.cache_dir.parents) if path.exists())
        about = os.statvfs(existing)
    except OSError as exc:
        raise SettingsError(f"setting cache_dir: {_shown(str(settings.cache_dir))}: {exc.strerror}") from None
    disk_bytes = about.f_blocks * about.f_frsize
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
        raise SettingsError(f"setting config: {config}: not TOML: {exc}") from None


def _read_environment(environment: Mapping[str, str]) -> dict[str, object]:
    return {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and value and name != f"{ENVIRONMENT_PREFIX}CONFIG"
    }


def _split_address(value: str) -> tuple[str, int]:
    host, separator, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    if not separator or not host or not is_port or not _is_plain(host):
        raise ValueError("is no address; write HOST:PORT, as in 127.0.0.1:8484")
    if ":" in host:
        ip_address(host)
    return host, int(port)


def _one_line(exc: ValidationError, origin: Mapping[str, str]) -> str:
    first = exc.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        flag = {"data_roots": "--data-root gs://bucket/prefix"}.get(name, "--" + name.replace("_", "-"))
        return f"setting {name} is missing: give {flag}, set {ENVIRONMENT_PREFIX}{name.upper()} or name it in the config file"
    return f"setting {name} {origin.get(name, 'by default')}: {_shown(first['input'])} {_reason(first['msg'])}"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN_AT_MOST else shown[:SHOWN_AT_MOST] + "..."


def _is_plain(text: str) -> bool:
    return text.isprintable() and " " not in text


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "should be")
