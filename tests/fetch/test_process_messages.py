"""The messages between the daemon and its fetch processes, and their encoding."""

import dataclasses
import itertools
from typing import get_args

import pytest

from gcs_prefetchd.fetch import process_messages
from gcs_prefetchd.fetch.process_messages import (
    AttemptEnded,
    BytesWritten,
    CancelDownload,
    DownloadCancelled,
    DownloadFailed,
    DownloadPublished,
    ErrorsCounted,
    Message,
    ProcessOptions,
    ProcessReady,
    StartDownload,
    TokenGranted,
    TokenRefused,
    TokenRequest,
    TokenUnavailable,
    decode,
    encode,
)

EXAMPLES: list[Message] = [
    ProcessOptions("/cache", "https://storage.googleapis.com", False, "payer", 64, 30.5),
    ProcessOptions("/cache", "http://127.0.0.1:1", True, None, 64, 30.5),
    StartDownload(7, "/cache/tmp/0/7", "bucket/images/ü\n7.jpg", "bucket", "images/ü\n7.jpg", 2**60, 0, 2**32 - 1),
    StartDownload(8, "/cache/tmp/0/8", "bucket/a", "bucket", "a", 1, 2**40, None),
    CancelDownload(7),
    TokenGranted("ya29.token"),
    TokenUnavailable("no access token: 400", is_final=True),
    ProcessReady(),
    AttemptEnded(7, 2, 0.25, 100_000, is_throttled=False, is_success=True),
    BytesWritten(7, 1 << 20),
    ErrorsCounted({"503": 2, "timeout": 1}),
    DownloadPublished(7, 0),
    DownloadFailed(7, "ObjectNotFoundError", "fetch gs://bucket/images/7.jpg: GCS returned 404\nNot Found"),
    DownloadCancelled(7),
    TokenRequest(),
    TokenRefused("ya29.token"),
]


def test_there_is_an_example_of_every_message() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(Message))
    assert {each.__name__ for each in get_args(Message)} | {"Message", "encode", "decode"} == set(process_messages.__all__)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_decoded_message_equals_the_encoded_one(message: Message) -> None:
    assert decode(encode([message])) == [message]


def test_many_messages_share_one_line_and_keep_their_order() -> None:
    line = encode(EXAMPLES)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode(line) == EXAMPLES


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise(EXAMPLES)))
def test_messages_of_two_lines_are_decoded_line_by_line(first: Message, second: Message) -> None:
    lines = (encode([first]) + encode([second])).splitlines()
    assert [message for line in lines for message in decode(line)] == [first, second]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_cannot_be_changed_and_has_no_other_attributes(message: Message) -> None:
    for field in dataclasses.fields(message):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, field.name, None)
    assert not hasattr(message, "__dict__")


def test_an_unknown_message_is_an_error() -> None:
    with pytest.raises(KeyError, match="Unknown"):
        decode(b'[["Unknown", 1]]')


def test_a_message_with_another_number_of_fields_is_an_error() -> None:
    with pytest.raises(TypeError, match="CancelDownload"):
        decode(b'[["CancelDownload", 1, 2]]')
