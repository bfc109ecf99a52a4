"""GCS: lists data roots and downloads objects, each of one generation and checked, or raises an error that names it.

gcloud-aio-storage lists and signs. The downloads go over `connections`, because its own `download` pins no generation and
checks nothing (it returns a truncated body, a flipped byte or a login page without an error), and takes twice the CPU.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Protocol, Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
from gcloud.aio.storage import Storage

from gcs_prefetchd.answers import UnfitAnswerError, answer_error, named_version
from gcs_prefetchd.backoff import delay_s, parse_retry_after
from gcs_prefetchd.bodies import LARGEST_ERROR_BODY, bounded_answers, no_redirects
from gcs_prefetchd.connection import Answer
from gcs_prefetchd.connections import CONNECT_TIMEOUT_S, Connections
from gcs_prefetchd.credentials import Access, key_token, make_token
from gcs_prefetchd.errors import ObjectChangedError, OriginError, OriginUnavailableError
from gcs_prefetchd.manifest import Objects
from gcs_prefetchd.names import ObjectName
from gcs_prefetchd.pages import FIELDS, parse_page, without_folders
from gcs_prefetchd.ranges import Ask, Ranges
from gcs_prefetchd.resume import Received
from gcs_prefetchd.tokens import SharedToken, brief
from gcs_prefetchd.traffic import Traffic
from gcs_prefetchd.tries import Account, Attempt, Try, told
from gcs_prefetchd.versions import ObjectVersion

__all__ = ["Access", "Origin", "Sink"]

PUBLIC_ENDPOINT = "https://storage.googleapis.com"
READ_TIMEOUT_S = 20.0
LIST_TIMEOUT_S = 60.0
LISTED_AT_ONCE = 10  # pages of one listing; of two folders at 30 ms, one core has no time for more
LARGEST_METADATA = 1 << 20  # GCS allows 8 KB of a user's own
LARGEST_WHOLE = 1 << 20  # larger bodies are passed on piece by piece
# Of the deadline silence, a body that drips and a Retry-After take so much at most, so that there is always another try.
TRY_SHARE = 0.5

T = TypeVar("T")


class Sink(Protocol):
    """Where a download goes."""

    async def begin(self, version: ObjectVersion) -> None:
        """An attempt starts at byte 0: forget what was written before."""

    async def write(self, chunk: bytes) -> None:
        """The next bytes."""


class Origin:
    """GCS, for as long as the context is entered. Leaving it closes its connections.

    `connections` bounds how many requests are open at a time; `deadline_s` bounds one object or one page, all its tries
    included, `read_timeout_s` how long a try may wait for the next byte. `page_account` is awaited before each page of a
    listing. What it sends, receives and fails at is counted in `traffic`.
    """

    def __init__(
        self,
        access: Access,
        *,
        connections: int = 128,
        deadline_s: float = 60.0,
        read_timeout_s: float = READ_TIMEOUT_S,
        page_account: Callable[[], Awaitable[Account]] | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.traffic = traffic or Traffic()
        self._access = access
        self._most_connections = connections
        self._deadline_s = deadline_s
        self._read_timeout_s = min(read_timeout_s, deadline_s * TRY_SHARE)
        self._page_account = page_account
        self._root = access.endpoint or PUBLIC_ENDPOINT
        self._path = urlsplit(self._root).path.rstrip("/")
        self._payer = f"?{urlencode({'userProject': access.user_project})}" if access.user_project else ""
        self._closing = AsyncExitStack()
        self._connections: Connections
        self._storage: Storage
        self._token: SharedToken | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            # The timeouts are per socket operation; the whole is bounded by a deadline that covers every try.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=self._read_timeout_s)
            connector = aiohttp.TCPConnector(limit=self._most_connections, ttl_dns_cache=300)
            session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    connector=connector,
                    timeout=timeout,
                    # Identity, for an answer that unpacks to any length could not be bounded.
                    auto_decompress=False,
                    headers={"Accept-Encoding": "identity"},
                    response_class=bounded_answers(),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    trace_configs=[no_redirects()],
                )
            )
            self._connections = Connections(self._root, self._most_connections, self._read_timeout_s)
            stack.push_async_callback(self._connections.close)
            source = await make_token(self._access, session)
            if source is not None:
                self._token = SharedToken(source, partial(key_token, self._access, session))
                stack.push_async_callback(self._token.close)
            self._storage = Storage(
                session=session,  # type: ignore[arg-type]  # the library types it for requests and aiohttp alike
                # Where it gets none it makes one of whatever key the environment names, which may not even exist.
                token=self._token or _NO_TOKEN,  # type: ignore[arg-type]  # it calls nothing but `get`
                api_root=self._root,
                api_is_dev=self._token is None,
            )
            self._closing = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._closing.aclose()

    async def list(self, bucket: str, prefix: str) -> AsyncGenerator[Objects, None]:
        """Every object below the prefix, a page (at most 1,000) at a time and in no order; folder placeholders are left out.

        Several pages are asked for at a time, in ranges of names that the first pages suggest. Leave it early through
        `contextlib.aclosing`, which ends the requests under way.
        """
        what, ranges = f"list gs://{bucket}/{prefix}", Ranges(prefix)
        asked: dict[asyncio.Task[tuple[Objects, str]], Ask] = {}
        try:
            while True:
                for ask in ranges.asks(min(LISTED_AT_ONCE, self._most_connections) - len(asked)):
                    page = self._asked_page(what, partial(self._page, bucket, prefix, ask))
                    asked[asyncio.create_task(page)] = ask
                if not asked:
                    return
                done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield self._new(what, ranges, asked.pop(task), *task.result())
                    await asyncio.sleep(0)  # pages come in bursts, and each takes a millisecond or two
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _asked_page(self, what: str, attempt: Attempt[tuple[Objects, str]]) -> tuple[Objects, str]:
        account = await self._page_account() if self._page_account is not None else None  # what that takes has no deadline
        return await self._retrying(what, attempt, account)

    def _new(self, what: str, ranges: Ranges, ask: Ask, objects: Objects, token: str) -> Objects:
        try:
            return without_folders(objects[ranges.take(ask, objects.names, token)])
        except UnfitAnswerError as exc:
            self.traffic.errors[exc.kind] += 1
            raise (exc.final or OriginError)(f"{what}: {exc}") from None

    async def read(self, name: ObjectName, version: ObjectVersion | None = None) -> tuple[ObjectVersion, bytes]:
        """The object's stored bytes and their version, checked; `version` pins one, as `download` says."""
        sink = _Memory()
        version = await self.download(name, version, sink)
        return version, b"".join(sink.chunks)

    async def download(
        self, name: ObjectName, version: ObjectVersion | None, sink: Sink, account: Account | None = None
    ) -> ObjectVersion:
        """Bring the object's stored bytes into the sink and return what they were checked to be.

        With a `version` it is that generation, size and crc32c or an error (ObjectChangedError where the bucket no longer has
        it); without one it is the live generation, whose size and hash the answer must name.
        """
        self.traffic.in_flight += 1
        try:
            attempt = partial(self._attempt, name, version, sink, Received())
            return await self._retrying(f"fetch {name.uri}", attempt, account)
        finally:
            self.traffic.in_flight -= 1

    async def _retrying(self, what: str, attempt: Attempt[T], account: Account | None) -> T:
        tries, renewed, last = 0, False, ""
        current: Try | None = None
        try:
            async with asyncio.timeout(self._deadline_s):
                while True:
                    tries, current = tries + 1, Try(account, slow_after_s=self._deadline_s * TRY_SHARE)
                    try:
                        return await told(attempt, current)
                    except UnfitAnswerError as exc:
                        self.traffic.errors[exc.kind] += 1
                        last, wait_s = str(exc), exc.retry_after_s
                        if exc.kind == "401" and self._token is not None and not renewed:
                            renewed = True  # the token was refused and forgotten: the next try asks for another
                        elif exc.final is not None:
                            raise exc.final(f"{what}: {last}") from None
                    except (aiohttp.ClientError, TimeoutError, OSError) as exc:
                        self.traffic.errors[_kind_of(exc)] += 1
                        last, wait_s = brief(exc), None
                    current = None
                    await asyncio.sleep(delay_s(tries, wait_s, self._deadline_s * TRY_SHARE))
        except TimeoutError:
            self.traffic.errors["deadline"] += 1
            causes = [last] if current is None else [str(current), *([f"before that {last}"] if last else [])]
            raise OriginUnavailableError(
                f"{what}: gave up after {self._deadline_s:g} s and {tries} {'try' if tries == 1 else 'tries'}; "
                f"last: {', '.join(causes)}"
            ) from None

    async def _attempt(
        self, name: ObjectName, version: ObjectVersion | None, sink: Sink, received: Received, current: Try
    ) -> ObjectVersion:
        if (started := received.started()) is not None:
            return await self._attempt_rest(started, sink, received, current)
        target = self._bytes_of(name, version.generation if version else None)
        headers = await self._authorization(current)
        self._count_request(current)
        async with self._connections.get(target, headers) as answer:
            await self._check_status(answer, headers, pinned=version is not None)
            expected = _expected(version, named_version(name, answer.headers))
            if expected is not None:
                await sink.begin(expected)
                received.begin(expected)
                return await self._receive(answer, expected, sink, received, current)
        # Left before the metadata is asked for: with every connection held by a download that asks, all would wait.
        return await self._attempt_described(name, sink, received, current)

    async def _attempt_rest(self, started: ObjectVersion, sink: Sink, received: Received, current: Try) -> ObjectVersion:
        """Bring what is missing of a download that broke off.

        Any other answer than that has the next try begin at byte 0, which finds out what it means; unless it may pass.
        """
        target = self._bytes_of(started.name, started.generation)
        headers = await self._authorization(current)
        self._count_request(current)
        asked = headers | {"Range": f"bytes={received.bytes}-"}
        async with self._connections.get(target, asked) as answer:
            if answer.status == 206 and received.is_followed_by(answer.headers):
                return await self._receive(answer, started, sink, received, current)
            if answer.status == 401:  # the token ran out meanwhile: with another one it goes on
                await self._check_status(answer, headers, pinned=True)
            text = f"GCS says {answer.status} where the bytes from {received.bytes} on were asked for"
            if answer.status < 500 and answer.status not in (408, 429):
                received.begin(None)
            wait_s = parse_retry_after(answer.headers.get("Retry-After"))
            raise UnfitAnswerError(str(answer.status), text, retry_after_s=wait_s)

    async def _attempt_described(self, name: ObjectName, sink: Sink, received: Received, current: Try) -> ObjectVersion:
        """Bring the generation that the metadata names, for an answer that named no hash or no generation."""
        described = await self._describe(name, current)
        try:
            return await self._attempt(name, described, sink, received, current)
        except UnfitAnswerError as exc:
            if exc.final is ObjectChangedError:
                raise UnfitAnswerError("generation", "replaced while it was being read") from None
            raise

    async def _receive(
        self, answer: Answer, expected: ObjectVersion, sink: Sink, received: Received, current: Try
    ) -> ObjectVersion:
        current.size_bytes, current.before_bytes = expected.size, received.bytes
        left_bytes = expected.size - received.bytes
        is_small = left_bytes <= LARGEST_WHOLE and answer.headers.get("Content-Length") == str(left_bytes)
        try:
            while pieces := await answer.pieces(together=is_small):
                for piece in pieces:
                    received.add(piece)
                    await sink.write(piece)
                current.received_bytes = answer.received_bytes
                current.check_pace()
        finally:
            current.received_bytes = answer.received_bytes
            self.traffic.received_bytes += answer.received_bytes
        return received.whole()

    async def _describe(self, name: ObjectName, current: Try) -> ObjectVersion:
        headers = await self._authorization(current)
        self._count_request(current)
        async with self._connections.get(self._about(name), headers) as answer:
            await self._check_status(answer, headers, pinned=False)
            try:
                described = json.loads(await answer.first(LARGEST_METADATA))
            except (ValueError, RecursionError):
                raise UnfitAnswerError("metadata", "its metadata is not JSON") from None
            return next(parse_page({"items": [described]})[0].versions(name.bucket))

    async def _page(self, bucket: str, prefix: str, ask: Ask, current: Try) -> tuple[Objects, str]:
        payer = {"userProject": self._access.user_project} if self._access.user_project else {}
        bounds = {"startOffset": ask.start, "endOffset": ask.end, "pageToken": ask.token}
        params = {"prefix": prefix, "fields": FIELDS} | payer | {key: value for key, value in bounds.items() if value}
        headers = await self._authorization(current)
        self._count_request(current)
        try:
            page = await self._storage.list_objects(
                bucket,
                params=params,
                timeout=LIST_TIMEOUT_S,  # type: ignore[arg-type]  # typed int, used as aiohttp's
            )
        except aiohttp.ClientResponseError as exc:
            if exc.status == 400 and "{" not in exc.message:
                raise  # aiohttp's own word for an answer that is no HTTP
            body = exc.message.partition(": ")[2].encode()
            raise self._refusal(exc.status, exc.headers or {}, body, headers, pinned=False) from None
        except aiohttp.ClientError:
            raise  # before ValueError, of which a certificate that is refused is one
        except (ValueError, RecursionError):
            raise UnfitAnswerError("listing", "the page is not JSON") from None
        return parse_page(page)

    async def _check_status(self, answer: Answer, sent: Mapping[str, str], *, pinned: bool) -> None:
        if answer.status != 200:
            body = await answer.first(LARGEST_ERROR_BODY)  # the rest of a large error is not worth its bytes
            raise self._refusal(answer.status, answer.headers, body, sent, pinned=pinned)

    def _refusal(
        self, status: int, headers: Mapping[str, str], body: bytes, sent: Mapping[str, str], *, pinned: bool
    ) -> UnfitAnswerError:
        if self._token is not None:
            token = sent["Authorization"].removeprefix("Bearer ")
            body = body.replace(token.encode(), b"(token)")  # proxies repeat what they were sent, and the log shows it
            if status == 401:
                self._token.forget(token)
        return answer_error(status, headers, body, pinned=pinned)

    def _count_request(self, current: Try) -> None:
        self.traffic.requests += 1
        if current.account is not None:
            current.account.sent()

    async def _authorization(self, current: Try) -> dict[str, str]:
        if self._token is None:
            return {}
        current.awaits_token = True
        token = await self._token.get()
        current.awaits_token = False
        return {"Authorization": f"Bearer {token}"}

    def _bytes_of(self, name: ObjectName, generation: int | None) -> str:
        """Where the bytes of an object are, of this generation or of the live one."""
        pinned = "" if generation is None else f"&generation={generation}"
        return f"{self._about(name)}{'&' if self._payer else '?'}alt=media{pinned}"

    def _about(self, name: ObjectName) -> str:
        """Where its metadata are."""
        return f"{self._path}/storage/v1/b/{name.bucket}/o/{quote(name.name, safe='')}{self._payer}"


# Never asked: api_is_dev sends no authorization.
_NO_TOKEN = object()


class _Memory:
    """A sink that keeps the bytes."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    async def begin(self, version: ObjectVersion) -> None:
        self.chunks.clear()

    async def write(self, chunk: bytes) -> None:
        self.chunks.append(chunk)


def _expected(wanted: ObjectVersion | None, named: ObjectVersion | None) -> ObjectVersion | None:
    """What the body must turn out to be: what was asked for, completed by what the answer says it is."""
    if wanted is None or named is None:
        return wanted or named
    if named.generation != wanted.generation:
        raise UnfitAnswerError("generation", f"generation {named.generation} came for {wanted.generation}")
    return wanted if wanted.crc32c is not None else replace(wanted, crc32c=named.crc32c)


def _kind_of(exc: BaseException) -> str:
    return "timeout" if isinstance(exc, TimeoutError) else "connection"
