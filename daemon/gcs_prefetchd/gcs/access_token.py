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
AGAIN_AFTER_FAILURE_S = 10.0
REFUSED_FOR_S = 5.0  # a key that is refused is not tried for each object that is wanted
LONGEST_WORDS = 200
# Shares of a token's life: from the first on it is renewed in passing, from the second on nothing is sent with it.
RENEW_AT = 0.5
TOO_OLD_AT = 0.95


class SharedToken:
    """One refresh at a time, in a task of its own: a request that is cancelled takes it from no other.

    gcloud-aio-auth's own `Token.get` lets every waiter share a task that any of them cancels by being cancelled, and tries five
    times, up to a quarter of a minute, before it says that a key is refused. The owner closes it.

    `token_from_key_file` reads the key file again before each refresh, so that a key can be replaced while the daemon runs. It
    may raise CredentialsError: the previous key stays in use as long as the endpoint accepts it.
    """

    def __init__(self, source: Token, token_from_key_file: Callable[[], Token | None]) -> None:
        self._source = source
        self._token_from_key_file = token_from_key_file
        self._value: str | None = None
        self._refusal = ""
        self._refused_until_s = 0.0
        self._renew_at_s = 0.0
        self._too_old_at_s = 0.0
        self._refreshing: asyncio.Task[str] | None = None

    async def close(self) -> None:
        """End a refresh under way."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)

    async def get(self) -> str:
        """The token; raises UnusableResponseError, with CredentialsError as what is final where the endpoint refuses."""
        now_s = asyncio.get_running_loop().time()
        if self._value is None or now_s >= self._too_old_at_s:
            if self._refusal and now_s < self._refused_until_s:
                raise UnusableResponseError("token", self._refusal, final=CredentialsError)
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
        unread = await self._read_key_again()
        try:
            answer = await self._source.refresh(timeout=REFRESH_TIMEOUT_S)
            lifetime_s = float(answer.expires_in)
            if not _is_plain(answer.value):
                raise ValueError("it is not printable ASCII")
        except (aiohttp.ClientError, OSError, KeyError, ValueError, TypeError, OverflowError) as exc:
            reason, is_final = _judged(exc)
            text = f"no access token: {reason}{unread}"
            self._refusal, self._refused_until_s = text if is_final else "", loop.time() + REFUSED_FOR_S
            raise UnusableResponseError("token", text, final=CredentialsError if is_final else None) from None
        self._value, self._refusal = answer.value, ""
        self._renew_at_s = loop.time() + lifetime_s * RENEW_AT
        self._too_old_at_s = loop.time() + lifetime_s * TOO_OLD_AT
        return answer.value

    async def _read_key_again(self) -> str:
        """Have the key file's present key; returns why the one from before has to do, if it has to."""
        try:
            current = await asyncio.to_thread(self._token_from_key_file)
        except CredentialsError as exc:
            return f"; {exc}"
        if current is not None:
            self._source = current
        return ""

    def _ended(self, task: asyncio.Task[str]) -> None:
        self._refreshing = None
        if not task.cancelled():
            task.exception()  # whoever waits has it; where nobody does, the old token is still good


def _judged(exc: Exception) -> tuple[str, bool]:
    """What a failed refresh means, and whether it is for good."""
    if not isinstance(exc, aiohttp.ClientResponseError) or exc.status < 400:
        return one_line(exc), False
    words = _words(exc.message)
    # Without words a 400 is aiohttp's own, for an answer that is no HTTP.
    is_final = exc.status < 500 and exc.status not in (408, 429) and bool(words or exc.status != 400)
    return f"the token endpoint returned {exc.status}" + (f" ({words})" if words else ""), is_final


def _words(message: str) -> str:
    """An endpoint's own words. Not its body as it is, which may repeat what it was sent, and that is secret."""
    try:
        answer = json.loads(message[message.index("{") :])
        said = [answer.get("error"), answer.get("error_description")]
    except (ValueError, RecursionError):
        return ""
    words = [one.get("message") if isinstance(one, dict) else one for one in said]  # IAM's answers, and OAuth's
    return " ".join(": ".join(one for one in words if isinstance(one, str)).split())[:LONGEST_WORDS]


def _is_plain(token: str) -> bool:
    return bool(token) and token.isascii() and token.isprintable() and " " not in token
