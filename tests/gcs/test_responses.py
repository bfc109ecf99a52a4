"""What a response of GCS means: its error, its Retry-After, and the version that it names."""

import base64
import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from multidict import CIMultiDict

from gcs_prefetchd.gcs.responses import error_for_status, parse_retry_after, version_from_headers
from gcs_prefetchd.shared.checked_read import crc32c_of
from gcs_prefetchd.shared.errors import (
    AccessDeniedError,
    CredentialsError,
    ObjectChangedError,
    ObjectMissingError,
    OriginError,
)
from gcs_prefetchd.shared.objects import ObjectName, ObjectVersion

NAME = ObjectName("pictures", "train/images/1.jpg")
CRC32C = crc32c_of(b"123456789")
GOOD = {
    "x-goog-generation": "1700000000000000",
    "x-goog-stored-content-length": "9",
    "x-goog-hash": "crc32c=4waSgw==",
    "Content-Length": "9",
}
NOW = datetime(2026, 11, 5, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("status", "pinned", "final"),
    [
        (400, False, OriginError),
        (401, False, CredentialsError),
        (403, False, AccessDeniedError),
        (404, False, ObjectMissingError),
        (404, True, ObjectChangedError),
        (412, True, ObjectChangedError),
        (403, True, AccessDeniedError),
        (204, False, None),
        (206, True, None),
        (302, False, None),
        (304, True, None),
        (408, False, None),
        (416, False, None),
        (429, False, None),
        (500, True, None),
        (502, False, None),
        (503, False, None),
        (504, False, None),
    ],
)
def test_a_status_is_final_or_retried(status: int, pinned: bool, final: type[OriginError] | None) -> None:
    error = error_for_status(status, {}, b"", pinned=pinned)
    assert error.final is final
    assert error.kind == str(status)
    assert f"GCS returned {status}" in str(error)


@pytest.mark.parametrize(
    ("header", "wait_s"), [(None, None), ("7", 7.0), ("never", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("-1", None)]
)
def test_the_error_holds_the_retry_after(header: str | None, wait_s: float | None) -> None:
    headers = CIMultiDict({} if header is None else {"retry-after": header})
    assert error_for_status(503, headers, b"", pinned=False).retry_after_s == wait_s


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("0", 0.0),
        ("5", 5.0),
        (" 120 ", 120.0),
        ("-5", None),
        ("1.5", None),
        ("²", None),
        ("٣", None),
        (format_datetime(NOW + timedelta(seconds=30), usegmt=True), 30.0),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0.0),
        ("Thu, 05 Nov 2026 13:00:10 +0100", 10.0),
        ("Thu, 05 Nov 2026 12:00:10 -0000", None),
        ("Thu, 05 Nov 2026 12:00:10 +99999999999999", None),
        ("Thu, 99 Nov 2026 12:00:10 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, wait_s: float | None) -> None:
    assert parse_retry_after(value, NOW) == wait_s


def test_a_retry_after_date_is_compared_with_the_clock() -> None:
    wait_s = parse_retry_after(format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True))
    assert wait_s is not None
    assert 3500 < wait_s < 3700


@given(st.text(st.sampled_from("0123456789 -+:,ThuNovGMT."), max_size=40) | st.text(max_size=40))
@example("9" * 5000)
@example("1 Jan 2024")
@example("Thu, 05 Nov 0000 12:00:10 GMT")
def test_any_retry_after_is_a_wait_or_none(value: str) -> None:
    wait_s = parse_retry_after(value, NOW)
    assert wait_s is None or 0 <= wait_s < float("inf")


def test_the_servers_message_is_shown_in_one_short_line() -> None:
    body = json.dumps({"error": {"code": 400, "message": "Invalid\nbucket:\t'x' " + "y" * 5000}}).encode()
    text = str(error_for_status(400, {}, body, pinned=False))
    assert text.startswith("GCS returned 400 (Invalid bucket: 'x' yyy")
    assert len(text) < 300


