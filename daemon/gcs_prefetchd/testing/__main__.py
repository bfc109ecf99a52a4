"""`python -m gcs_prefetchd.testing`: serve a directory of buckets the way GCS does."""

import argparse
import asyncio
import math
import signal
import sys
from pathlib import Path

import uvloop

from gcs_prefetchd.shared.errors import PrefetchdError
from gcs_prefetchd.shared.malloc import keep_freed_memory
from gcs_prefetchd.testing.server import GCSServer

__all__ = ["main"]

EXIT_CANNOT_START = 2


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(options))
    except PrefetchdError as exc:
        print(exc, file=sys.stderr)
        return EXIT_CANNOT_START
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gcs_prefetchd.testing",
        description="An emulator of Google Cloud Storage: serves DIR/<bucket>/<object>, never writes there.",
    )
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="directory with one subdirectory per bucket")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=4443, help="port to listen on; 0 picks a free one (default: %(default)s)")
    parser.add_argument("--latency-ms", type=_not_negative, default=0.0, metavar="MS", help="before each response")
    parser.add_argument(
        "--latency-sigma",
        type=_not_negative,
        default=0.0,
        metavar="SIGMA",
        help="spread of a lognormal latency around that median (default: none)",
    )
    parser.add_argument("--bytes-per-s", type=_positive, metavar="N", help="upper bound for each body (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the latencies (default: %(default)s)")
    return parser


async def _serve(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    server = GCSServer(
        host=options.host,
        port=options.port,
        root=options.root,
        latency_s=options.latency_ms / 1000,
        latency_sigma=options.latency_sigma,
        bytes_per_s=options.bytes_per_s,
        seed=options.seed,
    )
    async with server:
        print(await _ready_line(server), flush=True)
        await stop.wait()


async def _ready_line(server: GCSServer) -> str:
    buckets = server.buckets()
    objects = sum([len(await asyncio.to_thread(server.names, bucket)) for bucket in buckets])
    return (
        f"GCS emulator ready at {server.url}: {_many(objects, 'object')} in {_many(len(buckets), 'bucket')}, "
        f"{server.pace.latency_s * 1000:g} ms latency"
    )


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid port: 0 to 65535")
    return int(text)


def _not_negative(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    sys.exit(main())
