"""Calls that run in a thread of their own, so that whoever waits for them can stop waiting."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["in_background"]

T = TypeVar("T")


def in_background(call: Callable[[], T]) -> "Future[T]":
    """Run the call in a daemon thread of its own (a start takes 50 us); nothing waits for it at exit."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as exc:  # whoever asks for the result gets it
            outcome.set_exception(exc)

    threading.Thread(target=run, name="gcs-dataset-call", daemon=True).start()
    return outcome
