"""Every file below `objects/` is found once, and nothing that is not ours is touched."""

import os
import threading
from itertools import chain
from pathlib import Path

import pytest

from gcs_prefetchd.cache.file_scan import FoundFile, find_each, find_files, unlink_all
from gcs_prefetchd.cache.safe_folders import SafeFolders
from gcs_prefetchd.cache.temp_file import publish_file
from gcs_prefetchd.shared.checked_read import Stamp
from gcs_prefetchd.shared.objects import ObjectName
from support.caches import content, stamp_of

OBJECT = ObjectName("pictures", "a.jpg")


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    folder = tmp_path / "objects"
    folder.mkdir()
    return folder


def published(objects: Path, path: str, data: bytes, generation: int = 1, stamp: Stamp | None = None) -> Path:
    unfinished = objects.parent / f"unfinished-{threading.get_ident()}"
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        publish_file(file.fileno(), str(unfinished), SafeFolders(objects), path, stamp or stamp_of(data, generation), None)
    return objects / path


# Unlinking


def test_existing_files_are_unlinked_and_missing_ones_are_skipped(objects: Path) -> None:
    file = published(objects, "pictures/a.jpg", b"x")
    assert unlink_all(SafeFolders(objects), ["absent", "pictures/a.jpg/below-a-file", "pictures/a.jpg"]) == {}
    assert not file.exists()


def test_a_file_that_cannot_be_unlinked_is_logged_and_the_others_are_removed(
    objects: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = published(objects, "pictures/a.jpg", b"x")
    assert unlink_all(SafeFolders(objects), ["pictures", "pictures/a.jpg"]) == {"pictures": "Is a directory"}
    assert not file.exists()
    assert "cached pictures and 0 others: cannot be unlinked: Is a directory" in caplog.text


# Scanning


def found_in(objects: Path, at_most: int = 3) -> list[FoundFile]:
    pages = list(find_files(objects, at_most))
    assert [len(page) for page in pages[:-1]] == [at_most] * (len(pages) - 1)
    return sorted(chain.from_iterable(pages), key=lambda found: found.path)


def test_every_file_is_found_once_a_page_at_a_time(objects: Path) -> None:
    for i in range(20):
        published(objects, f"pictures/{i % 3}/{i:02}.jpg", content(i, i), i)
    expected = [FoundFile(f"pictures/{i % 3}/{i:02}.jpg", i, stamp_of(content(i, i), i)) for i in range(20)]
    assert found_in(objects) == sorted(expected, key=lambda found: found.path)


def test_foreign_files_have_no_stamp_and_only_regular_files_are_found(objects: Path) -> None:
    published(objects, "same", b"x")
    published(objects, "short", b"", stamp=stamp_of(b"x"))
    (objects / "bare").write_bytes(b"x")
    (objects / "linked").symlink_to(objects / "same")
    os.mkfifo(objects / "pipe")

    found = [FoundFile("bare", 1, None), FoundFile("same", 1, stamp_of(b"x")), FoundFile("short", 0, stamp_of(b"x"))]
    assert found_in(objects) == found
    paths = ["bare", "linked", "pipe", "same", "short", "absent", "same/below"]
    assert [one for one in find_each(SafeFolders(objects), paths) if one is not None] == found


def test_folders_behind_a_link_are_not_scanned(objects: Path) -> None:
    published(objects, "pictures/a.jpg", b"x")
    (objects / "linked").symlink_to(objects / "pictures")
    assert [found.path for found in found_in(objects)] == ["pictures/a.jpg"]


def test_a_tree_that_is_gone_has_no_files(tmp_path: Path) -> None:
    assert found_in(tmp_path / "absent") == []


def test_files_that_vanish_during_a_scan_are_no_error(objects: Path) -> None:
    known = [f"{i}.jpg" for i in range(500)]
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            unlink_all(SafeFolders(objects), known)
            for path in known:
                published(objects, path, b"x")

    for path in known:
        published(objects, path, b"x")
    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(40):
            found = chain.from_iterable(find_files(objects, 100))
            assert {(one.size, one.stamp) for one in found} <= {(1, stamp_of(b"x")), (1, None)}
    finally:
        stop.set()
        thread.join()
