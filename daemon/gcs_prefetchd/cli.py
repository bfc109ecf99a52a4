"""The command line: `gcs-prefetchd start`, `stop`, `status`, `stats`, `set`."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from gcs_prefetchd import __version__
from gcs_prefetchd.server.statistics import Statistics
from gcs_prefetchd.server.statistics_json import from_json
from gcs_prefetchd.server.statistics_summary import summarize, summarize_stream
from gcs_prefetchd.service.daemonize import ForkedDaemon, ParentProcess, fork_daemon, wait_for_exit
from gcs_prefetchd.service.log_setup import setup_logging
from gcs_prefetchd.settings import Settings, check_cache_fits_disk, format_value, load_settings
from gcs_prefetchd.shared.byte_sizes import format_size
from gcs_prefetchd.shared.daemon_client import DaemonClient, read_daemon_file
from gcs_prefetchd.shared.errors import DaemonUnavailableError, PrefetchdError, ProtocolError, SettingsError

__all__ = ["main"]

EXIT_FAILED = 1
EXIT_BAD_SETTING = 2
# How long a thread that returns from a system call waits for one that does not yield. By default that is 5 ms, in which the
# event loop would handle a dozen objects while the one thread that creates files creates none.
SWITCH_INTERVAL_S = 0.0005
NO_PARENT = ParentProcess(None)

app = typer.Typer(
    help="Prefetch a training job's images from Google Cloud Storage into a local cache, in the order the job will read them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CacheDir = Annotated[Path, typer.Option(help="The daemon's cache directory.", metavar="PATH", envvar="GCS_PREFETCHD_CACHE_DIR")]


def main() -> None:
    """The console script."""
    app()


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"gcs-prefetchd {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_every_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def start(
    data_root: Annotated[
        list[str] | None, typer.Option(help="A data root to serve, gs://bucket/prefix. Repeat it for more.", metavar="URI")
    ] = None,
    cache_dir: Annotated[
        str | None, typer.Option(help="The cache directory: new, empty, or made by this daemon.", metavar="PATH")
    ] = None,
    cache_size: Annotated[
        str | None, typer.Option(help="The most bytes of objects to cache, such as 200GB.", metavar="SIZE")
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(help="The seed of the order to prefetch before a reader connects. [default: 0]", metavar="NUMBER"),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="The root URL of an emulator or a private endpoint. [default: GCS]", metavar="URL")
    ] = None,
    anonymous: Annotated[
        bool | None, typer.Option("--anonymous", help="Send no credentials: for public buckets and emulators.")
    ] = None,
    credentials: Annotated[
        str | None, typer.Option(help="A key file. [default: application default credentials]", metavar="PATH")
    ] = None,
    http: Annotated[
        str | None, typer.Option(help="The address of the statistics. [default: 127.0.0.1:8484]", metavar="HOST:PORT")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any other setting; docs/configuration.md lists them. Repeat it for more.", metavar="NAME=VALUE"
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.", metavar="PATH")] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay in the foreground and log to stderr: for systemd and containers.")
    ] = False,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Check the settings, print them, and start nothing.")
    ] = False,
) -> None:
    """Start the daemon.

    Returns when the daemon is ready, and prints where its statistics are. A data root, the cache directory and the cache size
    are required.

    Settings come from a TOML file, from GCS_PREFETCHD_* environment variables and from flags. Flags win over the environment,
    and the environment over the file.
    """
    flags: dict[str, object] = {
        "data_roots": data_root or None,
        "cache_dir": cache_dir,
        "cache_size": cache_size,
        "seed": seed,
        "endpoint": endpoint,
        "anonymous": anonymous,
        "credentials": credentials,
        "http": http,
    }
    with _exit_on_error():
        settings = load_settings(flags | _parse_pairs(setting or [], "--set "), config)
        if check_config:
            check_cache_fits_disk(settings)
            _print_settings(settings)
        elif foreground:
            _run(settings)
        else:
            check_cache_fits_disk(settings)
            _run_in_background(settings)


@app.command()
def stop(cache_dir: CacheDir) -> None:
    """Stop the daemon; the cache stays.

    Returns when the daemon has exited.
    """
    try:
        with closing(DaemonClient(cache_dir)) as client:
            pid = client.status().pid
            with wait_for_exit(pid) as wait:
                client.stop()
                has_exited = wait()
    except DaemonUnavailableError:
        print(f"no daemon is running for {cache_dir}")
        return
    if not has_exited:
        _fail(PrefetchdError(f"the daemon (pid {pid}) has not exited yet"), EXIT_FAILED)
    print(f"stopped (pid {pid}); the cache in {cache_dir} is kept")


@app.command()
def status(cache_dir: CacheDir) -> None:
    """Show whether the daemon runs.

    The exit status is 1 if it does not.
    """
    try:
        with closing(DaemonClient(cache_dir)) as client:
            daemon, statistics = client.status(), client.stats()
        daemon_file = read_daemon_file(cache_dir)
    except DaemonUnavailableError as exc:
        print(f"not running: {exc}")
        raise typer.Exit(EXIT_FAILED) from None
    except ProtocolError as exc:
        _fail(exc, EXIT_FAILED)
    print(f"running: pid {daemon.pid}, version {daemon.version}")
    print(f"serving: {', '.join(daemon.data_roots)}")
    print(f"statistics: {daemon_file.get('http')}")
    try:
        summary = summarize(from_json(statistics))
    except ProtocolError as exc:  # it runs, but it is of another version, as after an upgrade
        print(f"cannot show more: {exc}")
        return
    print(f"downloads: {summary['Downloads']}")
    print(f"rate: {summary['Rate']}")


@app.command()
def stats(
    cache_dir: CacheDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON object that /stats returns.")] = False,
) -> None:
    """Show the statistics."""
    try:
        with closing(DaemonClient(cache_dir)) as client:
            statistics = client.stats()
        if as_json:
            print(json.dumps(statistics, indent=2))
        else:
            _print_stats(from_json(statistics))
    except (DaemonUnavailableError, ProtocolError) as exc:
        _fail(exc, EXIT_FAILED)


# typer would show "NAME=VALUE <list[str]>" below the description, which explains the argument already.
Pairs = Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE", hidden=True)]


@app.command("set")
def change(cache_dir: CacheDir, pairs: Pairs = None) -> None:
    """Show or change settings of the running daemon.

    Without NAME=VALUE, shows the settings that can be changed. A change lasts until the daemon stops. An empty value, as in
    max_bytes_per_s=, removes a limit.
    """
    try:
        changes = {name: _parse_value(value) for name, value in _parse_pairs(pairs or [], "").items()}
        with closing(DaemonClient(cache_dir)) as client:
            values = client.change_settings(changes) if changes else client.settings()
    except (SettingsError, ProtocolError) as exc:
        _fail(exc, EXIT_BAD_SETTING)
    except DaemonUnavailableError as exc:
        _fail(exc, EXIT_FAILED)
    for name, value in values.items():
        print(f"{name} = {format_value(name, value)}")


def _run_in_background(settings: Settings) -> None:
    other = fork_daemon()
    if isinstance(other, ForkedDaemon):
        _print_ready(other.wait_until_ready(), settings)
    else:
        with _exit_on_error(other):
            _run(settings, other)


def _run(settings: Settings, parent: ParentProcess = NO_PARENT) -> None:
    # Imported only here: the other commands, and the parent that waits for the daemon, then start in half the time.
    import uvloop

    from gcs_prefetchd.service.daemon import ReadyDaemon, serve
    from gcs_prefetchd.shared.malloc import keep_freed_memory

    os.umask(0o027)  # the group can read the cache, others cannot
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    setup_logging(None, settings.log_level)
    log_file = settings.log_file or (settings.cache_dir / "daemon.log" if parent.exists else None)

    def on_claimed() -> None:
        setup_logging(log_file, settings.log_level)

    def on_ready(daemon: ReadyDaemon) -> None:
        parent.report({"pid": daemon.pid, "http": daemon.http})

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(serve(settings, on_claimed, on_ready))
        except MemoryError:
            # The event loop itself was out of memory, so closing it could hang. The cache survives such an exit.
            os._exit(EXIT_FAILED)


def _parse_pairs(pairs: list[str], flag: str) -> dict[str, str]:
    values = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise SettingsError(f"{flag}{pair!r}: write NAME=VALUE, as in {flag}concurrency=64")
        values[name.strip().replace("-", "_")] = value.strip()
    return values


def _parse_value(value: str) -> object:
    """As the daemon's socket expects it: a number, null for no value, or text."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value or None


