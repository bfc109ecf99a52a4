"""The unit that systemd reads, the example configuration, and `make install-systemd`."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("systemd_unit")  # in one process: they share a costly fixture

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd/gcs-prefetchd.service"
EXAMPLE = ROOT / "systemd/config.toml"
PREFIX = "/srv/prefetch"  # not the default, so that a path which ignores PREFIX is found
BASE_PYTHON = Path(sys.executable).resolve()  # not .venv's: a user has no .venv

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # `make test` sets variables of its own, and DESTDIR must come only from us.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | {"DESTDIR": ""}
    inherited["PIP_NO_COMPILE"] = "1"  # compiling what is installed takes most of pip's time, and proves nothing
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=False)


def make(target: str, destdir: Path, prefix: str = PREFIX, **environment: str) -> subprocess.CompletedProcess[str]:
    assert destdir.is_absolute()
    return run("make", target, f"DESTDIR={destdir}", f"PREFIX={prefix}", f"PYTHON={BASE_PYTHON}", **environment)


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below, by its path; a rewritten file has another inode."""
    return {str(path.relative_to(directory)): (path.lstat().st_ino, path.lstat().st_size) for path in directory.rglob("*")}


def unit_setting(name: str, text: str | None = None) -> str:
    """The value of a setting that the unit contains exactly once."""
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text() if text is None else text, re.MULTILINE)
    return str(value)


def example_settings(text: str) -> dict[str, object]:
    """The settings that the example names, including those after a "#"."""
    return tomllib.loads(re.sub(r"^#(?=[a-z_]+ = )", "", text, flags=re.MULTILINE))


