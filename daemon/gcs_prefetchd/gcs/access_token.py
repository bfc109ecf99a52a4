"""The access token that all requests share."""

import asyncio
import json
from collections.abc import Callable

import aiohttp
from gcloud.aio.auth import Token

from gcs_prefetchd.gcs.responses import UnusableResponseError, one_line
from gcs_prefetchd.shared.errors import CredentialsError

__all__ = ["SharedToken"]

REFRESH_TIMEOUT_S = 10
RETRY_AFTER_FAILURE_S = 10.0
REFUSAL_LIFETIME_S = 5.0  # so that a refused key is not sent again for every object
MAX_MESSAGE_LENGTH = 200
# Shares of a token's lifetime: after the first it is refreshed in the background, after the second it is no longer used.
REFRESH_SHARE = 0.5
EXPIRY_SHARE = 0.95


class SharedToken:
    """Refreshes one at a time, in a task of its own, so that a cancelled request does not cancel it for the others.

    With gcloud-aio-auth's own `Token.get` any cancelled waiter cancels the task that all share, and it makes five attempts, up
    to a quarter of a minute, before it reports a refused key. The owner closes it.

    `token_from_key_file` reads the key file again before each refresh, so that a key can be replaced while the daemon runs. It
    may raise CredentialsError: the previous key stays in use as long as the endpoint accepts it.
    """

    def __init__(self, source: Token, token_from_key_file: Callable[[], Token | None]) -> None:
        self._source = source
        self._token_from_key_file = token_from_key_file
        self._token: str | None = None
        self._refusal = ""
        self._refused_until_s = 0.0
        self._refresh_at_s = 0.0
        self._expires_at_s = 0.0
        self._refreshing: asyncio.Task[str] | None = None

    async def close(self) -> None:
        """Cancel a refresh in progress."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)

    async def get(self) -> str:
        """The token. Raises UnusableResponseError, whose `final` is CredentialsError if the endpoint refused the key."""
        now_s = asyncio.get_running_loop().time()
        if self._token is None or now_s >= self._expires_at_s:
            if self._refusal and now_s < self._refused_until_s:
                raise UnusableResponseError("token", self._refusal, final=CredentialsError)
            return await asyncio.shield(self._refresh())
        if now_s >= self._refresh_at_s:
            self._refresh()
        return self._token

    def discard(self, refused: str) -> None:
        """GCS refused this token: the next `get` refreshes. A newer token, requested after another refusal, is kept."""
        if self._token == refused:
            self._token = None

    def _refresh(self) -> asyncio.Task[str]:
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._request(), name="access token")
            self._refreshing.add_done_callback(self._refreshed)
        return self._refreshing

    async def _request(self) -> str:
        loop = asyncio.get_running_loop()
        self._refresh_at_s = loop.time() + RETRY_AFTER_FAILURE_S
        key_error = await self._reload_key()
        try:
            response = await self._source.refresh(timeout=REFRESH_TIMEOUT_S)
            lifetime_s = float(response.expires_in)
            if not _is_printable(response.value):
                raise ValueError("it is not printable ASCII")
        except (aiohttp.ClientError, OSError, KeyError, ValueError, TypeError, OverflowError) as exc:
            reason, is_final = _reason(exc)
            text = f"no access token: {reason}{key_error}"
            self._refusal, self._refused_until_s = text if is_final else "", loop.time() + REFUSAL_LIFETIME_S
            raise UnusableResponseError("token", text, final=CredentialsError if is_final else None) from None
        self._token, self._refusal = response.value, ""
        self._refresh_at_s = loop.time() + lifetime_s * REFRESH_SHARE
        self._expires_at_s = loop.time() + lifetime_s * EXPIRY_SHARE
        return response.value

    async def _reload_key(self) -> str:
        """Use the key file's present key. Returns the error, if there is one, for which the previous key stays in use."""
        try:
            current = await asyncio.to_thread(self._token_from_key_file)
        except CredentialsError as exc:
            return f"; {exc}"
        if current is not None:
            self._source = current
        return ""

    def _refreshed(self, task: asyncio.Task[str]) -> None:
        self._refreshing = None
        if not task.cancelled():
            task.exception()  # waiters receive it; without waiters the old token is still valid


def _reason(exc: Exception) -> tuple[str, bool]:
    """Why a refresh failed, and whether that is final."""
    if not isinstance(exc, aiohttp.ClientResponseError) or exc.status < 400:
        return one_line(exc), False
    details = _details(exc.message)
    # Without details a 400 is aiohttp's own, for a response that is not valid HTTP.
    is_final = exc.status < 500 and exc.status not in (408, 429) and bool(details or exc.status != 400)
    return f"the token endpoint returned {exc.status}" + (f" ({details})" if details else ""), is_final


def _details(message: str) -> str:
    """The endpoint's own error message. Never the complete body, which may repeat the request, and that is secret."""
    try:
        body = json.loads(message[message.index("{") :])
        fields = [body.get("error"), body.get("error_description")]
    except (ValueError, RecursionError):
        return ""
    texts = [field.get("message") if isinstance(field, dict) else field for field in fields]  # IAM's form, and OAuth's
    return " ".join(": ".join(text for text in texts if isinstance(text, str)).split())[:MAX_MESSAGE_LENGTH]


def _is_printable(token: str) -> bool:
    return bool(token) and token.isascii() and token.isprintable() and " " not in token
