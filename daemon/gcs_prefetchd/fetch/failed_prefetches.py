"""Prefetches that failed: those that are retried after a while, and those that are only logged."""

import asyncio
import logging
from collections.abc import Callable, Collection

from gcs_prefetchd.fetch.log_throttle import LogThrottle
from gcs_prefetchd.planning.item_refs import ItemRef
from gcs_prefetchd.shared.errors import CredentialsError, PrefetchdError
from gcs_prefetchd.shared.objects import ObjectVersion

__all__ = ["FailedPrefetches"]

log = logging.getLogger(__name__)

LOG_PERIOD_S = 60.0


class FailedPrefetches:
    """Calls `on_retry` with the items of `retry_later`, `retry_after_s` after the first of them. `close` forgets them.

    `are_credentials_refused`: GCS refuses every object until then, so each request would only cost a line in the log.
    """

    def __init__(self, retry_after_s: float, on_retry: Callable[[Collection[ItemRef]], None]) -> None:
        self.are_credentials_refused = False
        self._retry_after_s = retry_after_s
        self._on_retry = on_retry
        self._waiting: set[ItemRef] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._log_throttle = LogThrottle(log, LOG_PERIOD_S)
        self._logged: set[ObjectVersion] = set()  # only those: a bucket can refuse millions

    @property
    def is_waiting(self) -> bool:
        """Whether items wait for their retry."""
        return bool(self._waiting)

    def retry_later(self, item: ItemRef, error: PrefetchdError) -> None:
        """Retry an item that failed because of GCS, the credentials or the disk. Logs one line for all that fail together."""
        self.are_credentials_refused |= isinstance(error, CredentialsError)
        self._waiting.add(item)
        if self._timer is None:
            log.warning("%s; planned again in %g s", error, self._retry_after_s)
            self._timer = asyncio.get_running_loop().call_later(self._retry_after_s, self._retry)

    def log_once(self, kind: str, version: ObjectVersion, line: str) -> None:
        """Log an object that will not be prefetched: each version once, and a kind of failure not too often."""
        if version not in self._logged and self._log_throttle.warn(kind, line):
            self._logged.add(version)

    def close(self) -> None:
        """Cancel the retry, and log what is withheld."""
        if self._timer is not None:
            self._timer.cancel()
        self._log_throttle.close()

    def _retry(self) -> None:
        self._timer = None
        self.are_credentials_refused = False
        items, self._waiting = self._waiting, set()
        self._on_retry(items)
