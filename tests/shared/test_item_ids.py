"""Texts sorted and taken in arrays, as they would be one by one. What `Ids` promises is in shared/test_manifest.py."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from gcs_prefetchd.shared.item_ids import SELECT_BATCH, ByteArray, Ids, Int64Array, select_texts, sort_texts

# Few characters, NUL among them, and lengths around those that are compared at a time.
texts = st.lists(st.text("\0ab", max_size=24).map(str.encode) | st.binary(max_size=30), max_size=30)


def joined(some: list[bytes]) -> tuple[ByteArray, Int64Array]:
    return np.frombuffer(b"".join(some), dtype=np.uint8), np.cumsum([len(one) for one in some], dtype=np.int64)


def split(text: ByteArray, ends: Int64Array) -> list[bytes]:
    return [text[start:end].tobytes() for start, end in zip([0, *ends][: len(ends)], ends, strict=True)]


@given(texts)
@example([b"aaaaaaa", b"aaaaaaa\0", b"aaaaaaaa", b"aaaaaaa", b"", b"\0"])
@example([b"x" * 1000 + b"b", b"x" * 1000 + b"a", b"x" * 1000])
def test_texts_are_sorted_as_bytes_and_equal_ones_stay_in_order(some: list[bytes]) -> None:
    order, is_first = sort_texts(*joined(some))
    assert order.tolist() == sorted(range(len(some)), key=lambda row: (some[row], row))
    ordered = [some[row] for row in order]
    assert is_first.tolist() == [i == 0 or ordered[i] != ordered[i - 1] for i in range(len(some))]


@given(texts.filter(bool), st.data())
def test_the_texts_of_some_rows_are_taken(some: list[bytes], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(some) - 1), max_size=40))
    assert split(*select_texts(*joined(some), np.array(rows, dtype=np.int64))) == [some[row] for row in rows]


def test_more_texts_than_are_taken_at_once_are_taken() -> None:
    some = [str(i).encode() for i in range(SELECT_BATCH * 2 + 5)]
    rows = np.arange(len(some))[::-1]
    assert split(*select_texts(*joined(some), rows)) == some[::-1]


@given(st.sets(st.text(max_size=10)), st.sets(st.text(max_size=10)))
def test_what_two_lists_have_in_common(one: set[str], other: set[str]) -> None:
    here, there = Ids.from_sorted(sorted(one)).common_with(Ids.from_sorted(sorted(other)))
    assert [sorted(one)[row] for row in here] == [sorted(other)[row] for row in there] == sorted(one & other)
