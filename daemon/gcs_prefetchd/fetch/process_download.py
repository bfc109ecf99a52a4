"""One object that a fetch process brings into the cache, from its room to its entry."""

import asyncio
import contextlib
from functools import partial

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.file_scan import find_each
from gcs_prefetchd.cache.observer import ChooseVictims
from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.cache.safe_folders import Folders
from gcs_prefetchd.fetch.process_handle import FetchProcess, ProcessLostError
from gcs_prefetchd.gcs.retry import RequestObserver
from gcs_prefetchd.shared.checksums import Stamp
from gcs_prefetchd.shared.objects import ObjectVersion

__all__ = ["bring_by"]

CANCEL_S = 1.0  # within which a process that is not hung says what became of a download that is not wanted any more


async def bring_by(
    process: FetchProcess, cache: Cache, version: ObjectVersion, room: ChooseVictims, observer: RequestObserver
) -> bool:
    """Have the process bring this version; False where it was lost before it had.

    Leaves nothing behind where it fails or is cancelled. Raises what `GCSClient.download` and `ObjectWriter` raise.
    """
    reservation = Reservation(cache, version.name, room)
    try:
        await reservation.reserve(version.size)
        await reservation.claim_path()
    except BaseException:
        reservation.release()
        raise
    number, ended = process.download(version, reservation, observer)
    try:
        reservation.commit(await ended)
    except asyncio.CancelledError:
        await asyncio.shield(cache.hold(_clean_up(process, process.cancel(number), cache, reservation, version)))
        raise
    except ProcessLostError:
        await asyncio.shield(cache.hold(_settle(cache, reservation, version)))
        return reservation.is_committed
    except BaseException:
        reservation.release()
        raise
    return True


async def _clean_up(
    process: FetchProcess, ended: asyncio.Future[Stamp], cache: Cache, reservation: Reservation, version: ObjectVersion
) -> None:
    await asyncio.wait([ended], timeout=CANCEL_S)
    if not ended.done():  # it hangs
        process.kill()
        await asyncio.wait([ended])
    if ended.cancelled():
        reservation.release()
    elif ended.exception() is None:
        reservation.commit(ended.result())  # cancelled when nothing could stop it any more
    else:
        await _settle(cache, reservation, version)


async def _settle(cache: Cache, reservation: Reservation, version: ObjectVersion) -> None:
    """See what a process that is no more has left: the whole file, or part of one, which goes."""
    stamp: Stamp | None = None
    try:
        with contextlib.suppress(OSError):
            await cache.disk.files.submit(partial(cache.directory.discard_temporary, reservation.temporary))
        folders = Folders(cache.directory.objects, cache.directory.check_ours)
        (found,) = await cache.disk.call(find_each, folders, [reservation.path])
        if found is not None and found.stamp is not None and found.size == found.stamp.size:
            stamp = found.stamp
    except (OSError, RuntimeError, MemoryError):  # no descriptor, thread or memory: the next rescan will find what there is
        pass
    finally:
        if stamp is not None and (stamp.generation, stamp.size) == (version.generation, version.size):
            reservation.commit(stamp)
        else:
            reservation.release()
