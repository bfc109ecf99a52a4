"""Tells the daemon what a sampler will yield, and again when the daemon has been restarted."""

import logging
import time
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

from gcs_dataset.background import in_background
from gcs_prefetchd.client import DaemonClient, read_daemon_file
from gcs_prefetchd.errors import DaemonUnavailableError, ProtocolError
from gcs_prefetchd.manifest import Manifest
from gcs_prefetchd.order import Indices, order_digest
from gcs_prefetchd.protocol import Plan, pack

__all__ = ["PlanSender"]

CHECK_PAUSE_S = 1.0
SEND_TIMEOUT_S = 10.0
FIRST_ITEM_WAIT_S = 1.0  # a daemon that is well takes milliseconds; one that is not holds up an epoch no longer than this

log = logging.getLogger("gcs_dataset")


class PlanSender:
    """Sends one stream's plans to the daemon of a cache directory. Never raises because of the daemon.

    Whether the daemon is another one than last time is read from `daemon.json`, at most every `check_pause_s`: that costs
    20 us and waits for nobody. Plans are sent by a thread.
    """

    def __init__(
        self, cache_dir: Path, manifest: Manifest, *, job: str, stream: str, check_pause_s: float = CHECK_PAUSE_S
    ) -> None:
        self._cache_dir = cache_dir
        self._data_root = manifest.data_root.uri
        self._digest = manifest.digest
        self._job = job
        self._stream = stream
        self._check_pause_s = check_pause_s
        self._next_check_s = 0.0
        self._epoch = 0
        self._order: Indices | None = None
        self._told: tuple[int, object] | None = None  # the epoch, and the instance id of the daemon that knows its plan
        self._sending: Future[None] | None = None
        self._refused = False

    def begin(self, epoch: int, order: Indices) -> None:
        """A new epoch begins: tell its order, and wait a second at most until the daemon has it."""
        self._epoch, self._order, self._told = epoch, order, None
        self._next_check_s = 0.0
        self.keep_told(0)
        if self._sending is not None:
            wait([self._sending], FIRST_ITEM_WAIT_S)

    def keep_told(self, position: int) -> None:
        """Tell the plan again where the daemon is a new one; `position` is how many of its items have been read."""
        now_s = time.monotonic()
        if now_s < self._next_check_s or self._order is None:
            return
        self._next_check_s = now_s + self._check_pause_s
        if self._sending is not None and not self._sending.done():
            return
        try:
            instance_id = read_daemon_file(self._cache_dir).get("instance_id")
        except DaemonUnavailableError:
            return
        if (self._epoch, instance_id) != self._told:
            self._sending = in_background(partial(self._send, self._epoch, self._order, position, instance_id))

    def _send(self, epoch: int, order: Indices, position: int, instance_id: object) -> None:
        plan = Plan(
            job=self._job,
            stream=self._stream,
            data_root=self._data_root,
            manifest=self._digest,
            epoch=epoch,
            position=position,
            digest=order_digest(order),
        )
        client = DaemonClient(self._cache_dir, SEND_TIMEOUT_S)
        try:
            client.send_plan(plan, pack(order.tolist()))
        except DaemonUnavailableError:
            return  # the readers say so, the order is the same without it, and the next check tries again
        except ProtocolError as exc:
            if not self._refused:
                self._refused = True
                log.warning("daemon of %s: refuses the plan of stream %s: %s", self._cache_dir, self._stream, exc)
        finally:
            client.close()
        self._told = (epoch, instance_id)
