"""Settings: their sources, which source wins, and what the error reports about a bad value."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gcs_prefetchd.settings import ENVIRONMENT_PREFIX, Settings, check_cache_fits_disk, format_value, load_settings
from gcs_prefetchd.shared.errors import SettingsError

REQUIRED: dict[str, object] = {"data_roots": ["gs://pictures/train"], "cache_dir": "/srv/cache", "cache_size": "200GB"}


def load(
    flags: Mapping[str, object] | None = None,
    toml: str | bytes | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Load from a file with this text in the folder, these environment variables (without the prefix), and these flags."""
    config = None
    if toml is not None:
        assert folder is not None
        config = folder / "config.toml"
        config.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    variables = {f"{ENVIRONMENT_PREFIX}{name.upper()}": value for name, value in (environment or {}).items()}
    return load_settings(flags or {}, config, variables)


def refusal(**changed: object) -> str:
    """The error's line for a bad value on the command line."""
    with pytest.raises(SettingsError) as caught:
        load(REQUIRED | changed)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def test_only_three_settings_are_required() -> None:
    loaded = load(REQUIRED)
    assert [root.uri for root in loaded.roots] == ["gs://pictures/train"]
    assert loaded.cache_dir == Path("/srv/cache")
    assert loaded.cache_size == 200 * 10**9
    assert loaded.http_address == ("127.0.0.1", 8484)
    assert loaded.item_patterns.patterns == ("images/{id}.jpg", "labels/{id}.png")
    assert (loaded.seed, loaded.anonymous, loaded.endpoint, loaded.credentials) == (0, False, None, None)


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    toml = (
        'data_roots = ["gs://in-file/x"]\ncache_dir = "/file"\ncache_size = "1GB"\nseed = 1\nconcurrency = 1\nwindow_items = 1'
    )
    loaded = load({"seed": "3"}, toml, tmp_path, {"seed": "2", "concurrency": "2", "data_roots": "gs://in-environment/x"})
    assert (loaded.seed, loaded.concurrency, loaded.window_items) == (3, 2, 1)
    assert loaded.data_roots == ["gs://in-environment/x"]
    assert loaded.cache_dir == Path("/file")


def test_every_setting_can_come_from_every_source(tmp_path: Path) -> None:
    values = {
        "data_roots": "gs://pictures/a,gs://pictures/b",
        "cache_dir": "/c",
        "cache_size": "5GB",
        "min_free": "2GB",
        "seed": "7",
        "endpoint": "http://127.0.0.1:9000",
        "anonymous": "true",
        "credentials": "/key.json",
        "user_project": "payer",
        "http": "0.0.0.0:1",
        "concurrency": "3",
        "min_concurrency": "2",
        "max_requests_per_s": "100.5",
        "max_bytes_per_s": "500MB",
        "window_items": "4",
        "policy": "lru",
        "fetch_processes": "3",
        "deadline_s": "5",
        "relist_s": "6",
        "rescan_s": "7",
        "read_ahead": "false",
        "watch_opens": "true",
        "stop_deadline_s": "8",
        "log_level": "debug",
        "log_file": "/log",
        "image_pattern": "i/{id}.webp",
        "label_pattern": "l/{id}.txt",
    }
    assert values.keys() == Settings.model_fields.keys()
    from_flags = load(values)
    from_environment = load(environment=values)
    from_file = load(toml="".join(f'{name} = "{value}"\n' for name, value in values.items()), folder=tmp_path)
    assert from_flags == from_environment == from_file
    defaults = load(REQUIRED)
    assert [name for name in values if getattr(from_flags, name) == getattr(defaults, name)] == []


def test_data_roots_are_a_list_or_separated_by_commas() -> None:
    assert load(REQUIRED | {"data_roots": " gs://bucket/a/ , gs://bucket/b,"}).data_roots == ["gs://bucket/a", "gs://bucket/b"]
    assert load(REQUIRED | {"data_roots": ["gs://bucket/a", "gs://other"]}).data_roots == ["gs://bucket/a", "gs://other"]


