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
from gcs_prefetchd.server.wording import daemon_facts, stream_facts
from gcs_prefetchd.service.daemonize import ForkedDaemon, ParentProcess, fork_daemon, wait_for_exit
from gcs_prefetchd.service.log_setup import setup_logging
from gcs_prefetchd.settings import Settings, check_cache_fits_disk, format_value, load_settings
from gcs_prefetchd.shared.byte_sizes import format_size
from gcs_prefetchd.shared.daemon_client import DaemonClient, read_daemon_file
from gcs_prefetchd.shared.errors import DaemonUnavailableError, PrefetchdError, ProtocolError, SettingsError

__all__ = ["main"]

EXIT_FAILED = 1
EXIT_BAD_SETTING = 2
# A thread that comes back from a system call waits so long for one that goes on and on. By default that is 5 ms, in which the
# event loop would deal with a dozen objects, and the one thread that makes files makes none.
SWITCH_S = 0.0005
NOBODY = ParentProcess(None)

app = typer.Typer(
    help="Prefetch a training job's images from Google Cloud Storage into a local cache, in the order the job will read them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

CacheDir = Annotated[Path, typer.Option(help="The daemon's cache directory.", envvar="GCS_PREFETCHD_CACHE_DIR")]


def main() -> None:
    """The console script."""
    app()


@app.command()
def start(
    data_root: Annotated[list[str] | None, typer.Option(help="gs://bucket/prefix to serve; may be repeated.")] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Cache directory: new, empty, or made by this daemon.")] = None,
    cache_size: Annotated[str | None, typer.Option(help="The most bytes of objects to hold, such as 200GB.")] = None,
    seed: Annotated[str | None, typer.Option(help="Seed of the order prefetched before a reader comes. [default: 0]")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Root URL of a stand-in for GCS.")] = None,
    anonymous: Annotated[bool | None, typer.Option("--anonymous", help="Send no credentials.")] = None,
    credentials: Annotated[str | None, typer.Option(help="A service account's key file.")] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of the statistics. [default: 127.0.0.1:8484]")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; see docs/configuration.md.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay here and log to stderr: for systemd, containers.")
    ] = False,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Say which settings are in force, and start nothing.")
    ] = False,
) -> None:
    """Start the daemon; returns when it is ready and says where its statistics are."""
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
    with _failing_in_a_line():
        settings = load_settings(flags | _named_settings(setting or [], "--set "), config)
        if check_config:
            check_cache_fits_disk(settings)
            _show_settings(settings)
        elif foreground:
            _run(settings)
        else:
            check_cache_fits_disk(settings)
            _run_in_background(settings)


@app.command()
def stop(cache_dir: CacheDir) -> None:
    """Stop the daemon of a cache directory; returns when it has ended. The cache stays."""
    try:
        with closing(DaemonClient(cache_dir)) as client:
            pid = client.status().pid
            with wait_for_exit(pid) as wait:
                client.stop()
                ended = wait()
    except DaemonUnavailableError:
        print(f"no daemon is running for {cache_dir}")
        return
    if not ended:
        _fail(PrefetchdError(f"the daemon (pid {pid}) has not ended yet"), EXIT_FAILED)
    print(f"stopped (pid {pid}); the cache in {cache_dir} is kept")


@app.command()
def status(cache_dir: CacheDir) -> None:
    """Say whether the daemon runs; exit status 1 where it does not."""
    try:
        with closing(DaemonClient(cache_dir)) as client:
            daemon = client.status()
            facts = daemon_facts(client.stats())
        about = read_daemon_file(cache_dir)
    except DaemonUnavailableError as exc:
        print(f"not running: {exc}")
        raise typer.Exit(EXIT_FAILED) from None
    print(f"running: pid {daemon.pid}, version {daemon.version}")
    print(f"serving: {', '.join(daemon.data_roots)}")
    print(f"statistics: {about.get('http')}")
    print(f"downloads: {facts['Downloads']}")
    print(f"rate: {facts['Rate']}")


@app.command()
def stats(
    cache_dir: CacheDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print what /stats answers.")] = False,
) -> None:
    """Show the cache's statistics."""
    try:
        with closing(DaemonClient(cache_dir)) as client:
            snapshot = client.stats()
    except DaemonUnavailableError as exc:
        _fail(exc, EXIT_FAILED)
    if as_json:
        print(json.dumps(snapshot, indent=2))
    else:
        _show_stats(snapshot)


