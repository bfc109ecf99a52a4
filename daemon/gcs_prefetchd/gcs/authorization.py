"""What all requests to GCS have in common: they are authorized, counted and reported, and a refused token is discarded."""

from collections.abc import Mapping
from typing import Protocol

from gcs_prefetchd.gcs.counters import RequestCounters
from gcs_prefetchd.gcs.responses import UnusableResponseError, error_for_status
from gcs_prefetchd.gcs.retry import Attempt

__all__ = ["Authorizer", "TokenSource"]


class TokenSource(Protocol):
    """A source of access tokens."""

    async def get(self) -> str:
        """The token. Raises UnusableResponseError if there is none."""

    def discard(self, refused: str) -> None:
        """Discard this token: GCS refused it."""


class Authorizer:
    """Authorizes and counts each request, and converts error statuses. Without a `token` requests are anonymous."""

    def __init__(self, token: TokenSource | None, counters: RequestCounters) -> None:
        self.counters = counters
        self._token = token

    @property
    def is_anonymous(self) -> bool:
        """Whether requests carry no token."""
        return self._token is None

    async def authorize(self, current: Attempt) -> dict[str, str]:
        """The headers that authorize a request of this attempt. Counts the request: the caller sends it now."""
        headers = {}
        if self._token is not None:
            current.awaits_token = True
            headers["Authorization"] = f"Bearer {await self._token.get()}"
            current.awaits_token = False
        self.counters.requests += 1
        if current.observer is not None:
            current.observer.request_sent()
        return headers

    def error_for(
        self, status: int, headers: Mapping[str, str], body: bytes, sent: Mapping[str, str], *, pinned: bool
    ) -> UnusableResponseError:
        """The error for a response with this status to a request with the headers `sent`. A 401 discards the token."""
        if self._token is not None:
            token = sent["Authorization"].removeprefix("Bearer ")
            body = body.replace(token.encode(), b"(token)")  # proxies echo what they received, and the log shows it
            if status == 401:
                self._token.discard(token)
        return error_for_status(status, headers, body, pinned=pinned)