def test_the_file_is_named_by_the_flag_or_by_the_environment(tmp_path: Path) -> None:
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text("seed = 1")
    other.write_text("seed = 2")
    environment = {f"{ENVIRONMENT_PREFIX}CONFIG": str(other)}
    assert load_settings(REQUIRED, None, environment).seed == 2
    assert load_settings(REQUIRED, one, environment).seed == 1
    assert load_settings(REQUIRED, None, {f"{ENVIRONMENT_PREFIX}CONFIG": ""}).seed == 0


def test_the_processs_own_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}SEED", "11")
    assert load_settings(REQUIRED, None).seed == 11


def test_other_variables_and_unset_flags_are_ignored() -> None:
    assert load_settings(REQUIRED | {"seed": None}, None, {"SEED": "5", "GCS_SEED": "6", "gcs_prefetchd_seed": "7"}).seed == 0


OPTIONAL = ["endpoint", "credentials", "user_project", "log_file"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_empty_value_unsets_an_optional_setting(tmp_path: Path, name: str) -> None:
    """A later source can reset what an earlier one set."""
    value = "http://127.0.0.1:1" if name == "endpoint" else "/x"
    assert getattr(load(REQUIRED, f'{name} = ""', tmp_path), name) is None
    assert getattr(load(REQUIRED | {name: ""}, f'{name} = "{value}"', tmp_path), name) is None
    assert str(getattr(load(REQUIRED, f'{name} = "{value}"', tmp_path), name)) == value


def test_an_empty_variable_is_ignored(tmp_path: Path) -> None:
    assert load(REQUIRED, "seed = 5", tmp_path, {"seed": ""}).seed == 5


@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_setting_that_is_missing_names_its_flag(tmp_path: Path, name: str) -> None:
    flag = {"data_roots": "--data-root", "cache_dir": "--cache-dir", "cache_size": "--cache-size"}[name]
    others = {key: value for key, value in REQUIRED.items() if key != name}
    for toml in ("", f'{name} = ""'):
        with pytest.raises(SettingsError, match=rf"^setting {name} is missing: use {flag}.* GCS_PREFETCHD_{name.upper()} "):
            load(others, toml, tmp_path)


def test_an_empty_cache_directory_does_not_mean_the_current_one() -> None:
    assert refusal(cache_dir="").startswith("setting cache_dir is missing")


UNKNOWN = [
    "sead",
    "cache-size",
    "Seed",
    "",
    "a b",
    "self",
    "cls",
    "_env_file",
    "_cli_parse_args",
    "__pydantic_self__",
    "config",
    "x" * 999,
]


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_setting_is_named_with_its_source(tmp_path: Path, key: str) -> None:
    with pytest.raises(SettingsError, match=r"^setting .* on the command line is unknown; ") as caught:
        load(REQUIRED | {key: "1"})
    assert key[:100] in str(caught.value)
    with pytest.raises(SettingsError, match=rf"^setting .* in {re.escape(str(tmp_path))}/config\.toml is unknown; ") as caught:
        load(REQUIRED, f'"{key}" = 1', tmp_path)
    assert key[:100] in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_unknown_variable_is_named_with_its_source() -> None:
    with pytest.raises(SettingsError, match=r"^setting cache_sise in the environment is unknown; "):
        load(REQUIRED, environment={"cache_sise": "1GB"})


def test_a_table_in_the_file_is_an_unknown_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^setting cache in .* is unknown"):
        load(REQUIRED, "[cache]\nsize = 1", tmp_path)


def test_a_bad_value_names_its_source(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=rf"^setting seed in {re.escape(str(tmp_path))}/config\.toml: 'x' should be a valid integer"
    ):
        load(REQUIRED, 'seed = "x"', tmp_path)
    with pytest.raises(SettingsError, match=r"^setting seed in the environment: 'x' should be a valid integer"):
        load(REQUIRED, environment={"seed": "x"})
    with pytest.raises(SettingsError, match=r"^setting seed on the command line: 'x' should be a valid integer"):
        load(REQUIRED | {"seed": "x"})


@pytest.mark.parametrize("size", ["200GB", "200 GB", " 200gb ", "0.2TB", 200 * 10**9, 2e11])
def test_a_size_is_a_number_and_a_unit_or_a_whole_number_of_bytes(tmp_path: Path, size: object) -> None:
    assert load(REQUIRED | {"cache_size": size}).cache_size == 200 * 10**9
    if not isinstance(size, str):
        assert load({**REQUIRED, "cache_size": None}, f"cache_size = {size}", tmp_path).cache_size == 200 * 10**9


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("cache_size", "0", "must be more than 0, as in 200GB"),
        ("cache_size", "0GB", "must be more than 0"),
        ("cache_size", "10 Q", "is not a valid size; write a number and a unit"),
        ("cache_size", "-5", "is not a valid size"),
        ("cache_size", -5, "is not a valid size"),
        ("cache_size", "500MB/s", "is not a valid size"),
        ("cache_size", "1.5", "is not a valid size"),
        ("cache_size", 1.5, "is not a valid size"),
        ("cache_size", True, "is not a valid size"),
        ("cache_size", "9" * 400 + ".0", "is not a valid size"),
        ("cache_size", [1], "is not a valid size"),
        ("min_free", "1 QB", "is not a valid size"),
        ("http", "127.0.0.1", "is not a valid address; write HOST:PORT"),
        ("http", "8484", "is not a valid address"),
        ("http", ":8484", "is not a valid address"),
        ("http", "127.0.0.1:", "is not a valid address"),
        ("http", "127.0.0.1:70000", "is not a valid address"),
        ("http", "127.0.0.1:-1", "is not a valid address"),
        ("http", "127.0.0.1:²", "is not a valid address"),
        ("http", "127.0.0.1:" + "0" * 5000, "is not a valid address"),
        ("http", "local host:80", "is not a valid address"),
        ("http", "http://127.0.0.1:8484", "does not appear to be"),
        ("http", "[::x]:80", "does not appear to be"),
        ("http", 8484, "should be a valid string"),
        ("endpoint", "127.0.0.1:9000", "is not a valid root URL; write http://HOST:PORT"),
        ("endpoint", "ftp://host", "is not a valid root URL"),
        ("endpoint", "http://", "is not a valid root URL"),
        ("endpoint", "http://host/storage/v1", "is not a valid root URL"),
        ("endpoint", "http://host?x=1", "is not a valid root URL"),
        ("endpoint", "http://host#x", "is not a valid root URL"),
        ("endpoint", "http://host:99999", "is not a valid root URL"),
        ("endpoint", "http://user:secret@host", "is not a valid root URL"),
        ("endpoint", "http://[::1", "is not a valid root URL"),
        ("endpoint", "http://ho\nst", "is not a valid root URL"),
        ("data_roots", "pictures/train", "is not a gs:// URI; write gs://bucket/prefix"),
        ("data_roots", ["gs://Pictures/train"], "'Pictures' is not a valid bucket name"),
        ("data_roots", ["gs://pictures/" + "x" * 2000], "GCS allows 1 to 1024"),
        ("data_roots", [], "should have at least 1 item"),
        ("data_roots", ["gs://pictures/a", "gs://pictures/a/b"], "gs://pictures/a/b lies within gs://pictures/a; name it once"),
        ("data_roots", ["gs://pictures/a/b/", "gs://pictures"], "gs://pictures/a/b lies within gs://pictures"),
        ("data_roots", ["gs://pictures/a", "gs://pictures/a/"], "gs://pictures/a lies within gs://pictures/a"),
        ("log_level", "loud", "should be 'debug', 'info', 'warning' or 'error'"),
        ("image_pattern", "images/*.jpg", "must contain {id} once"),
        ("label_pattern", "{id}/{id}.png", "must contain {id} once"),
        ("label_pattern", "images/{id}.jpg", "is used for both the image and the label"),
        ("cache_dir", "a\0b", "contains a NUL character"),
        ("cache_dir", "~nobody-of-this-name/cache", "names a user who has no home directory on this machine"),
        ("cache_dir", 5, "not a valid path"),
        ("seed", "-1", "should be greater than or equal to 0"),
        ("seed", str(2**63), "should be less than 9223372036854775808"),
        ("seed", "1.5", "should be a valid integer"),
        ("concurrency", True, "should be a number"),
        ("window_items", True, "should be a number"),
        ("deadline_s", False, "should be a number"),
        ("max_requests_per_s", True, "should be a number"),
        ("concurrency", 0, "should be greater than or equal to 1"),
        ("concurrency", 5000, "should be less than or equal to 1024"),
        ("min_concurrency", 0, "should be greater than or equal to 1"),
        ("max_requests_per_s", 0.5, "should be greater than or equal to 1"),
        ("max_requests_per_s", "inf", "should be less than or equal to 1000000"),
        ("max_requests_per_s", "nan", "should be"),
        ("max_bytes_per_s", 0, "must be more than 0"),
        ("max_bytes_per_s", "500MB/s", "is not a valid size; write a number and a unit"),
        ("max_bytes_per_s", True, "is not a valid size"),
        ("max_bytes_per_s", "fast", "is not a valid size"),
        ("deadline_s", 0, "should be greater than 0"),
        ("deadline_s", float("nan"), "should be"),
        ("relist_s", float("inf"), "should be a finite number"),
        ("rescan_s", "nan", "should be a finite number"),
        ("anonymous", "perhaps", "should be a valid boolean"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_explains_what_to_do(name: str, value: object, expected: str) -> None:
    line = refusal(**{name: value})
    assert line.startswith(f"setting {name} on the command line: {repr(value)[:150]}")
    assert expected in line


def test_the_bad_one_of_several_data_roots_is_named() -> None:
    assert refusal(data_roots=["gs://pictures", 5]).endswith("on the command line: 5 should be a valid string")
    assert "'Drawings' is not a valid bucket name" in refusal(data_roots=["gs://pictures", "gs://Drawings/x"])


def test_a_pattern_equal_to_the_others_default_is_refused() -> None:
    assert "is used for both the image and the label" in refusal(image_pattern="labels/{id}.png")


@pytest.mark.parametrize(
    ("http", "address"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("localhost:65535", ("localhost", 65535)), ("[::1]:80", ("::1", 80))],
)
def test_an_address_is_host_and_port(http: str, address: tuple[str, int]) -> None:
    assert load(REQUIRED | {"http": http}).http_address == address


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:9000", "http://127.0.0.1:9000/", "https://storage.example.com", "http://[::1]:80"]
)
def test_an_endpoint_is_a_root_url(endpoint: str) -> None:
    assert load(REQUIRED | {"endpoint": endpoint}).endpoint == endpoint.rstrip("/")


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A relative path means the directory in which the user starts the daemon."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/alice")
    loaded = load(REQUIRED | {"cache_dir": "cache", "credentials": "~/key.json", "log_file": "./logs/log"})
    assert loaded.cache_dir == tmp_path / "cache"
    assert loaded.credentials == Path("/home/alice/key.json")
    assert loaded.log_file == tmp_path / "logs/log"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^setting config: .*missing\.toml: No such file"):
        load_settings(REQUIRED, tmp_path / "missing.toml", {})
    with pytest.raises(SettingsError, match=r"^setting config: .*: Is a directory"):
        load_settings(REQUIRED, tmp_path, {})


