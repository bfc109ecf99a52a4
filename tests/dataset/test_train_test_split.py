"""The split of items into training and testing."""

import pickle
import time
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gcs_dataset import consistent_train_test_split
from gcs_dataset.train_test_split import Selection
from gcs_prefetchd.shared.errors import SettingsError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from gcs_prefetchd.shared.manifest import Ids, build_manifest, load_manifest
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, ObjectVersion


@given(st.sets(st.text(min_size=1, max_size=8)), st.floats(0, 1))
def test_every_item_is_on_the_side_that_its_checksum_defines(items: set[str], ratio: float) -> None:
    ids = sorted(items)
    train, test = consistent_train_test_split(ids, ratio)
    assert [ids[i] for i in test] == [one for one in ids if google_crc32c.value(one.encode()) < ratio * 2**32]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(ids)))
    assert train.dtype == test.dtype == torch.int64


@given(st.sets(st.text(min_size=1, max_size=8)), st.sets(st.text(min_size=1, max_size=8)))
def test_an_item_never_changes_sides_as_the_dataset_grows(few: set[str], more: set[str]) -> None:
    def test_side(items: set[str]) -> set[str]:
        ids = sorted(items)
        return {ids[i] for i in consistent_train_test_split(ids, 0.5)[1]}

    assert test_side(few) == test_side(few | more) & few


def test_ratios_0_and_1_put_everything_on_one_side() -> None:
    ids = [str(number) for number in range(100)]
    assert [len(side) for side in consistent_train_test_split(ids, 0)] == [100, 0]
    assert [len(side) for side in consistent_train_test_split(ids, 1)] == [0, 100]


@pytest.mark.parametrize("ratio", [-0.1, 1.1, 10, float("nan")])
def test_an_invalid_ratio_is_named(ratio: float) -> None:
    with pytest.raises(SettingsError, match=f"test_ratio must be between 0 and 1, not {ratio}"):
        consistent_train_test_split(["a"], ratio)


def test_ids_of_a_manifest_split_as_their_strings_do() -> None:
    ids = [f"ä{number}" for number in range(1000)]
    plain, packed = (
        consistent_train_test_split(sorted(ids), 0.3),
        consistent_train_test_split(Ids.from_sorted(sorted(ids)), 0.3),
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, packed, strict=True))


def test_a_million_ids_are_split_in_seconds() -> None:
    ids = Ids.from_sorted(f"{number:07d}" for number in range(1_000_000))
    started_s = time.process_time()
    consistent_train_test_split(ids, 0.1)
    assert time.process_time() - started_s < 5  # 0.5 s on an idle core


def test_a_selection_is_the_items_at_its_indices() -> None:
    selection = Selection(Ids.from_sorted(["a", "b", "c"]), np.array([2, 0]))
    assert list(selection) == ["c", "a"]
    assert list(selection[1:]) == ["a"]
    assert list(pickle.loads(pickle.dumps(selection))) == ["c", "a"]


def test_ids_of_a_saved_manifest_are_pickled_as_the_path_of_their_files(tmp_path: Path) -> None:
    names = [f"{folder}/{number:05d}.{end}" for number in range(5000) for folder, end in [("images", "jpg"), ("labels", "png")]]
    versions = [ObjectVersion(ObjectName("pictures", name), 1, 1, 1) for name in names]
    built = build_manifest(DataRoot("pictures", ""), ItemPatterns(), versions)
    mapped = load_manifest(built.save(tmp_path)).ids
    packed = pickle.dumps(mapped)
    assert len(packed) < 1000
    assert pickle.loads(packed) == mapped == pickle.loads(pickle.dumps(built.ids))
