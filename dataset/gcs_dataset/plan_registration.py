"""Tells the daemon what a sampler will yield, and again when the daemon has been restarted or has forgotten it."""

import logging
import os
import threading
import time
import weakref
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gcs_dataset.deadline_call import in_background
from gcs_prefetchd.shared.daemon_client import DaemonClient, Lease
from gcs_prefetchd.shared.epoch_order import Indices, order_digest, plan_order
from gcs_prefetchd.shared.errors import PrefetchdError, ProtocolError
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.messages import Plan

__all__ = ["PlanSender", "Share"]

CHECK_PAUSE_S = 1.0
CONFIRM_PAUSE_S = 10.0
SEND_TIMEOUT_S = 10.0
FIRST_ITEM_WAIT_S = 1.0  # a daemon that is well takes milliseconds; one that is not holds up an epoch no longer than this

log = logging.getLogger("gcs_dataset")


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one rank reads in one epoch, in the terms of `order.plan_order`."""

    kind: str
    seed: int
    epoch: int
    indices: Indices
    rank: int = 0
    world: int = 1
    drop_last: bool = False
    start: int = 0

    def order(self) -> Indices:
        """The indices in the order in which they are read."""
        return plan_order(
            self.kind,
            self.seed,
            self.epoch,
            self.indices,
            rank=self.rank,
            world=self.world,
            drop_last=self.drop_last,
            start=self.start,
        )


class PlanSender:
    """Sends one stream's plans to the daemon of a cache directory. Never raises because of the daemon.

    While it lives it holds the job's lease: once the process has ended, however it did, the daemon counts its streams for
    nothing. A lease that was dropped shows that the daemon is gone or another one: looked at every `check_pause_s` at most,
    which takes microseconds. Every `confirm_pause_s` the daemon is asked whether it still knows the stream. Either way the plan
    is sent again. All that talks to the daemon is done by threads.
    """

    def __init__(
        self,
        cache_dir: Path,
        manifest: Manifest,
        *,
        job: str,
        stream: str,
        check_pause_s: float = CHECK_PAUSE_S,
        confirm_pause_s: float = CONFIRM_PAUSE_S,
    ) -> None:
        self.manifest = manifest
        self._cache_dir = cache_dir
        self._job = job
        self._stream = stream
        self._check_pause_s = check_pause_s
        self._confirm_pause_s = confirm_pause_s
        self._next_check_s = 0.0
        self._next_confirm_s = 0.0
        self._share: Share | None = None
        self._digest = ""
        self._told: Share | None = None  # what the daemon that holds the lease knows
        self._lease: Lease | None = None
        self._under_way: Future[None] | None = None
        self._refused = False

    def go_by(self, manifest: Manifest) -> None:
        """The plans from the next `begin` on are of this manifest; nothing more is told of the one before."""
        self.manifest, self._share, self._refused = manifest, None, False

    def begin(self, share: Share, order: Indices, position: int = 0) -> None:
        """An epoch begins, or goes on at a position: tell it, and wait a second at most until the daemon has it."""
        self._share, self._digest, self._told = share, order_digest(order), None
        self._next_check_s = 0.0
        self.keep_told(position)
        if self._under_way is not None:
            wait([self._under_way], FIRST_ITEM_WAIT_S)

    def keep_told(self, position: int) -> None:
        """See to it that the daemon knows the plan; `position` is how many of its items have been read."""
        now_s = time.monotonic()
        if now_s < self._next_check_s or self._share is None:
            return
        self._next_check_s = now_s + self._check_pause_s
        if self._under_way is not None and not self._under_way.done():
            return
        if self._told is not self._share or self._lease is None or not self._lease.is_held:
            self._next_confirm_s = now_s + self._confirm_pause_s
            self._under_way = in_background(partial(self._send, self.manifest, self._share, self._digest, position))
        elif now_s >= self._next_confirm_s:
            self._next_confirm_s = now_s + self._confirm_pause_s
            self._under_way = in_background(self._confirm)

    def _send(self, manifest: Manifest, share: Share, digest: str, position: int) -> None:
        plan = Plan(
            job=self._job,
            stream=self._stream,
            data_root=manifest.data_root.uri,
            manifest=manifest.digest,
            kind=share.kind,
            seed=share.seed,
            epoch=share.epoch,
            position=position,
            rank=share.rank,
            world=share.world,
            drop_last=int(share.drop_last),
            start=share.start,
            digest=digest,
        )
        client = DaemonClient(self._cache_dir, SEND_TIMEOUT_S)
        try:
            self._lease = _lease_of(self._cache_dir, self._job, client)
            client.send_plan(plan, np.asarray(share.indices, dtype="<u4").tobytes())
        except ProtocolError as exc:
            if not self._refused:
                self._refused = True
                log.warning("daemon of %s: refuses the plan of stream %s: %s", self._cache_dir, self._stream, exc)
        except PrefetchdError:
            return  # the readers say so, the order is the same without it, and the next check tries again
        finally:
            client.close()
        self._told = share

    def _confirm(self) -> None:
        client = DaemonClient(self._cache_dir, SEND_TIMEOUT_S)
        try:
            if self._stream not in client.status().streams and not self._refused:
                self._told = None
        except PrefetchdError:
            pass  # a daemon that is gone drops the lease, too
        finally:
            client.close()


# One lease a job and process, which its senders share: the end of one of them must not end the streams of the others.
_leases: "weakref.WeakValueDictionary[tuple[Path, str], Lease]" = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _lease_of(cache_dir: Path, job: str, client: DaemonClient) -> Lease:
    with _lock:
        lease = _leases.get((cache_dir, job))
        if lease is None or not lease.is_held:
            lease = _leases[cache_dir, job] = client.lease(job)
        return lease


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)