def copy_without_libraries(installed: Path, to: Path) -> None:
    shutil.copytree(installed, to, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("site-packages"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `make install-systemd DESTDIR=` put everything. Read only: tests share it."""
    destdir = tmp_path_factory.mktemp("installed")
    done = make("install-systemd", destdir)
    assert done.returncode == 0, done.stderr
    return destdir


@needs_systemd
def test_the_unit_has_an_exposure_level_of_at_most_1_5() -> None:
    done = run("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=15", UNIT)
    score = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert score is not None, done.stderr
    assert float(score[1]) <= 1.5, done.stdout
    assert done.returncode == 0


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_installed_unit(installed: Path, tmp_path: Path) -> None:
    """With the installed command under the unit's own path: verify reports a missing or mistyped command."""
    root = tmp_path / "root"
    copy_without_libraries(installed, root)
    shutil.copytree("/usr/lib/systemd/system", root / "usr/lib/systemd/system", symlinks=True)
    done = run("systemd-analyze", "verify", f"--root={root}", "gcs-prefetchd.service")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
def test_sysusers_creates_the_user_and_the_group_that_the_unit_runs_as(installed: Path, tmp_path: Path) -> None:
    source = installed / "usr/local/lib/sysusers.d/gcs-prefetchd.conf"
    target = tmp_path / "usr/local/lib/sysusers.d/gcs-prefetchd.conf"
    target.parent.mkdir(parents=True)
    shutil.copy(source, target)
    (tmp_path / "etc").mkdir()
    done = run("systemd-sysusers", f"--root={tmp_path}", target.name)
    assert done.returncode == 0, done.stderr
    for file, setting in (("passwd", "User"), ("group", "Group")):
        made = (tmp_path / "etc" / file).read_text()
        assert re.search(rf"^{unit_setting(setting)}:", made, re.MULTILINE), made


def test_install_puts_every_file_in_its_place(installed: Path) -> None:
    service = (installed / "usr/local/lib/systemd/system/gcs-prefetchd.service").read_text()
    command = f"{PREFIX}/bin/gcs-prefetchd"
    assert unit_setting("ExecStart", service).split()[0] == command
    assert unit_setting("ExecStart", service).endswith(" start --foreground --config /etc/gcs-prefetchd/config.toml")
    assert os.access(f"{installed}{command}", os.X_OK)
    assert (installed / "usr/local/bin/gcs-prefetchd").readlink() == Path(command)
    assert (installed / "etc/gcs-prefetchd/config.toml").read_text() == EXAMPLE.read_text()
    assert (installed / "usr/local/lib/sysusers.d/gcs-prefetchd.conf").is_file()
    assert "/opt/gcs-prefetchd" not in service


def test_the_installed_environment_contains_only_the_daemon_and_depends_on_no_checkout(installed: Path) -> None:
    (packages,) = (installed / PREFIX.removeprefix("/")).glob("lib/python3*/site-packages")
    assert (packages / "gcs_prefetchd/__init__.py").is_file()
    assert not [path for path in packages.glob("*.pth") if str(ROOT) in path.read_text()]
    assert not (packages / "torch").exists()
    assert not (packages / "PIL").exists()


def test_an_installation_works_at_the_path_it_was_staged_for(installed: Path) -> None:
    """Its scripts name the interpreter by its final path, not by the path at which it was built."""
    scripts = [path for path in (installed / PREFIX.removeprefix("/") / "bin").iterdir() if not path.is_symlink()]
    assert (installed / PREFIX.removeprefix("/") / "bin/gcs-prefetchd") in scripts
    for script in [*scripts, installed / PREFIX.removeprefix("/") / "pyvenv.cfg"]:
        assert str(installed) not in script.read_text(), script
    assert f"#!{PREFIX}/bin/python" in (installed / PREFIX.removeprefix("/") / "bin/gcs-prefetchd").read_text()


def test_everything_installed_is_readable_by_the_service_whatever_the_umask(installed: Path) -> None:
    for path in installed.rglob("*"):
        if not path.is_symlink():
            needed = 0o555 if path.is_dir() else 0o444
            assert path.stat().st_mode & needed == needed, path


def test_an_upgrade_replaces_the_program_and_keeps_an_edited_configuration(installed: Path, tmp_path: Path) -> None:
    copy_without_libraries(installed, tmp_path)
    config = tmp_path / "etc/gcs-prefetchd/config.toml"
    config.write_text('data_roots = ["gs://mine/all"]\n')
    stale = tmp_path / PREFIX.removeprefix("/") / "stale"
    stale.touch()
    service = tmp_path / "usr/local/lib/systemd/system/gcs-prefetchd.service"
    service.write_text("an older unit")
    done = make("install-systemd", tmp_path, PIP_NO_COMPILE="1")  # saves some seconds
    assert done.returncode == 0, done.stderr
    assert "kept /etc/gcs-prefetchd/config.toml" in done.stdout
    assert config.read_text() == 'data_roots = ["gs://mine/all"]\n'
    assert unit_setting("ExecStart", service.read_text()).startswith(PREFIX)
    assert (stale.parent / "bin/gcs-prefetchd").is_file()
    assert not stale.exists()
    assert list(stale.parent.parent.iterdir()) == [stale.parent]


def test_a_failed_upgrade_leaves_the_installation_as_it_was(installed: Path) -> None:
    before = tree(installed)
    unreachable = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = make("install-systemd", installed, **unreachable)
    assert done.returncode != 0
    assert "No matching distribution" in done.stderr
    assert tree(installed) == before


def test_install_refuses_a_prefix_that_contains_something_else(tmp_path: Path) -> None:
    """An installation replaces the complete directory, and PREFIX=/usr is easily typed."""
    theirs = tmp_path / "usr/bin/theirs"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    for target in ("install-systemd", "uninstall-systemd"):
        done = make(target, tmp_path, prefix="/usr")
        assert done.returncode != 0
        assert "is not an installation of gcs-prefetchd" in done.stderr
    assert tree(tmp_path).keys() == {"usr", "usr/bin", "usr/bin/theirs"}


@pytest.mark.parametrize("prefix", ["/home/alice/prefetch", "/root/prefetch", "opt/prefetch", "/opt/../usr", "/opt/a b", "/"])
def test_install_refuses_a_prefix_that_cannot_work(prefix: str, tmp_path: Path) -> None:
    """Among them paths that the unit's own ProtectHome hides from the service."""
    done = make("install-systemd", tmp_path, prefix=prefix)
    assert done.returncode != 0
    assert "install-systemd: " in done.stderr
    assert not list(tmp_path.iterdir())


def test_uninstall_leaves_only_the_administrators_configuration(installed: Path, tmp_path: Path) -> None:
    copy_without_libraries(installed, tmp_path)
    done = make("uninstall-systemd", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [tmp_path / "etc/gcs-prefetchd/config.toml"]
    assert make("uninstall-systemd", tmp_path).returncode == 0


def test_the_unit_starts_what_the_default_prefix_installs() -> None:
    plan = run("make", "--dry-run", "install-systemd").stdout
    prefix = re.search(r"PREFIX='([^']*)'", plan)
    assert prefix is not None, plan
    assert unit_setting("ExecStart").startswith(f"{prefix[1]}/bin/gcs-prefetchd ")


def test_the_example_names_every_setting_and_shows_its_default() -> None:
    from gcs_prefetchd.settings import Settings

    named = example_settings(EXAMPLE.read_text())
    assert named.keys() == Settings.model_fields.keys()
    shown = Settings.model_validate(named)
    optional = named.keys() - tomllib.loads(EXAMPLE.read_text()).keys()
    for name in optional:
        default = Settings.model_fields[name].default
        assert default is None or getattr(shown, name) == default, name


def test_the_example_is_a_valid_configuration() -> None:
    from gcs_prefetchd.settings import load_settings

    settings = load_settings({}, EXAMPLE, {})
    assert settings.cache_dir == Path("/var/cache") / unit_setting("CacheDirectory")


def test_systemd_waits_longer_for_a_stop_than_the_daemon_does() -> None:
    from gcs_prefetchd.settings import Settings

    assert float(unit_setting("TimeoutStopSec")) > Settings.model_fields["stop_deadline_s"].default
