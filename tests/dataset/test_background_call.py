"""Calls in threads of their own: their results, their errors, and callers that stop waiting."""

import threading
from concurrent.futures import wait

import pytest

from gcs_dataset.background_call import call_in_background
from gcs_prefetchd.shared.errors import ItemError


def test_the_result_is_that_of_the_call() -> None:
    assert call_in_background(lambda: threading.current_thread()).result(20) is not threading.current_thread()


def test_an_error_is_raised_where_the_result_is_read() -> None:
    def fail() -> None:
        raise ItemError("x: is not an image")

    with pytest.raises(ItemError, match="x: is not an image"):
        call_in_background(fail).result(20)


def test_a_caller_can_stop_waiting_and_the_thread_does_not_delay_an_exit() -> None:
    is_over = threading.Event()
    call = call_in_background(lambda: (is_over.wait(20), threading.current_thread().daemon))
    assert not wait([call], 0.01).done
    is_over.set()
    assert call.result(20) == (True, True)