@pytest.mark.parametrize(
    "toml",
    [
        b"seed = ",
        b"seed: 5",
        b"seed = 1\nseed = 2",
        b"\xff\xfe",
        b"\0",
        b"seed = " + b"9" * 5000,
        b"seed = " + b"[" * 100_000,
        b"log_file = 2026-13-45",
        b"{}",
    ],
)
def test_a_file_that_is_not_valid_toml_is_named(tmp_path: Path, toml: bytes) -> None:
    with pytest.raises(SettingsError, match=r"^setting config: .*config\.toml: is not valid TOML: ") as caught:
        load(REQUIRED, toml, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    assert load(REQUIRED, 'user_project = "größe"', tmp_path).user_project == "größe"


_TOML_VALUES = [
    *(
        "1",
        "-1",
        "true",
        "nan",
        "inf",
        "1e400",
        "[]",
        "{}",
        "[1]",
        '[""]',
        "[[[]]]",
        "''",
        '"{id}"',
        '"200GB"',
        '"http://x"',
        '"~x"',
    ),
    *('"a:1"', '"gs://bbb"', '["gs://bbb/a"]', '{a = 1, b = ["x"]}', "2026-01-01", "07:32:00", "2026-01-01T00:00:00Z"),
]
_names = st.sampled_from([*Settings.model_fields, "unknown", "_env_file", "tool.x"])
_values = st.one_of(
    st.text(max_size=10).map(lambda text: '"' + "".join(f"\\U{ord(character):08x}" for character in text) + '"'),
    st.sampled_from(_TOML_VALUES),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(
    st.dictionaries(_names, _values, max_size=6).map(lambda pairs: "\n".join(f"{k} = {v}" for k, v in pairs.items()))
    | st.text()
)
@example("cache_dir = '~'")
@example('data_roots = ["gs://bbb/\\ud800"]')
def test_no_file_raises_anything_but_a_settings_error(tmp_path: Path, toml: str) -> None:
    flags: Mapping[str, object]
    for flags in ({}, REQUIRED):
        try:
            loaded = load(flags, toml.encode(errors="replace"), tmp_path)
        except SettingsError as exc:
            assert str(exc).startswith("setting ")  # noqa: PT017  # some files are good
            assert "\n" not in str(exc)  # noqa: PT017
        else:
            assert loaded.http_address
            assert loaded.item_patterns.patterns
            assert loaded.roots


@settings(deadline=None)
@given(st.sampled_from(list(Settings.model_fields)), st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=30))
def test_no_variable_raises_anything_but_a_settings_error(name: str, value: str) -> None:
    try:
        loaded = load(REQUIRED, environment={name: value})
    except SettingsError as exc:
        assert str(exc).startswith(f"setting {name} in the environment: ")  # noqa: PT017  # some values are good
    else:
        assert loaded.model_dump(mode="json").keys() == Settings.model_fields.keys()


def test_a_cache_larger_than_its_disk_is_refused(tmp_path: Path) -> None:
    check_cache_fits_disk(load(REQUIRED | {"cache_dir": str(tmp_path), "cache_size": "1MB"}))
    about = os.statvfs(tmp_path)
    disk_bytes = about.f_blocks * about.f_frsize
    check_cache_fits_disk(load(REQUIRED | {"cache_dir": str(tmp_path / "not/yet/there"), "cache_size": disk_bytes}))
    with pytest.raises(SettingsError, match=r"^setting cache_size: .* is more than the disk of .* holds \(") as caught:
        check_cache_fits_disk(load(REQUIRED | {"cache_dir": str(tmp_path / "not/yet/there"), "cache_size": disk_bytes + 1}))
    assert str(tmp_path) in str(caught.value)


def test_a_cache_directory_with_an_impossible_name_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^setting cache_dir: .*: File name too long$") as caught:
        check_cache_fits_disk(load(REQUIRED | {"cache_dir": "/" + "x" * 5000}))
    assert len(str(caught.value)) < 500


def test_a_cache_directory_below_a_file_passes_the_check_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_cache_fits_disk(load(REQUIRED | {"cache_dir": str(tmp_path / "file/cache"), "cache_size": "1MB"}))


def test_settings_do_not_change_once_loaded() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(REQUIRED).seed = 5


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("concurrency", 64, "64 downloads"),
        ("min_concurrency", 8, "8 downloads"),
        ("max_requests_per_s", 1500.5, "1500.5 requests/s"),
        ("max_requests_per_s", 1_000_000.0, "1000000 requests/s"),
        ("max_bytes_per_s", 500 * 10**6, "500 MB/s"),
        ("max_bytes_per_s", 2**20, "1.048576 MB/s"),
        ("max_bytes_per_s", None, "none"),
    ],
)
def test_a_value_that_can_be_changed_is_shown_with_its_unit(name: str, value: object, shown: str) -> None:
    assert format_value(name, value) == shown
