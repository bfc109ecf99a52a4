"""Retries: the back-off delay, the deadline, and the Retry-After of GCS."""

import asyncio

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gcs_prefetchd.gcs.client import GCSClient
from gcs_prefetchd.gcs.retry import FIRST_DELAY_S, MAX_DELAY_S, backoff_delay_s
from gcs_prefetchd.shared.errors import OriginUnavailableError
from gcs_prefetchd.testing import Cut, Drip, Fault, FlippedByte, GCSServer, Stall, Status
from support.gcs_clients import DATA, NAME, make_client, put


@pytest.mark.parametrize(
    ("attempt", "jitter", "delay_s"),
    [
        (1, 0.0, 0.0),
        (1, 0.5, 0.1),
        (2, 0.5, 0.2),
        (3, 0.5, 0.4),
        (6, 0.5, 3.2),
        (7, 0.5, 5.0),
        (50, 0.5, 5.0),
        (5000, 0.5, 5.0),
    ],
)
def test_the_delay_doubles_up_to_a_bound(attempt: int, jitter: float, delay_s: float) -> None:
    assert backoff_delay_s(attempt, jitter=jitter) == pytest.approx(delay_s)


@given(st.integers(1, 10**6))
@example(1024)
def test_the_delay_is_spread_over_the_full_range(attempt: int) -> None:
    """Full jitter: readers that failed together do not retry together."""
    delays_s = [backoff_delay_s(attempt) for _ in range(200)]
    longest_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(attempt, 30))
    assert 0 <= min(delays_s) < 0.2 * longest_s
    assert 0.8 * longest_s < max(delays_s) <= longest_s


@given(st.integers(1, 100), st.floats(0, 60), st.floats(0, 1, exclude_max=True))
def test_the_delay_is_never_shorter_than_the_retry_after(attempt: int, retry_after_s: float, jitter: float) -> None:
    assert backoff_delay_s(attempt, retry_after_s, 60, jitter) == max(retry_after_s, backoff_delay_s(attempt, jitter=jitter))


@pytest.mark.parametrize("retry_after_s", [31.0, 3600.0, 1e12, float("inf")])
def test_a_retry_after_of_hours_is_cut_to_the_given_maximum(retry_after_s: float) -> None:
    assert backoff_delay_s(1, retry_after_s, 30.0) == 30.0


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Status(503), "GCS returned 503"),
        (FlippedByte(), "crc32c .*, expected "),
        (Cut(100), "the connection was lost after 100 bytes of a body"),
        (Stall(None), "no response|Timeout"),
        (Drip(1, 0.05), "of 5120 bytes received"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_after_lasting_faults_the_error_at_the_deadline_names_the_cause(gcs: GCSServer, fault: Fault, cause: str) -> None:
    version = put(gcs)
    gcs.faults.add(fault)
    async with make_client(gcs, deadline_s=0.5) as client:
        started_s = asyncio.get_running_loop().time()
        with pytest.raises(OriginUnavailableError, match=f"fetch {NAME.uri}: gave up after 0.5 s .*; last: .*({cause})"):
            await client.read(NAME, version)
        assert 0.5 <= asyncio.get_running_loop().time() - started_s < 3.0
        assert client.counters.errors["deadline"] == 1
        assert client.counters.in_flight == 0


async def test_a_server_that_is_gone_is_an_error_at_the_deadline() -> None:
    async with GCSServer() as gone:
        client = make_client(gone, deadline_s=0.3)
    async with client:
        with pytest.raises(OriginUnavailableError, match=f"fetch {NAME.uri}: .*no connection to 127.0.0.1:[0-9]+: "):
            await client.read(NAME)
    assert client.counters.errors["connection"] >= 1


async def test_the_next_attempt_waits_for_the_retry_after_of_gcs(gcs: GCSServer, client: GCSClient) -> None:
    version = put(gcs)
    gcs.faults.add(Status(429, retry_after="1"), requests=1)
    started_s = asyncio.get_running_loop().time()
    assert await client.read(NAME, version) == (version, DATA)
    assert 1.0 <= asyncio.get_running_loop().time() - started_s < 5.0


async def test_a_retry_after_of_thirty_years_leaves_time_for_another_attempt(gcs: GCSServer) -> None:
    version = put(gcs)
    gcs.faults.add(Status(503, retry_after="1000000000"), requests=1)
    async with make_client(gcs, deadline_s=2.0) as client:
        assert await client.read(NAME, version) == (version, DATA)


async def test_a_retry_after_of_thirty_years_does_not_outlast_the_deadline(gcs: GCSServer) -> None:
    put(gcs)
    gcs.faults.add(Status(503, retry_after="1000000000"))
    async with make_client(gcs, deadline_s=0.3) as client:
        with pytest.raises(OriginUnavailableError, match=r"gave up after 0\.3 s and [12] attempts?; last: GCS returned 503"):
            await client.read(NAME)
