"""Downloads one object into the cache: in a slot, into reserved space, by a fetch process or by the daemon itself."""

import time
from dataclasses import dataclass

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.observer import ChooseVictims
from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.fetch.download_slots import DownloadSlots, Ticket
from gcs_prefetchd.fetch.process_download import download_by_process
from gcs_prefetchd.fetch.process_pool import FetchProcesses
from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.shared.moving_average import MovingDuration
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

__all__ = ["CacheDownloader", "Downloaded"]


@dataclass(slots=True)
class Downloaded:
    """Objects that were downloaded since the daemon started: while a reader waited, and before one did."""

    demand: int = 0
    prefetch: int = 0


class CacheDownloader:
    """Downloads from `client` into `cache`. `duration_s` measures how long that takes, the wait for a slot included."""

    def __init__(
        self,
        cache: Cache,
        client: GCSClient,
        slots: DownloadSlots,
        duration_s: MovingDuration,
        processes: FetchProcesses | None,
    ) -> None:
        self.downloaded = Downloaded()
        self._cache = cache
        self._client = client
        self._slots = slots
        self._duration_s = duration_s
        self._processes = processes

    async def download(
        self, name: ObjectName, version: ObjectVersion | None, choose_victims: ChooseVictims, ticket: Ticket
    ) -> None:
        """Download this version, or the live one if it is None.

        Leaves nothing behind if it fails or is cancelled. Raises what `GCSClient.download` and `ObjectWriter` raise.
        """
        started_s = time.monotonic()
        await self._slots.acquire(ticket)
        try:
            reservation = Reservation(self._cache, name, choose_victims)
            if version is None or not await self._download_by_process(version, reservation, ticket):
                if version is not None:
                    await reservation.reserve(version.size)  # without space for the object, no request is sent
                async with reservation.writer() as writer:
                    await writer.publish(await self._client.download(name, version, writer, ticket))
        finally:
            self._slots.release(ticket)
        self._duration_s.add(time.monotonic() - started_s)
        if ticket.is_demand:
            self.downloaded.demand += 1
        else:
            self.downloaded.prefetch += 1

    async def _download_by_process(self, version: ObjectVersion, reservation: Reservation, ticket: Ticket) -> bool:
        """Download the object by a fetch process; returns False if none did. What a reader waits for is downloaded by the
        daemon, without a hop."""
        if self._processes is None or ticket.is_demand:
            return False
        is_published = await download_by_process(self._processes, self._cache, version, reservation, ticket)
        if not is_published:
            self._slots.reacquire(ticket)
        return is_published
