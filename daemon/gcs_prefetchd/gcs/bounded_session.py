"""aiohttp sessions for listings and tokens: response bodies use bounded memory, and redirects are refused."""

import asyncio
from typing import Any

import aiohttp

from gcs_prefetchd.gcs.responses import MAX_ERROR_BODY_BYTES

__all__ = ["bounded_response_class", "refuse_redirects"]

MAX_BODY_BYTES = 16 << 20  # a page has at most 1,000 names of 1,024 bytes, and JSON may write each byte as six
TOO_LONG = f"the body exceeds {MAX_BODY_BYTES >> 20} MiB, more than the longest page has"


def bounded_response_class() -> type[aiohttp.ClientResponse]:
    """The class of a session's responses. Their JSON is parsed one at a time, with other work in between.

    A page takes 2 ms, so 20 that arrive together would block the event loop for 40 ms.
    """
    parsing = asyncio.Lock()

    class Response(_BoundedResponse):
        async def json(self, **options: Any) -> Any:
            await self.read()
            async with parsing:
                await asyncio.sleep(0)  # with the lock held, so that responses that arrived together queue up
                try:
                    return await super().json(**options)
                except RecursionError:
                    raise ValueError("nested too deeply") from None

    return Response


def refuse_redirects() -> aiohttp.TraceConfig:
    """Makes a session refuse redirects: GCS sends none, and a proxy's may lead to the listing or token of any server."""

    async def refuse(_: aiohttp.ClientSession, __: object, redirect: aiohttp.TraceRequestRedirectParams) -> None:
        raise aiohttp.ClientPayloadError(f"redirected by a {redirect.response.status}, which GCS never does")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse)
    return trace


class _BoundedResponse(aiohttp.ClientResponse):
    async def read(self) -> bytes:
        """The body, or the first part of an error's. Raises ClientPayloadError if it is longer than any page."""
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
            if len(body) > (MAX_ERROR_BODY_BYTES if is_error else MAX_BODY_BYTES):
                self.close()  # the rest is not worth its bytes
                if not is_error:
                    raise aiohttp.ClientPayloadError(TOO_LONG)
                return bytes(body[:MAX_ERROR_BODY_BYTES])
        self.release()
        return bytes(body)

    def get_encoding(self) -> str:
        """JSON is UTF-8 whatever the header names, which may not even be a charset."""
        return "utf-8"
