"""A file is published completely or not at all, with its stamp, and nothing that is not ours is touched."""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gcs_prefetchd.cache.file_scan import unlink_all
from gcs_prefetchd.cache.safe_folders import SafeFolders
from gcs_prefetchd.cache.temp_file import publish_file
from gcs_prefetchd.shared.checked_read import Stamp, read_checked, read_object_name, read_stamp
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


def test_a_published_file_has_its_bytes_and_stamp_and_leaves_no_other_file(objects: Path) -> None:
    published(objects, "pictures/a.jpg", b"abc")
    assert read_checked(objects, "pictures/a.jpg", stamp_of(b"abc")) == b"abc"
    assert [entry.name for entry in objects.parent.iterdir()] == ["objects"]


def test_missing_folders_are_created_and_closed_to_other_users(objects: Path) -> None:
    published(objects, "pictures/a/b/c.jpg", b"c")
    modes = {stat.S_IMODE(folder.stat().st_mode) for folder in objects.rglob("*") if folder.is_dir()}
    assert modes == {0o750}


def test_threads_that_need_the_same_new_folder_all_publish(objects: Path) -> None:
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for i in range(20):
            published(objects, f"pictures/{i}/deep/{number}.jpg", b"x")

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(objects.rglob("*.jpg"))) == 160


def test_a_reader_never_sees_half_a_file(objects: Path) -> None:
    """The reader opens the path all the time, while one generation after another is published there."""
    generations = {n: content(n, 200_000 + n) for n in range(1, 60)}
    published(objects, "pictures/a.jpg", generations[1], 1)
    with reading(objects / "pictures/a.jpg") as seen:
        for n, data in generations.items():
            published(objects, "pictures/a.jpg", data, n)
    assert len(seen) > 0
    assert set(seen) <= {(stamp_of(data, n), data) for n, data in generations.items()}


@contextmanager
def reading(file: Path) -> Iterator[list[tuple[Stamp | None, bytes]]]:
    """Yield what a thread reads there meanwhile, each time with the stamp of the file that it opened."""
    seen: list[tuple[Stamp | None, bytes]] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with file.open("rb") as stream:
                seen.append((read_stamp(stream.fileno(), "pictures/a.jpg"), stream.read()))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_a_reader_with_an_open_file_keeps_its_bytes(objects: Path) -> None:
    file = published(objects, "pictures/a.jpg", b"first")
    with file.open("rb") as stream:
        published(objects, "pictures/a.jpg", b"second")
        unlink_all(SafeFolders(objects), ["pictures/a.jpg"])
        assert stream.read() == b"first"


def test_a_file_cached_under_a_hash_carries_its_objects_name(objects: Path) -> None:
    unfinished = objects / "unfinished"
    with unfinished.open("wb") as file:
        publish_file(file.fileno(), str(unfinished), SafeFolders(objects), "pictures/%h/ab/abcd", stamp_of(b""), OBJECT)

    assert os.getxattr(objects / "pictures/%h/ab/abcd", "user.gcs.name") == b"gs://pictures/a.jpg"
    assert read_object_name(objects / "pictures/%h/ab/abcd") == OBJECT


def test_a_file_with_a_missing_or_invalid_name_has_no_object(objects: Path) -> None:
    file = published(objects, "a.jpg", b"x")
    assert read_object_name(file) is None
    assert read_object_name(objects / "absent") is None
    for senseless in (b"", b"a.jpg", b"gs://", b"gs://pictures/", b"\xff", b"http://pictures/a.jpg"):
        os.setxattr(file, "user.gcs.name", senseless)
        assert read_object_name(file) is None


@pytest.mark.parametrize("in_the_way", ["pictures", "pictures/a.jpg/b.jpg"])
def test_a_foreign_file_or_folder_in_the_way_is_an_error_and_stays(in_the_way: str, objects: Path) -> None:
    foreign = objects / in_the_way
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("mine")
    with pytest.raises(OSError, match="directory"):
        published(objects, "pictures/a.jpg", b"x")
    assert foreign.read_text() == "mine"


def test_publishing_over_a_link_replaces_the_link_and_not_its_target(objects: Path) -> None:
    precious = objects.parent / "precious"
    precious.write_text("mine")
    (objects / "a.jpg").symlink_to(precious)

    file = published(objects, "a.jpg", b"x")

    assert not file.is_symlink()
    assert precious.read_text() == "mine"
