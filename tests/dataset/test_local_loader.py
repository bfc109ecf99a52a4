"""Local files: the loader and the listing."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from gcs_dataset import list_items_local, pil_loader
from gcs_dataset.local_loader import list_pairs_local
from gcs_prefetchd.shared.errors import ItemError
from gcs_prefetchd.shared.item_patterns import ItemPatterns
from support.datasets import number_of, write_local


def open_files() -> set[str]:
    """The files that this process has open. A number of descriptors would change with the threads of other tests."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(descriptor.readlink()))
    return found


def test_an_image_is_loaded_and_its_file_closed(tmp_path: Path) -> None:
    write_local(tmp_path, 3)
    path = tmp_path / "images/0002.jpg"
    with path.open("rb"):
        assert str(path) in open_files()
    image = pil_loader(path)
    assert str(path) not in open_files()
    assert (image.mode, number_of(image)) == ("RGB", 2)


def test_no_mode_keeps_class_indices(tmp_path: Path) -> None:
    write_local(tmp_path, 3)
    label = pil_loader(str(tmp_path / "labels/0002.png"), mode=None)
    assert (label.mode, label.getpixel((0, 0))) == ("P", 2)


@pytest.mark.parametrize("name", ["missing.jpg", "folder", "text.jpg"])
def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ItemError, match=name):
        pil_loader(tmp_path / name)


def test_ids_are_sorted_and_keep_their_folders(tmp_path: Path) -> None:
    for name in ["b/7.jpg", "a.jpg", "b/10.jpg", "c.tar.gz"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_items_local(tmp_path) == ["a", "b/10", "b/7", "c.tar"]


def test_two_files_with_one_id_are_both_named(tmp_path: Path) -> None:
    (tmp_path / "7.jpg").write_bytes(b"")
    (tmp_path / "7.png").write_bytes(b"")
    with pytest.raises(ItemError, match=r"7\.(jpg|png) and 7\.(jpg|png) have the same id '7'"):
        list_items_local(tmp_path)


def test_a_missing_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ItemError, match="nowhere: no such folder"):
        list_items_local(tmp_path / "nowhere")
    with pytest.raises(ItemError, match="holds no items"):
        list_items_local(tmp_path)


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"7\xff.jpg")).write_bytes(b"")
    with pytest.raises(ItemError, match=r"the name '7\\udcff\.jpg' is not UTF-8"):
        list_items_local(tmp_path)


def test_patterns_may_have_text_before_the_id(tmp_path: Path) -> None:
    for name in ["photo-1.jpg", "photo-2.jpg", "masks/mask-1.png", "masks/mask-2.png", "notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list(list_pairs_local(tmp_path, ItemPatterns(("photo-{id}.jpg", "masks/mask-{id}.png"))).ids) == ["1", "2"]


def test_an_item_that_lacks_a_part_is_left_out_and_named(tmp_path: Path) -> None:
    write_local(tmp_path, 4)
    (tmp_path / "labels/0001.png").unlink()
    (tmp_path / "images/0002.jpg").unlink()
    items = list_pairs_local(tmp_path, ItemPatterns())
    assert list(items.ids) == ["0000", "0003"]
    assert items.incomplete == (f"{tmp_path}/labels/0001.png", f"{tmp_path}/images/0002.jpg")
