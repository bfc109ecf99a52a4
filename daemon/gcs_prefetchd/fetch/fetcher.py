"""Brings objects into the cache: one download for any number of askers, demand before prefetch."""

import asyncio
import time
from dataclasses import dataclass

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.observer import ChooseVictims
from gcs_prefetchd.cache.reservation import writer_for
from gcs_prefetchd.fetch.download_slots import DownloadSlots, Ticket
from gcs_prefetchd.fetch.process_download import bring_by
from gcs_prefetchd.fetch.process_pool import FetchProcesses
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.shared.errors import DaemonUnavailableError, ObjectChangedError
from gcs_prefetchd.shared.moving_average import MovingDuration
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Fetched", "Fetcher"]


@dataclass(slots=True)
class Fetched:
    """Objects brought into the cache since the start: while a reader waited, and before one did."""

    demand: int = 0
    prefetch: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """A download under way, and on what terms: anybody who wants it on the same ones shares it."""

    version: ObjectVersion | None
    room: ChooseVictims
    at_any_cost: bool
    ticket: Ticket
    task: asyncio.Task[None]

    def serves(self, version: ObjectVersion | None, room: ChooseVictims) -> bool:
        """Whether its end, good or bad, is that of a download of this version with this room."""
        mine, wanted = self.version, version
        same = mine is wanted is None or (mine is not None and wanted is not None and mine.generation == wanted.generation)
        return same and (self.room is room or self.at_any_cost)


class Fetcher:
    """Downloads into the cache, as many at a time and as fast as `slots` says. `close` ends what is under way.

    An object that GCS or the disk refuses raises what `GCSClient.download` and `ObjectWriter` raise, a closed fetcher
    DaemonUnavailableError.
    """

    def __init__(
        self,
        cache: Cache,
        origin: GCSClient,
        slots: DownloadSlots,
        download_s: MovingDuration | None = None,
        processes: FetchProcesses | None = None,
    ) -> None:
        self.slots = slots
        self.fetched = Fetched()
        self.download_s = download_s or MovingDuration()
        self._cache = cache
        self._origin = origin
        self._processes = processes
        self._under_way: dict[str, _Job] = {}
        self._closed = False

    async def close(self) -> None:
        """Cancel every download and wait until nothing of them is left; nothing is begun after it."""
        self._closed = True
        self.slots.close()
        tasks = [job.task for job in self._under_way.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def under_way(self) -> dict[str, asyncio.Task[None]]:
        """Where what is being downloaded will lie, each with its task, which is not to be cancelled."""
        return {path: job.task for path, job in self._under_way.items()}

    def is_cached(self, version: ObjectVersion) -> bool:
        """Whether this generation of the object is in the cache."""
        stamp = self._cache.stamp(cache_path(version.name.bucket, version.name.name))
        return stamp is not None and stamp.generation == version.generation

    def start(self, version: ObjectVersion, room: ChooseVictims) -> asyncio.Task[None]:
        """Begin to bring this generation into the cache, if there is room for it.

        The task is that of all who wait for it, and not to be cancelled; it is when the fetcher closes.
        """
        path = cache_path(version.name.bucket, version.name.name)
        job = self._under_way.get(path)
        if job is None:
            return self._start(path, version.name, version, room, demand=False).task
        if job.serves(version, room):
            return job.task
        return asyncio.create_task(self._have(version.name, version, room, demand=False))

    async def demand(self, name: ObjectName, version: ObjectVersion | None) -> None:
        """Have the object in the cache now, whatever must go for it.

        A reader asks because its own look at the disk failed, so a file that is here is read and checked first. Where the
        bucket has another generation by now, that one comes.
        """
        path = cache_path(name.bucket, name.name)
        if (version is None or self.is_cached(version)) and await self._cache.verify(path):
            self._cache.touch(path)
            return
        try:
            await self._have(name, version, self._cache.choose_victims, demand=True)
        except ObjectChangedError:
            if version is None:
                raise
            await self._have(name, None, self._cache.choose_victims, demand=True)

    async def _have(self, name: ObjectName, version: ObjectVersion | None, room: ChooseVictims, *, demand: bool) -> None:
        path = cache_path(name.bucket, name.name)
        while (job := self._under_way.get(path)) is not None:
            if demand:
                self.slots.promote(job.ticket)
            if job.serves(version, room):
                break
            # It may bring what is wanted all the same. If not, it is asked for on our own terms.
            await asyncio.wait([job.task])
            if self._cache.stamp(path) is not None if version is None else self.is_cached(version):
                return
        await self._end_of(job or self._start(path, name, version, room, demand=demand), name)

    async def _end_of(self, job: _Job, name: ObjectName) -> None:
        try:
            # Shielded: an asker that goes away must not take the download from the others, nor waste its bytes.
            await asyncio.shield(job.task)
        except asyncio.CancelledError:
            asker = asyncio.current_task()
            if job.task.cancelled() and asker is not None and not asker.cancelling():
                raise DaemonUnavailableError(f"fetch {name.uri}: the daemon is stopping") from None
            raise

    def _start(self, path: str, name: ObjectName, version: ObjectVersion | None, room: ChooseVictims, *, demand: bool) -> _Job:
        if self._closed:
            raise DaemonUnavailableError(f"fetch {name.uri}: the daemon is stopping")
        ticket = Ticket(self.slots, demand, version.size if version is not None else 0)
        task = asyncio.create_task(self._bring(name, version, room, ticket), name=f"fetch {name.uri}")
        job = self._under_way[path] = _Job(version, room, demand, ticket, task)
        task.add_done_callback(lambda done: self._ended(path, done))
        return job

    async def _bring(self, name: ObjectName, version: ObjectVersion | None, room: ChooseVictims, ticket: Ticket) -> None:
        started_s = time.monotonic()
        await self.slots.acquire(ticket)
        try:
            if version is None or not await self._bring_by_process(version, room, ticket):
                async with writer_for(self._cache, name, room) as writer:
                    if version is not None:
                        await writer.start(version)  # nothing is asked of GCS for which there is no room
                    await writer.publish(await self._origin.download(name, version, writer, ticket))
        finally:
            self.slots.release(ticket)
        self.download_s.add(time.monotonic() - started_s)
        if ticket.is_demand:
            self.fetched.demand += 1
        else:
            self.fetched.prefetch += 1

    async def _bring_by_process(self, version: ObjectVersion, room: ChooseVictims, ticket: Ticket) -> bool:
        """Whether a fetch process has brought it. What a reader waits for is fetched here, without a hop."""
        process = self._processes.least_busy() if self._processes is not None and not ticket.is_demand else None
        if process is None:
            return False
        if await bring_by(process, self._cache, version, room, ticket):
            return True
        self.slots.reacquire(ticket)
        return False

    def _ended(self, path: str, task: asyncio.Task[None]) -> None:
        del self._under_way[path]
        if not task.cancelled():
            task.exception()  # every asker has it; without askers left nobody needs it
