"""Blocking calls run in threads of their own, and closing waits for those that were started."""

import asyncio
import threading
from pathlib import Path

import pytest

from gcs_prefetchd.cache.io_threads import READ_THREADS, IOThreads, free_bytes
from gcs_prefetchd.shared.errors import CacheWriteError


async def test_the_index_has_one_thread_for_all_calls() -> None:
    io = IOThreads(lambda: None)
    threads = await asyncio.gather(*(io.run_on_index(threading.get_ident) for _ in range(20)))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()
    await io.close()


async def test_as_many_reads_as_there_are_threads_run_together() -> None:
    io = IOThreads(lambda: None)
    together = threading.Barrier(READ_THREADS)
    await asyncio.wait_for(asyncio.gather(*(io.run(together.wait) for _ in range(READ_THREADS))), 20.0)
    await io.close()


async def test_a_hook_runs_before_each_batch_of_file_calls() -> None:
    calls: list[str] = []
    io = IOThreads(before_batch=lambda: calls.append("before"))
    await io.files.submit(lambda: calls.append("call"))
    await io.files.submit(lambda: calls.append("call"))
    assert calls == ["before", "call"] * 2
    await io.close()


async def test_closing_waits_for_calls_that_were_started() -> None:
    io = IOThreads(lambda: None)
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        may_end.wait(20.0)
        ended.set()

    working = asyncio.create_task(io.run(work))
    await io.run(int)  # the other call has started by now
    closing = asyncio.create_task(io.close())
    may_end.set()
    await closing
    assert ended.is_set()
    await working


def test_the_free_space_of_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) > 0
    with pytest.raises(CacheWriteError, match="No such file"):
        free_bytes(tmp_path / "gone")
