"""Sizes with units are parsed and formatted."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gcs_prefetchd.shared.byte_sizes import format_exact_size, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("1", 1),
        ("17B", 17),
        ("500M", 500 * 10**6),
        ("200GB", 200 * 10**9),
        ("200 gb", 200 * 10**9),
        ("  2 kB ", 2000),
        ("1KiB", 1024),
        ("1.5TiB", 3 * 2**39),
        ("1.5TB", 1_500_000_000_000),
        ("3 PiB", 3 * 2**50),
        ("0.5K", 500),
        ("1.001K", 1001),
        ("999999999999999999", 999_999_999_999_999_999),
        (4096, 4096),
        (2e11, 200 * 10**9),
        ("1.0", 1),
        (10**12, 10**12),
    ],
)
def test_a_number_and_a_unit_parse_as_bytes(text: object, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "GB",
            "10 Q",
            "10 QB",
            "-5",
            "-5GB",
            "+5",
            "1e9",
            "1,5GB",
            "1.GB",
            ".5GB",
            "1 2GB",
            "5GB5",
            "0x10",
            "nan",
            "inf",
        ),
        *("500MB/s", "1 MB per s", "1.5", "0.5B", "200 G B"),
        *("10 iB", "٣GB", "²", "9" * 19, "9" * 5000, "9" * 400 + ".0", "1." + "9" * 5000, "5\x00", "5\nGB!", "None", "True"),
    ],
)
def test_any_other_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"^is not a valid size; write a number and a unit, as in 200GB or 1\.5TiB$"):
        parse_size(text)


@pytest.mark.parametrize("value", [True, False, None, 1.5, 1e30, float("nan"), -5, [1], b"200GB", {"GB": 200}])
def test_a_value_that_is_neither_text_nor_a_whole_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^is not a valid size; "):
        parse_size(value)


@given(st.text(max_size=30) | st.from_regex(r"[0-9.]{1,500} ?[kKmMgGtTpP]?i?[bB]?", fullmatch=True))
@example("9" * 18 + "." + "9" * 18 + "PiB")
def test_no_text_raises_anything_but_a_value_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError as exc:
        assert "is not a valid size" in str(exc)  # noqa: PT017  # some texts are sizes


@given(st.integers(0, 10**18 - 1))
def test_a_plain_number_is_bytes(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == parse_size(size_bytes) == parse_size(f"{size_bytes} B") == size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (1500, "1.5 KB"),
        (99_940, "99.9 KB"),
        (123_456, "123 KB"),
        (999_499, "999 KB"),
        (999_999, "1.0 MB"),
        (10**9, "1.0 GB"),
        (200 * 10**9, "200 GB"),
        (10**12 - 1, "1.0 TB"),
        (3 * 10**15, "3.0 PB"),
        (5 * 10**18, "5000.0 PB"),
        (-1500, "-1.5 KB"),
        (1234.5, "1.2 KB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_that_leaves_one(size_bytes: float, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(0, 10**17 - 1))
def test_a_formatted_size_parses_back_within_five_percent(size_bytes: int) -> None:
    shown = format_size(size_bytes)
    assert re.fullmatch(r"\d{1,3}(\.\d)? [KMGTP]?B", shown)
    assert abs(parse_size(shown) - size_bytes) <= 0.05 * size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1001, "1.001 KB"),
        (2**20, "1.048576 MB"),
        (500 * 10**6, "500 MB"),
        (10**9 - 1, "999.999999 MB"),
        (5 * 10**18, "5000 PB"),
    ],
)
def test_an_exact_size_omits_only_zeros(size_bytes: int, text: str) -> None:
    assert format_exact_size(size_bytes) == text


@given(st.integers(0, 10**18))
def test_an_exact_size_parses_back_exactly(size_bytes: int) -> None:
    assert parse_size(format_exact_size(size_bytes)) == size_bytes
