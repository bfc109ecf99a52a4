"""The daemon's side of one fetch process. What happens to complete processes is tested in `test_process_pool.py`."""

import asyncio
from pathlib import Path

from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.fetch.process_handle import FetchProcess
from gcs_prefetchd.fetch.process_messages import ProcessOptions
from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.gcs.retry import Outcome
from gcs_prefetchd.shared.checked_read import Stamp, crc32c_of
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.testing import GCSServer
from support.caches import BUCKET, RecordingObserver, opened

DATA = b"x" * 1000


class OutOfMemoryOnce(RecordingObserver):
    """Has no memory for the first file that arrives."""

    def arrived(self, path: str, stamp: Stamp) -> None:
        super().arrived(path, stamp)
        if len(self.arrivals) == 1:
            raise MemoryError


class Requests:
    """Counts what a download reports."""

    def __init__(self) -> None:
        self.attempts: list[Outcome] = []

    def request_sent(self) -> None:
        """Not of interest."""

    def attempt_ended(self, outcome: Outcome) -> None:
        self.attempts.append(outcome)


async def test_an_object_that_cannot_be_committed_fails_alone(gcs: GCSServer, tmp_path: Path) -> None:
    counters, requests = RequestCounters(), Requests()
    async with opened(tmp_path / "cache", observer=OutOfMemoryOnce()) as cache:
        options = ProcessOptions(str(cache.directory.path), gcs.url, True, None, 8, 20.0)
        process = FetchProcess(options, cache.directory.lock, None, counters)
        process.start()
        await process.connect()
        await process.ready
        try:
            downloads = []
            for number in range(3):
                name = ObjectName(BUCKET, f"{number}.jpg")
                stored = gcs.put(BUCKET, name.name, DATA)
                reservation = Reservation(cache, name)
                await reservation.reserve(len(DATA))
                version = ObjectVersion(name, stored.generation, len(DATA), crc32c_of(DATA))
                downloads.append(process.start_download(version, reservation, requests))
            results = await asyncio.gather(*(download.result for download in downloads), return_exceptions=True)
            assert sorted(type(result).__name__ for result in results) == ["MemoryError", "NoneType", "NoneType"]
            assert not process.stopped.done()
            assert (process.active_downloads, counters.in_flight, cache.capacity.reserved_bytes) == (0, 0, 0)
            assert [attempt.is_success for attempt in requests.attempts] == [True] * 3
        finally:
            await process.close()
