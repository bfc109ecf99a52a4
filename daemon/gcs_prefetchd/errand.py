"""One object that a fetch process brings into the cache, from its room to its entry."""

import asyncio
import contextlib
from functools import partial

from gcs_prefetchd.cache import Cache, Room
from gcs_prefetchd.errors import PrefetchdError
from gcs_prefetchd.fetch_processes import FetchProcess, ProcessLostError
from gcs_prefetchd.folders import Folders
from gcs_prefetchd.place import Place
from gcs_prefetchd.stamp import Stamp
from gcs_prefetchd.tree import find_each
from gcs_prefetchd.tries import Account
from gcs_prefetchd.versions import ObjectVersion

__all__ = ["bring_by"]


async def bring_by(process: FetchProcess, cache: Cache, version: ObjectVersion, room: Room, account: Account) -> bool:
    """Have the process bring this version; False where it was lost before it had.

    Leaves nothing behind where it fails or is cancelled. Raises what `Origin.download` and `Download` raise.
    """
    place = Place(cache, version.name, room)
    try:
        await place.reserve(version.size)
        await place.expect()
    except BaseException:
        place.give_up()
        raise
    number, ended = process.fetch(version, place, account)
    try:
        place.admit(await ended)
    except asyncio.CancelledError:
        await asyncio.shield(cache.hold(_clean_up(process.cancel(number), cache, place, version)))
        raise
    except ProcessLostError:
        return await _has_come(cache, place, version)
    except PrefetchdError:
        place.give_up()
        raise
    return True


async def _clean_up(ended: asyncio.Future[Stamp], cache: Cache, place: Place, version: ObjectVersion) -> None:
    await asyncio.wait([ended])
    if ended.cancelled():
        place.give_up()
    elif ended.exception() is None:
        place.admit(ended.result())  # cancelled when nothing could stop it any more
    else:
        await _has_come(cache, place, version)


async def _has_come(cache: Cache, place: Place, version: ObjectVersion) -> bool:
    """See what a process that is no more has left: the whole file, or part of one, which goes."""
    with contextlib.suppress(OSError):
        await cache.disk.in_turn(partial(cache.directory.discard_temporary, place.temporary))
    stamp: Stamp | None = None
    with contextlib.suppress(OSError):
        folders = Folders(cache.directory.objects, cache.directory.check_ours)
        (found,) = await cache.disk.call(find_each, folders, [place.path])
        stamp = None if found is None or found.stamp is None or found.size != found.stamp.size else found.stamp
    if stamp is None or (stamp.generation, stamp.size) != (version.generation, version.size):
        place.give_up()
        return False
    place.admit(stamp)
    return True
