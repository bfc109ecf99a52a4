"""The daemon's part of a download by a fetch process: space before it, and the cleaning up if the process fails it."""

import asyncio
import contextlib
from functools import partial

from gcs_prefetchd.cache.cache import Cache
from gcs_prefetchd.cache.file_scan import find_each
from gcs_prefetchd.cache.reservation import Reservation
from gcs_prefetchd.cache.safe_folders import SafeFolders
from gcs_prefetchd.fetch.process_handle import ProcessDownload, ProcessLostError
from gcs_prefetchd.fetch.process_pool import FetchProcesses
from gcs_prefetchd.gcs.retry import RequestObserver
from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.objects import ObjectVersion

__all__ = ["download_by_process"]

CANCEL_TIMEOUT_S = 1.0  # within this time a process that does not hang reports the end of a cancelled download


async def download_by_process(
    processes: FetchProcesses, cache: Cache, version: ObjectVersion, reservation: Reservation, observer: RequestObserver
) -> bool:
    """Download and publish this version by a fetch process; returns False if none is ready, or if it stopped before it had.

    Leaves nothing behind if it fails or is cancelled. Raises what `GCSClient.download` and `ObjectWriter` raise.
    """
    await reservation.reserve(version.size)
    download = processes.start_download(version, reservation, observer)
    if download is None:
        return False
    try:
        await asyncio.shield(download.result)
    except asyncio.CancelledError:
        await asyncio.shield(cache.paths.hold(_cancel(download, cache)))
        raise
    except ProcessLostError:
        await asyncio.shield(cache.paths.hold(_recover(download, cache)))
    return reservation.is_committed


async def _cancel(download: ProcessDownload, cache: Cache) -> None:
    download.process.cancel(download)
    await asyncio.wait([download.result], timeout=CANCEL_TIMEOUT_S)
    if not download.result.done():  # the process hangs
        download.process.kill()
        await asyncio.wait([download.result])
    if not download.result.cancelled() and isinstance(download.result.exception(), ProcessLostError):
        await _recover(download, cache)


async def _recover(download: ProcessDownload, cache: Cache) -> None:
    """Commit the file that a process had published before it stopped, or remove the part that it had written."""
    version, reservation = download.version, download.reservation
    stamp: Stamp | None = None
    try:
        with contextlib.suppress(OSError):
            await cache.io.files.submit(partial(cache.directory.remove_temp_file, reservation.temp_path))
        folders = SafeFolders(cache.directory.objects, cache.directory.check_ours)
        (found,) = await cache.io.run(find_each, folders, [reservation.path])
        if found is not None and found.stamp is not None and found.size == found.stamp.size:
            stamp = found.stamp
    except (OSError, RuntimeError, MemoryError):  # no descriptor, thread or memory: the next rescan will find the file
        pass
    finally:
        if stamp is not None and (stamp.generation, stamp.size) == (version.generation, version.size):
            reservation.commit(stamp)
        else:
            reservation.use_new_temp_path()  # the process's file may still be there
            reservation.release()