def _print_ready(report: dict[str, Any], settings: Settings) -> None:
    log_file = settings.log_file or settings.cache_dir / "daemon.log"
    print(f"gcs-prefetchd is ready (pid {report['pid']})")
    print(f"  statistics  {report['http']}/")
    print(f"  cache       {settings.cache_dir}, {format_size(settings.cache_size)} at most")
    print(f"  log         {log_file}")
    print(f"  stop        gcs-prefetchd stop --cache-dir {settings.cache_dir}")


def _print_settings(settings: Settings) -> None:
    for name, value in settings.model_dump(mode="json").items():
        print(f"{name} = {_as_typed(value)}")


def _as_typed(value: object) -> str:
    """A setting's value as a user writes it; an empty value resets a setting to "none"."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else ", ".join(value) if isinstance(value, list) else str(value)


def _print_stats(statistics: Statistics) -> None:
    _print_summary(summarize(statistics))
    for stream in statistics.streams:
        print(f"\n{stream.id}: epoch {stream.epoch} of {stream.data_root}")
        _print_summary(summarize_stream(stream))


def _print_summary(summary: Mapping[str, str]) -> None:
    for heading, text in summary.items():
        print(f"{heading:<17}{text}")


@contextmanager
def _exit_on_error(parent: ParentProcess = NO_PARENT) -> Iterator[None]:
    """Turn an error of the body into one line and an exit status: on stderr, or reported to the parent process."""
    try:
        yield
    except SettingsError as exc:
        _fail(exc, EXIT_BAD_SETTING, parent)
    except PrefetchdError as exc:
        _fail(exc, EXIT_FAILED, parent)


def _fail(error: PrefetchdError, status: int, parent: ParentProcess = NO_PARENT) -> NoReturn:
    text = " ".join(str(error).split())
    if not parent.exists:
        print(f"gcs-prefetchd: {text}", file=sys.stderr)
    parent.report({"error": text, "status": status})
    raise typer.Exit(status)
