"""Answers of GCS and of token endpoints, whose bodies take a bounded room in memory however long they are."""

import asyncio
from typing import Any

import aiohttp

from gcs_prefetchd.gcs.download import LARGEST_ERROR_BODY

__all__ = ["bounded_response_class", "refuse_redirects"]

LARGEST_BODY = 16 << 20  # a page has 1,000 names of 1,024 bytes at most, each of which JSON may write as six
TOO_LONG = f"the body exceeds {LARGEST_BODY >> 20} MiB, more than the longest page has"


def bounded_response_class() -> type[aiohttp.ClientResponse]:
    """What a session makes its answers of. Their JSON is parsed one at a time, and other work in between.

    A page takes 2 ms, and 20 that come together would hold up the event loop for 40.
    """
    turn = asyncio.Lock()

    class InTurn(_Bounded):
        async def json(self, **options: Any) -> Any:
            await self.read()
            async with turn:
                await asyncio.sleep(0)  # holding the turn: those that came together stand in line now
                try:
                    return await super().json(**options)
                except RecursionError:
                    raise ValueError("nested too deeply") from None

    return InTurn


def refuse_redirects() -> aiohttp.TraceConfig:
    """Has a session refuse them: GCS redirects nothing, and a proxy's may lead to anybody's listing or token."""

    async def refuse(_: aiohttp.ClientSession, __: object, redirect: aiohttp.TraceRequestRedirectParams) -> None:
        raise aiohttp.ClientPayloadError(f"redirected by a {redirect.response.status}, which GCS never does")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse)
    return trace


class _Bounded(aiohttp.ClientResponse):
    async def read(self) -> bytes:
        """The body; of an error as much as is worth reading. Raises ClientPayloadError where it is longer than any page."""
        if self._body is None:
            try:
                self._body = await self._read()
            except BaseException:
                self.close()
                raise
        return self._body

    async def _read(self) -> bytes:
        is_error = self.status >= 400
        body = bytearray()
        async for chunk in self.content.iter_any():
            body += chunk
            if len(body) > (LARGEST_ERROR_BODY if is_error else LARGEST_BODY):
                self.close()  # the rest is not worth its bytes
                if not is_error:
                    raise aiohttp.ClientPayloadError(TOO_LONG)
                return bytes(body[:LARGEST_ERROR_BODY])
        self.release()
        return bytes(body)

    def get_encoding(self) -> str:
        """JSON is UTF-8 whatever the header says; some of what a header may say is not even a charset."""
        return "utf-8"
