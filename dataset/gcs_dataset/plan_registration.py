"""Sends the daemon what a sampler will yield, and sends it again after the daemon was restarted or has forgotten it."""

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

from gcs_dataset.background_call import call_in_background
from gcs_prefetchd.shared.daemon_client import DaemonClient, Lease
from gcs_prefetchd.shared.epoch_order import Indices, order_digest, plan_order
from gcs_prefetchd.shared.errors import PrefetchdError, ProtocolError
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.messages import Plan

__all__ = ["PlanSender", "Share"]

CHECK_PAUSE_S = 1.0
CONFIRM_PAUSE_S = 10.0
SEND_TIMEOUT_S = 10.0
FIRST_ITEM_WAIT_S = 1.0  # a healthy daemon needs milliseconds; any other delays an epoch by this at most

log = logging.getLogger("gcs_dataset")


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one rank reads in one epoch, in the terms of `epoch_order.plan_order`."""

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

    While it lives it holds the job's lease: after the process has stopped, for whatever reason, the daemon ignores its streams.
    A lost lease shows that the daemon has stopped or was replaced: this is checked every `check_pause_s` at most, which takes
    microseconds. Every `confirm_pause_s` a request finds out whether the daemon still knows the stream. In either case the plan
    is sent again. Threads of their own send all requests to the daemon.
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
        self._sent_share: Share | None = None  # known to the daemon that holds the lease
        self._lease: Lease | None = None
        self._request: Future[None] | None = None
        self._is_rejected = False

    def use_manifest(self, manifest: Manifest) -> None:
        """Use this manifest for the plans from the next `start_plan` on; nothing more is sent about the one before."""
        self.manifest, self._share, self._is_rejected = manifest, None, False

    def start_plan(self, share: Share, order: Indices, position: int = 0) -> None:
        """Send the plan of an epoch that starts or continues at `position`; wait a second at most until the daemon has it."""
        self._share, self._digest, self._sent_share = share, order_digest(order), None
        self._next_check_s = 0.0
        self.ensure_sent(position)
        if self._request is not None:
            wait([self._request], FIRST_ITEM_WAIT_S)

    def ensure_sent(self, position: int) -> None:
        """Send the plan again if the daemon does not know it; `position` is how many of its items have been read."""
        now_s = time.monotonic()
        if now_s < self._next_check_s or self._share is None:
            return
        self._next_check_s = now_s + self._check_pause_s
        if self._request is not None and not self._request.done():
            return
        if self._sent_share is not self._share or self._lease is None or not self._lease.is_held:
            self._next_confirm_s = now_s + self._confirm_pause_s
            self._request = call_in_background(partial(self._send, self.manifest, self._share, self._digest, position))
        elif now_s >= self._next_confirm_s:
            self._next_confirm_s = now_s + self._confirm_pause_s
            self._request = call_in_background(self._confirm)

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
            self._lease = _shared_lease(self._cache_dir, self._job, client)
            client.send_plan(plan, np.asarray(share.indices, dtype="<u4").tobytes())
        except ProtocolError as exc:
            if not self._is_rejected:
                self._is_rejected = True
                log.warning("daemon of %s: rejected the plan of stream %s: %s", self._cache_dir, self._stream, exc)
        except PrefetchdError:
            return  # the readers log it, the order is the same without a daemon, and the next check sends it again
        finally:
            client.close()
        self._sent_share = share

    def _confirm(self) -> None:
        client = DaemonClient(self._cache_dir, SEND_TIMEOUT_S)
        try:
            if self._stream not in client.status().streams and not self._is_rejected:
                self._sent_share = None
        except PrefetchdError:
            pass  # a daemon that has stopped has lost the lease, too
        finally:
            client.close()


# One lease per job and process, shared by its senders: closing one of them must not end the streams of the others.
_leases: "weakref.WeakValueDictionary[tuple[Path, str], Lease]" = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _shared_lease(cache_dir: Path, job: str, client: DaemonClient) -> Lease:
    with _lock:
        lease = _leases.get((cache_dir, job))
        if lease is None or not lease.is_held:
            lease = _leases[cache_dir, job] = client.lease(job)
        return lease


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)
