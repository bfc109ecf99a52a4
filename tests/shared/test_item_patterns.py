"""The patterns of an item's parts: names from ids, and ids from names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcs_prefetchd.shared.errors import SettingsError
from gcs_prefetchd.shared.item_patterns import ItemPatterns

ids_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@pytest.mark.parametrize("pattern", ["images/*.jpg", "", "images/{}.jpg", "{id}/{id}.jpg", "images/{ID}.jpg"])
def test_a_pattern_must_contain_the_id_once(pattern: str) -> None:
    with pytest.raises(SettingsError, match=r"must contain \{id\} once") as caught:
        ItemPatterns((pattern, "labels/{id}.png"))
    assert repr(pattern) in str(caught.value)


def test_image_and_label_need_different_patterns() -> None:
    with pytest.raises(SettingsError, match="both the image and the label"):
        ItemPatterns(("all/{id}.png", "all/{id}.png"))


@given(ids_text, st.sampled_from([("images/{id}.jpg", "labels/{id}.png"), ("{id}.jpg", "{id}.png"), ("a/{id}/x", "b/{id}")]))
def test_a_part_name_matches_the_id_that_it_was_made_from(item_id: str, patterns: tuple[str, ...]) -> None:
    item_patterns = ItemPatterns(patterns)
    for part in range(len(patterns)):
        assert item_patterns.match(item_patterns.part_name(item_id, part)) == (item_id, part)


@pytest.mark.parametrize(
    ("patterns", "folders"),
    [
        (("images/{id}.jpg", "labels/{id}.png"), ["images/", "labels/"]),
        (("{id}.jpg", "labels/{id}.png"), [""]),
        (("all/{id}.jpg", "all/{id}.png"), ["all/"]),
        (("all/i-{id}.jpg", "all/{id}.png"), ["all/"]),
        (("a/{id}.jpg", "ab/{id}.png"), ["a/", "ab/"]),
    ],
)
def test_listing_the_folders_lists_every_part_once(patterns: tuple[str, ...], folders: list[str]) -> None:
    item_patterns = ItemPatterns(patterns)
    assert item_patterns.folders() == folders
    for part in range(len(patterns)):
        name = item_patterns.part_name("x", part)
        assert sum(name.startswith(folder) for folder in folders) == 1
