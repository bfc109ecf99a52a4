"""Item numbers outlast relistings: items that were listed before keep theirs, new items get new ones."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.planning.item_numbers import ManifestHistory, NumberedManifest
from gcs_prefetchd.shared.manifest import Manifest
from gcs_prefetchd.shared.objects import ObjectName
from support.plans import indices_of, manifest_of


def put_in_force(history: ManifestHistory, manifest: Manifest) -> NumberedManifest:
    numbered = history.assign_numbers(manifest)
    history.add_newest(numbered)
    return numbered


def prune(history: ManifestHistory, *in_use: NumberedManifest) -> None:
    superseded = history.superseded(in_use)
    if superseded:
        history.discard(superseded, history.remnant(superseded))


def numbers(numbered: NumberedManifest) -> dict[str, int]:
    return dict(numbered.ids_and_numbers())


def test_in_the_first_manifest_an_items_number_is_its_index() -> None:
    history = ManifestHistory()
    numbered = put_in_force(history, manifest_of("abc"))
    assert numbers(numbered) == {"a": 0, "b": 1, "c": 2}
    assert numbered.numbers_of(indices_of([2, 0])).tolist() == [2, 0]
    assert history.end == 3


def test_an_item_that_was_listed_before_keeps_its_number_and_a_new_one_gets_the_next() -> None:
    history = ManifestHistory()
    put_in_force(history, manifest_of("bdf"))
    assert numbers(put_in_force(history, manifest_of("abcdf"))) == {"b": 0, "d": 1, "f": 2, "a": 3, "c": 4}
    assert history.end == 5


def test_the_number_of_a_removed_item_is_not_reused_and_the_item_gets_it_back() -> None:
    history = ManifestHistory()
    put_in_force(history, manifest_of("abc"))
    assert numbers(put_in_force(history, manifest_of("ac"))) == {"a": 0, "c": 2}
    assert numbers(put_in_force(history, manifest_of("acd"))) == {"a": 0, "c": 2, "d": 3}
    assert numbers(put_in_force(history, manifest_of("abe"))) == {"a": 0, "b": 1, "e": 4}
    assert history.end == 5


@pytest.mark.parametrize("removed", ["", "c"])
def test_a_changed_item_keeps_its_number_and_has_its_new_version(removed: str) -> None:
    history = ManifestHistory()
    put_in_force(history, manifest_of("abc"))
    numbered = put_in_force(history, manifest_of(sorted(set("abc") - set(removed)), generations={"b": 7}))
    assert numbers(numbered)["b"] == 1
    assert {version.generation for version in history.versions(1)} == {7}
    assert {version.generation for version in history.versions(0)} == {1}


def test_an_item_that_is_no_longer_listed_has_its_last_versions() -> None:
    history = ManifestHistory()
    put_in_force(history, manifest_of("ab", generation=1))
    put_in_force(history, manifest_of("ab", generation=2))
    put_in_force(history, manifest_of("b", generation=3))
    assert [version.generation for version in history.versions(0)] == [2, 2]
    assert [version.name.name for version in history.versions(0)] == ["train/images/a.jpg", "train/labels/a.png"]
    assert history.find_part(ObjectName("pictures", "train/labels/a.png")) == (0, 1)
    assert history.versions(99) == []


def test_an_object_is_found_under_its_number_whichever_manifest_has_it() -> None:
    history = ManifestHistory()
    put_in_force(history, manifest_of("bc"))
    put_in_force(history, manifest_of("abc"))
    found = [history.find_part(ObjectName("pictures", f"train/images/{item_id}.jpg")) for item_id in "abcd"]
    assert found == [(2, 0), (0, 0), (1, 0), None]
    assert history.find_part(ObjectName("pictures", "train/README.md")) is None


def test_an_earlier_manifest_is_found_by_its_digest() -> None:
    history = ManifestHistory()
    first = put_in_force(history, manifest_of("ab"))
    second = put_in_force(history, manifest_of("abc"))
    assert history.find_manifest(first.manifest.digest) is first
    assert history.find_manifest(second.manifest.digest) is second is history.newest
    assert history.find_manifest("of another") is None


def test_an_earlier_manifest_that_is_added_late_is_never_the_newest() -> None:
    history = ManifestHistory()
    newest = put_in_force(history, manifest_of("bc", generation=2))
    earlier = history.assign_numbers(manifest_of("abd", generation=1))
    history.add_earlier(earlier)
    assert history.newest is newest
    assert history.find_manifest(earlier.manifest.digest) is earlier
    assert numbers(earlier) == {"b": 0, "a": 2, "d": 3}
    assert [history.versions(number)[0].generation for number in range(history.end)] == [2, 2, 1, 1]
    assert numbers(put_in_force(history, manifest_of("cde")))["e"] == 4


def test_assigning_numbers_changes_nothing_until_the_manifest_is_added() -> None:
    history = ManifestHistory()
    put_in_force(history, manifest_of("ab"))
    history.assign_numbers(manifest_of("abc"))
    assert (history.end, len(history.manifests)) == (2, 1)
    assert numbers(put_in_force(history, manifest_of("abd")))["d"] == 2


def test_only_the_newest_two_manifests_and_those_in_use_are_kept() -> None:
    history = ManifestHistory()
    listings = [put_in_force(history, manifest_of("abc", generation=generation)) for generation in range(1, 7)]
    prune(history, listings[1])
    assert history.manifests == [listings[1], *listings[-2:]]
    prune(history)
    assert history.manifests == listings[-2:]
    assert history.superseded([]) == []


def test_an_item_that_is_no_longer_listed_keeps_its_number_when_its_manifest_is_discarded() -> None:
    """Its files may still be cached, and must be found to be evicted. Or it may be listed again."""
    history = ManifestHistory()
    for generation, ids in enumerate(["abc", "abc", "ac", "c", "cd"], 1):
        put_in_force(history, manifest_of(ids, generation=generation))
        prune(history)
    assert len(history.manifests) == 3
    assert history.find_part(ObjectName("pictures", "train/images/b.jpg")) == (1, 0)
    assert [version.generation for version in history.versions(1)] == [2, 2]
    assert [version.generation for version in history.versions(0)] == [3, 3]
    assert numbers(put_in_force(history, manifest_of("bcd", generation=6))) == {"b": 1, "c": 2, "d": 3}


def test_the_number_of_kept_manifests_does_not_grow_with_relistings() -> None:
    history = ManifestHistory()
    for generation in range(1, 30):
        put_in_force(history, manifest_of("abcdef"[: 1 + generation % 6], generation=generation))
        prune(history)
        assert len(history.manifests) <= 3
    assert history.end == 6


def test_a_manifest_of_the_same_items_takes_no_memory_for_their_numbers() -> None:
    history = ManifestHistory()
    put_in_force(history, manifest_of("bd"))
    first, second = (put_in_force(history, manifest_of("abcd", generation=generation)) for generation in (2, 3))
    assert np.shares_memory(first._numbers, second._numbers)
    assert numbers(first) == numbers(second)


@given(st.lists(st.sets(st.sampled_from("abcdefgh"), min_size=1), min_size=1, max_size=7))
def test_through_any_relistings_an_item_has_one_number_and_a_number_one_item(listed: list[set[str]]) -> None:
    history, known = ManifestHistory(), dict[str, int]()
    for ids in listed:
        numbered = put_in_force(history, manifest_of(sorted(ids)))
        prune(history)
        assert [item_id for item_id, _ in numbered.ids_and_numbers()] == sorted(ids)
        assert {**known, **numbers(numbered)} == {**numbers(numbered), **known}
        known |= numbers(numbered)
        assert sorted(known.values()) == list(range(history.end))
        for index, item_id in enumerate(sorted(ids)):
            number = known[item_id]
            assert (numbered.index_of(number), numbered.number_at(index)) == (index, number)
            assert numbered.versions(number) == numbered.manifest.versions(index)
        assert all(numbered.index_of(number) is None for item_id, number in known.items() if item_id not in ids)
        assert numbered.index_of(history.end + 5) is None
        found = {item_id: history.find_part(ObjectName("pictures", f"train/images/{item_id}.jpg")) for item_id in known}
        assert found == {item_id: (number, 0) for item_id, number in known.items()}


def test_a_relisting_of_the_same_items_costs_almost_nothing() -> None:
    """A data root is listed every hour, and to number a million items takes a second."""
    history = ManifestHistory()
    ids = [f"{i:06}" for i in range(20_000)]
    put_in_force(history, manifest_of(ids))
    same, other = manifest_of(ids, generation=2), manifest_of([*ids, "x"])
    costs_s = []
    for manifest in (same, other):
        started_s = time.thread_time()
        history.assign_numbers(manifest)
        costs_s.append(time.thread_time() - started_s)
    assert costs_s[0] * 5 < costs_s[1]