def test_a_plain_text_body_is_shown_too() -> None:
    """GCS sends one for a failed download. An HTML page, from a proxy between us and GCS, is left out."""
    headers = CIMultiDict({"Content-Type": "text/html; charset=UTF-8"})
    assert str(error_for_status(416, headers, b"Invalid\nrange", pinned=False)) == "GCS returned 416 (Invalid range)"
    assert str(error_for_status(502, headers, b"\n <!doctype html><h1>Bad Gateway</h1>", pinned=False)) == "GCS returned 502"


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "not accepted"), (403, "may not read it"), (404, "no such object or bucket")]
)
def test_common_statuses_are_explained(status: int, hint: str) -> None:
    assert hint in str(error_for_status(status, {}, b"<Error>whatever</Error>", pinned=False))


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"<html>",
            b"\xff\xfe",
            b"[]",
            b"null",
            b'"text"',
            b"5",
            b"{}",
            b'{"error": null}',
            b'{"error": "invalid_grant"}',
        ),
        *(b'{"error": {}}', b'{"error": []}', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000),
    ],
)
def test_any_other_body_is_left_out(body: bytes) -> None:
    assert str(error_for_status(500, {}, body, pinned=False)) == "GCS returned 500"


@given(st.integers(100, 599), st.binary(max_size=200), st.sampled_from(["", "text/plain; charset=utf-8", "application/json"]))
def test_any_error_is_one_short_line(status: int, body: bytes, content_type: str) -> None:
    text = str(error_for_status(status, CIMultiDict({"Content-Type": content_type}), body, pinned=False))
    assert text.splitlines() == [text]
    assert len(text) < 300


def version(changes: dict[str, str | None]) -> ObjectVersion | None:
    return version_from_headers(
        NAME, CIMultiDict({name: value for name, value in (GOOD | changes).items() if value is not None})
    )


def test_the_headers_name_generation_size_and_crc32c() -> None:
    assert version({}) == ObjectVersion(NAME, 1700000000000000, 9, CRC32C)


@pytest.mark.parametrize(
    "hashes",
    [
        ["crc32c=4waSgw=="],
        ["crc32c=4waSgw==", "md5=JfnnlDI7RTiF9RgfG2JNCw=="],
        ["md5=JfnnlDI7RTiF9RgfG2JNCw==", "crc32c=4waSgw=="],
        ["crc32c=4waSgw==,md5=JfnnlDI7RTiF9RgfG2JNCw=="],
        ["md5=JfnnlDI7RTiF9RgfG2JNCw==, crc32c=4waSgw=="],
    ],
)
def test_the_crc32c_is_found_in_one_header_or_in_two(hashes: list[str]) -> None:
    headers = CIMultiDict({name: value for name, value in GOOD.items() if name != "x-goog-hash"})
    for value in hashes:
        headers.add("X-Goog-Hash", value)
    found = version_from_headers(NAME, headers)
    assert found is not None
    assert found.crc32c == CRC32C


@pytest.mark.parametrize(
    "changes",
    [
        {"x-goog-hash": None},
        {"x-goog-hash": ""},
        {"x-goog-hash": "md5=JfnnlDI7RTiF9RgfG2JNCw=="},
        {"x-goog-hash": "crc32c="},
        {"x-goog-hash": "crc32c"},
        {"x-goog-hash": "crc32c=4waSgw"},
        {"x-goog-hash": "crc32c=4waS"},
        {"x-goog-hash": "crc32c=AAAAAAAA"},
        {"x-goog-hash": "crc32c=!!!!!!=="},
        {"x-goog-hash": "crc32c=ümlaut=="},
        {"x-goog-generation": None},
        {"x-goog-generation": ""},
        {"x-goog-generation": "new"},
        {"x-goog-generation": "-1"},
        {"x-goog-stored-content-length": "nine"},
        {"x-goog-stored-content-length": "-9"},
        {"x-goog-stored-content-length": None, "Content-Length": None},
        {"x-goog-stored-content-length": None, "Content-Length": "x"},
    ],
)
def test_incomplete_headers_name_no_version(changes: dict[str, str | None]) -> None:
    """The body could not be checked against them, so nothing is published."""
    assert version(changes) is None


def test_the_stored_length_takes_precedence_over_the_sent_one() -> None:
    """They differ if something between us and GCS unpacks gzip."""
    found = version({"Content-Length": "20"})
    assert found is not None
    assert found.size == 9
    fallback = version({"x-goog-stored-content-length": None})
    assert fallback is not None
    assert fallback.size == 9


@given(st.integers(0, 2**32 - 1))
def test_every_crc32c_is_parsed(crc32c: int) -> None:
    found = version({"x-goog-hash": f"crc32c={base64.b64encode(crc32c.to_bytes(4)).decode()}"})
    assert found is not None
    assert found.crc32c == crc32c


@given(st.dictionaries(st.sampled_from(list(GOOD)), st.text(max_size=20)))
def test_any_headers_name_a_version_or_none(changes: dict[str, str]) -> None:
    found = version(dict(changes))
    assert found is None or (found.generation >= 0 and found.size >= 0 and found.crc32c is not None)
