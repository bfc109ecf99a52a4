"""The access token that all requests share."""

import asyncio

import aiohttp
from gcloud.aio.auth import Token

from gcs_prefetchd.answers import UnfitAnswerError
from gcs_prefetchd.errors import CredentialsError

__all__ = ["SharedToken", "brief"]

REFRESH_TIMEOUT_S = 10
AGAIN_AFTER_FAILURE_S = 10.0
# Shares of a token's life: from the first on it is renewed in passing, from the second on nothing is sent with it.
RENEW_AT = 0.5
TOO_OLD_AT = 0.95


class SharedToken:
    """One refresh at a time, in a task of its own: a request that is cancelled takes it from no other.

    gcloud-aio-auth's own `Token.get` lets every waiter share a task that any of them cancels by being cancelled, and tries five
    times, up to a quarter of a minute, before it says that a key is refused. The owner closes it.
    """

    def __init__(self, source: Token) -> None:
        self._source = source
        self._value: str | None = None
        self._renew_at_s = 0.0
        self._too_old_at_s = 0.0
        self._refreshing: asyncio.Task[str] | None = None

    async def close(self) -> None:
        """End a refresh under way."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)

    async def get(self) -> str:
        """The token; raises UnfitAnswerError, with CredentialsError as what is final where the endpoint refuses."""
        now_s = asyncio.get_running_loop().time()
        if self._value is None or now_s >= self._too_old_at_s:
            return await asyncio.shield(self._refresh())
        if now_s >= self._renew_at_s:
            self._refresh()
        return self._value

    def forget(self, refused: str) -> None:
        """GCS refused this token: the next `get` brings another. A newer one, which another refusal brought, stays."""
        if self._value == refused:
            self._value = None

    def _refresh(self) -> asyncio.Task[str]:
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._ask(), name="access token")
            self._refreshing.add_done_callback(self._ended)
        return self._refreshing

    async def _ask(self) -> str:
        loop = asyncio.get_running_loop()
        self._renew_at_s = loop.time() + AGAIN_AFTER_FAILURE_S
        try:
            answer = await self._source.refresh(timeout=REFRESH_TIMEOUT_S)
        except aiohttp.ClientResponseError as exc:
            final = CredentialsError if 400 <= exc.status < 500 and exc.status not in (408, 429) else None
            raise UnfitAnswerError("token", f"no access token: {brief(exc)}", final=final) from None
        except (aiohttp.ClientError, OSError, KeyError, ValueError, TypeError) as exc:
            raise UnfitAnswerError("token", f"no access token: {brief(exc)}") from None
        self._value = answer.value
        self._renew_at_s = loop.time() + answer.expires_in * RENEW_AT
        self._too_old_at_s = loop.time() + answer.expires_in * TOO_OLD_AT
        return answer.value

    def _ended(self, task: asyncio.Task[str]) -> None:
        self._refreshing = None
        if not task.cancelled():
            task.exception()  # whoever waits has it; where nobody does, the old token is still good


def brief(exc: BaseException) -> str:
    """An error of another library in a line; its own text may hold a body of megabytes, or nothing."""
    text = " ".join(str(exc)[:300].split())
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
