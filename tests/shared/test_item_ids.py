"""Item ids behave like a list of str; texts are sorted and selected in arrays, as they would be one by one."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gcs_prefetchd.shared.item_ids import SELECT_BATCH, ByteArray, Ids, Int64Array, select_texts, sort_texts

ids_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
# Few characters, NUL among them, and lengths around those that are compared at a time.
texts = st.lists(st.text("\0ab", max_size=24).map(str.encode) | st.binary(max_size=30), max_size=30)


def joined(given_texts: list[bytes]) -> tuple[ByteArray, Int64Array]:
    return np.frombuffer(b"".join(given_texts), dtype=np.uint8), np.cumsum([len(one) for one in given_texts], dtype=np.int64)


def split(text: ByteArray, ends: Int64Array) -> list[bytes]:
    return [text[start:end].tobytes() for start, end in zip([0, *ends][: len(ends)], ends, strict=True)]


@given(texts)
@example([b"aaaaaaa", b"aaaaaaa\0", b"aaaaaaaa", b"aaaaaaa", b"", b"\0"])
@example([b"x" * 1000 + b"b", b"x" * 1000 + b"a", b"x" * 1000])
def test_texts_are_sorted_as_bytes_and_equal_ones_stay_in_order(given_texts: list[bytes]) -> None:
    order, is_first = sort_texts(*joined(given_texts))
    assert order.tolist() == sorted(range(len(given_texts)), key=lambda row: (given_texts[row], row))
    ordered = [given_texts[row] for row in order]
    assert is_first.tolist() == [i == 0 or ordered[i] != ordered[i - 1] for i in range(len(given_texts))]


@given(texts.filter(bool), st.data())
def test_the_texts_of_the_given_rows_are_selected(given_texts: list[bytes], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(given_texts) - 1), max_size=40))
    assert split(*select_texts(*joined(given_texts), np.array(rows, dtype=np.int64))) == [given_texts[row] for row in rows]


def test_more_texts_than_one_batch_are_selected() -> None:
    given_texts = [str(i).encode() for i in range(SELECT_BATCH * 2 + 5)]
    rows = np.arange(len(given_texts))[::-1]
    assert split(*select_texts(*joined(given_texts), rows)) == given_texts[::-1]


@given(st.sets(st.text(max_size=10)), st.sets(st.text(max_size=10)))
def test_the_common_ids_of_two_lists_are_found(one: set[str], other: set[str]) -> None:
    here, there = Ids.from_sorted(sorted(one)).common_with(Ids.from_sorted(sorted(other)))
    assert [sorted(one)[row] for row in here] == [sorted(other)[row] for row in there] == sorted(one & other)


@given(
    st.lists(st.text("ab", max_size=3), max_size=4, unique=True), st.lists(st.text("ab", max_size=3), max_size=4, unique=True)
)
def test_the_digest_of_ids_depends_on_the_ids_alone(ids: list[str], others: list[str]) -> None:
    """And not on their objects: a checkpoint remains valid for other generations of the same items."""
    assert (Ids.from_sorted(sorted(ids)).digest == Ids.from_sorted(sorted(others)).digest) == (set(ids) == set(others))
    assert Ids.from_sorted(["a", "b"]).digest == "b976190f71513127d9fd0577293fc00b"  # stored in checkpoints


@given(st.sets(ids_text, max_size=20))
def test_ids_behave_like_a_list(ids: set[str]) -> None:
    expected = sorted(ids)
    actual = Ids.from_sorted(expected)
    assert len(actual) == len(expected)
    assert list(actual) == expected
    assert list(reversed(actual)) == expected[::-1]
    for index in range(-len(expected), len(expected)):
        assert actual[index] == expected[index]
    for part in (slice(None), slice(1, None), slice(None, -1), slice(None, None, -2), slice(5, 2), slice(100, 200)):
        assert actual[part] == expected[part]
    for item_id in expected:
        assert item_id in actual
        assert actual.find(item_id) == expected.index(item_id) == actual.index(item_id)


@pytest.mark.parametrize("index", [3, -4, 2**40])
def test_an_index_beyond_the_ids_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=str(index)):
        Ids.from_sorted(["a", "b", "c"])[index]


@pytest.mark.parametrize("item_id", ["", "a", "bb", "z", "ü"])
def test_an_unknown_id_is_not_found(item_id: str) -> None:
    assert Ids.from_sorted(["b", "c", "y"]).find(item_id) is None


def test_ids_equal_only_the_same_ids() -> None:
    assert Ids.from_sorted(["a", "bc"]) == Ids.from_sorted(["a", "bc"])
    assert Ids.from_sorted(["a", "bc"]) != Ids.from_sorted(["ab", "c"])
    assert Ids.from_sorted(["a"]) != ["a"]
    with pytest.raises(TypeError):
        hash(Ids.from_sorted(["a"]))
