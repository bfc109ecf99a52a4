"""Which objects are downloaded: prefetches and demands, one download at a time for each object and all who need it."""

import asyncio
from dataclasses import dataclass
from functools import partial

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.observer import ChooseVictims
from gcs_prefetchd.fetch.cache_download import CacheDownloader
from gcs_prefetchd.fetch.download_slots import DownloadSlots, Ticket
from gcs_prefetchd.fetch.process_pool import FetchProcesses
from gcs_prefetchd.fetch.single_flight import Flight, SingleFlight
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.shared.errors import DaemonUnavailableError, ObjectChangedError
from gcs_prefetchd.shared.moving_average import MovingDuration
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion
from gcs_prefetchd.shared.paths import cache_path

__all__ = ["Fetcher"]


@dataclass(frozen=True, slots=True)
class _Terms:
    """What a download brings, and what may be evicted for it. `may_evict_any`: it was started by a demand."""

    version: ObjectVersion | None
    choose_victims: ChooseVictims
    may_evict_any: bool
    ticket: Ticket

    def serve(self, version: ObjectVersion | None, choose_victims: ChooseVictims) -> bool:
        """Whether the result of the download, good or bad, is that of a download of this version with these victims."""
        own, wanted = self.version, version
        is_same = own is wanted is None or (own is not None and wanted is not None and own.generation == wanted.generation)
        return is_same and (self.choose_victims is choose_victims or self.may_evict_any)


class Fetcher:
    """Downloads into the cache, as many objects at a time and as fast as `slots` allows. `close` cancels the downloads.

    A download that fails raises what `GCSClient.download` and `ObjectWriter` raise; after `close`, DaemonUnavailableError.
    """

    def __init__(
        self,
        cache: Cache,
        client: GCSClient,
        slots: DownloadSlots,
        download_s: MovingDuration | None = None,
        processes: FetchProcesses | None = None,
    ) -> None:
        self.slots = slots
        self.download_s = download_s or MovingDuration()
        self._cache = cache
        self._downloader = CacheDownloader(cache, client, slots, self.download_s, processes)
        self._flights: SingleFlight[_Terms] = SingleFlight()
        self.downloaded = self._downloader.downloaded

    async def close(self) -> None:
        """Cancel every download and wait until all have ended and left nothing behind; none starts afterwards."""
        self.slots.close()
        await self._flights.close()

    @property
    def downloads(self) -> dict[str, asyncio.Task[None]]:
        """The running downloads by the paths of their objects in the cache. They must not be cancelled."""
        return self._flights.tasks

    def is_cached(self, version: ObjectVersion) -> bool:
        """Whether this generation of the object is in the cache."""
        stamp = self._cache.stamp(cache_path(version.name.bucket, version.name.name))
        return stamp is not None and stamp.generation == version.generation

    def prefetch(self, version: ObjectVersion, choose_victims: ChooseVictims) -> asyncio.Task[None]:
        """Start to download this version, evicting what `choose_victims` chooses.

        All who need the object share the task, so it must not be cancelled; `close` cancels it.
        """
        path = cache_path(version.name.bucket, version.name.name)
        flight = self._get_or_start(path, version.name, version, choose_victims, is_demand=False)
        if flight.terms.serve(version, choose_victims):
            return flight.task
        return asyncio.create_task(self._fetch(version.name, version, choose_victims, is_demand=False))

    async def demand(self, name: ObjectName, version: ObjectVersion | None) -> None:
        """Return when the object is in the cache. If there is no space, anything may be evicted for it.

        A reader demands what it could not read from the disk, so a cached file is first read and checked. If the bucket holds
        another generation by now, that one is downloaded.
        """
        path = cache_path(name.bucket, name.name)
        if (version is None or self.is_cached(version)) and await self._cache.verify(path):
            self._cache.touch(path)
            return
        try:
            await self._fetch(name, version, self._cache.choose_victims, is_demand=True)
        except ObjectChangedError:
            if version is None:
                raise
            await self._fetch(name, None, self._cache.choose_victims, is_demand=True)

    async def _fetch(
        self, name: ObjectName, version: ObjectVersion | None, choose_victims: ChooseVictims, *, is_demand: bool
    ) -> None:
        """Join a running download that has the same result, or start one."""
        path = cache_path(name.bucket, name.name)
        while (flight := self._flights.get(path)) is not None:
            if is_demand:
                self.slots.promote(flight.terms.ticket)
            if flight.terms.serve(version, choose_victims):
                break
            # It may bring what is needed all the same. If not, the object is downloaded on this caller's terms.
            await asyncio.wait([flight.task])
            if self._cache.stamp(path) is not None if version is None else self.is_cached(version):
                return
        flight = flight or self._get_or_start(path, name, version, choose_victims, is_demand=is_demand)
        if not await flight.join():
            raise _stopping(name)

    def _get_or_start(
        self, path: str, name: ObjectName, version: ObjectVersion | None, choose_victims: ChooseVictims, *, is_demand: bool
    ) -> Flight[_Terms]:
        if self._flights.is_closed:
            raise _stopping(name)
        ticket = Ticket(self.slots, is_demand, version.size if version is not None else 0)
        terms = _Terms(version, choose_victims, is_demand, ticket)
        download = partial(self._downloader.download, name, version, choose_victims, ticket)
        return self._flights.get_or_start(path, terms, download, f"fetch {name.uri}")


def _stopping(name: ObjectName) -> DaemonUnavailableError:
    return DaemonUnavailableError(f"fetch {name.uri}: the daemon is stopping")