@app.command("set")
def change(
    cache_dir: CacheDir,
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="A setting and its new value; no value is none.")
    ] = None,
) -> None:
    """Change settings of a running daemon until it ends, and show those that can be changed so."""
    try:
        changes = {name: _number(value) for name, value in _named_settings(pairs or [], "").items()}
        with closing(DaemonClient(cache_dir)) as client:
            values = client.change_settings(changes) if changes else client.settings()
    except (SettingsError, ProtocolError) as exc:
        _fail(exc, EXIT_BAD_SETTING)
    except DaemonUnavailableError as exc:
        _fail(exc, EXIT_FAILED)
    for name, value in values.items():
        print(f"{name} = {format_value(name, value)}")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _run_in_background(settings: Settings) -> None:
    started = fork_daemon()
    if isinstance(started, ForkedDaemon):
        _say_ready(started.wait_until_ready(), settings)
    else:
        with _failing_in_a_line(started):
            _run(settings, started)


def _run(settings: Settings, starter: ParentProcess = NOBODY) -> None:
    # Loaded only here: the other commands, and whoever waits for the daemon to be ready, answer in half the time.
    import uvloop

    from gcs_prefetchd.service.daemon import ReadyDaemon, serve
    from gcs_prefetchd.shared.malloc import keep_freed_memory

    os.umask(0o027)  # the group reads the cache, nobody else does
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_S)
    setup_logging(None, settings.log_level)
    log_file = settings.log_file or (settings.cache_dir / "daemon.log" if starter.waits else None)

    def on_claimed() -> None:
        setup_logging(log_file, settings.log_level)

    def on_ready(started: ReadyDaemon) -> None:
        starter.tell({"pid": started.pid, "http": started.http})

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(serve(settings, on_claimed, on_ready))
        except MemoryError:
            os._exit(EXIT_FAILED)  # the loop itself had none; to close it would hang, and the cache survives an end like this


def _named_settings(pairs: list[str], flag: str) -> dict[str, str]:
    named = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise SettingsError(f"{flag}{pair!r}: write NAME=VALUE, as in {flag}concurrency=64")
        named[name.strip().replace("-", "_")] = value.strip()
    return named


def _number(value: str) -> object:
    """As the daemon's socket wants it: a number, null for none, else the text."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value or None


def _say_ready(answer: dict[str, Any], settings: Settings) -> None:
    log_file = settings.log_file or settings.cache_dir / "daemon.log"
    print(f"gcs-prefetchd is ready (pid {answer['pid']})")
    print(f"  statistics  {answer['http']}/")
    print(f"  cache       {settings.cache_dir}, {format_size(settings.cache_size)} at most")
    print(f"  log         {log_file}")
    print(f"  stop        gcs-prefetchd stop --cache-dir {settings.cache_dir}")


def _show_settings(settings: Settings) -> None:
    for name, value in settings.model_dump(mode="json").items():
        shown = "" if value is None else ", ".join(value) if isinstance(value, list) else value
        print(f"{name} = {shown}")


def _show_stats(snapshot: dict[str, Any]) -> None:
    _show_facts(daemon_facts(snapshot))
    for one in snapshot["streams"]:
        print(f"\n{one['id']}: epoch {one['epoch']} of {one['data_root']}")
        _show_facts(stream_facts(one))


def _show_facts(facts: Mapping[str, str]) -> None:
    for name, value in facts.items():
        print(f"{name:<14}{value}")


@contextmanager
def _failing_in_a_line(starter: ParentProcess = NOBODY) -> Iterator[None]:
    """End with one line and a status where the body fails: on stderr, or told to whoever started us."""
    try:
        yield
    except SettingsError as exc:
        _fail(exc, EXIT_BAD_SETTING, starter)
    except PrefetchdError as exc:
        _fail(exc, EXIT_FAILED, starter)


def _fail(error: PrefetchdError, status: int, starter: ParentProcess = NOBODY) -> NoReturn:
    text = " ".join(str(error).split())
    if not starter.waits:
        print(f"gcs-prefetchd: {text}", file=sys.stderr)
    starter.tell({"error": text, "status": status})
    raise typer.Exit(status)
