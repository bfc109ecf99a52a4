"""Prefetches that failed: which are retried, and what is logged."""

import asyncio
import logging
from collections.abc import Collection

import pytest

from gcs_prefetchd.fetch.failed_prefetches import FailedPrefetches
from gcs_prefetchd.planning.item_refs import ItemRef
from gcs_prefetchd.shared.errors import CacheWriteError, CredentialsError, OriginUnavailableError
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

SOON_S, NEVER_S = 0.05, 3600.0
FIRST, SECOND = ItemRef("gs://b/train", 1), ItemRef("gs://b/train", 2)


class Retries:
    """The items of every retry."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[set[ItemRef]] = asyncio.Queue()

    def __call__(self, items: Collection[ItemRef]) -> None:
        self.items.put_nowait(set(items))


def version_of(number: int) -> ObjectVersion:
    return ObjectVersion(ObjectName("b", f"train/images/{number}.jpg"), 1, 1, 1)


async def test_items_that_fail_together_are_retried_together_and_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    retries = Retries()
    failed = FailedPrefetches(SOON_S, retries)
    failed.retry_later(FIRST, OriginUnavailableError("fetch gs://b/1: 503"))
    failed.retry_later(SECOND, CacheWriteError("cache gs://b/2: No space left on device"))
    assert failed.is_waiting
    assert await retries.items.get() == {FIRST, SECOND}
    assert not failed.is_waiting
    assert caplog.messages == ["fetch gs://b/1: 503; planned again in 0.05 s"]
    failed.close()


async def test_an_item_that_fails_again_is_retried_again() -> None:
    retries = Retries()
    failed = FailedPrefetches(SOON_S, retries)
    for _ in range(2):
        failed.retry_later(FIRST, OriginUnavailableError("fetch gs://b/1: 503"))
        assert await retries.items.get() == {FIRST}
    failed.close()


async def test_refused_credentials_are_remembered_until_the_retry() -> None:
    retries = Retries()
    failed = FailedPrefetches(SOON_S, retries)
    failed.retry_later(FIRST, OriginUnavailableError("fetch gs://b/1: 503"))
    assert not failed.are_credentials_refused
    failed.retry_later(SECOND, CredentialsError("fetch gs://b/2: 403"))
    assert failed.are_credentials_refused
    await retries.items.get()
    assert not failed.are_credentials_refused
    failed.close()


async def test_each_version_is_logged_once_and_many_of_a_kind_are_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    failed = FailedPrefetches(NEVER_S, Retries())
    for number in (1, 1, 2, 3):
        failed.log_once("ObjectMissingError", version_of(number), f"fetch {number}: 404")
    failed.log_once("too large", version_of(4), "4: too large")
    assert caplog.messages == ["fetch 1: 404", "4: too large"]
    failed.close()
    assert caplog.messages[2:] == ["fetch 3: 404; 1 more like it since the line before"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


async def test_after_close_nothing_is_retried() -> None:
    retries = Retries()
    failed = FailedPrefetches(0.0, retries)
    failed.retry_later(FIRST, OriginUnavailableError("fetch gs://b/1: 503"))
    failed.close()
    over = asyncio.Event()
    asyncio.get_running_loop().call_later(SOON_S, over.set)
    await over.wait()
    assert retries.items.empty()
