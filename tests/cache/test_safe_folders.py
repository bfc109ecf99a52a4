"""Only folders of the cache's own are used; each is examined once until the next batch."""

import errno
from pathlib import Path

import pytest

from gcs_prefetchd.cache.safe_folders import SafeFolders


def refuse() -> None:
    raise OSError(errno.ESTALE, "not ours")


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    (tmp_path / "objects/pictures/train").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return tmp_path / "objects"


@pytest.mark.parametrize("path", ["a.jpg", "pictures/a.jpg", "pictures/train/a.jpg", "pictures/train/new/newer/a.jpg"])
def test_folders_that_exist_or_can_be_created_are_accepted(path: str, objects: Path) -> None:
    folders = SafeFolders(objects)
    folders.check(path)
    folders.make_parents(path)
    folders.check(path)
    assert (objects / path).parent.is_dir()


@pytest.mark.parametrize("link", ["", "pictures", "pictures/train"])
def test_a_link_anywhere_in_the_path_is_refused(link: str, objects: Path) -> None:
    (objects / link).rename(objects.parent / "moved")
    (objects / link).symlink_to(objects.parent / "moved")
    with pytest.raises(NotADirectoryError, match="symbolic link"):
        SafeFolders(objects).check("pictures/train/a.jpg")


def test_a_folder_is_examined_again_only_after_forget(objects: Path) -> None:
    folders = SafeFolders(objects)
    folders.check("pictures/train/a.jpg")
    (objects / "pictures/train").rmdir()
    (objects / "pictures/train").symlink_to(objects.parent / "outside")
    folders.check("pictures/train/b.jpg")
    folders.forget()
    with pytest.raises(NotADirectoryError):
        folders.check("pictures/train/b.jpg")


def test_nothing_is_checked_or_created_in_a_directory_that_is_not_ours(objects: Path) -> None:
    folders = SafeFolders(objects, refuse)
    with pytest.raises(OSError, match="not ours"):
        folders.check("pictures/train/a.jpg")
    with pytest.raises(OSError, match="not ours"):
        folders.make_parents("pictures/new/a.jpg")
    assert not (objects / "pictures/new").exists()
