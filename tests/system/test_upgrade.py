"""A cache directory of an earlier version is reopened with its objects and its listing, or refused in one line.

The directory is built literally, byte by byte, as the earlier daemon left it on disk. Nothing here calls the code that writes
such directories today, so a change of the format fails these tests.
"""

import asyncio
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gcs_prefetchd.shared.checked_read import read_checked
from gcs_prefetchd.shared.daemon_client import DaemonClient
from gcs_prefetchd.shared.errors import CacheDirectoryError
from gcs_prefetchd.testing import GCSServer, Kind, Status
from support.daemons import DATA_ROOT, make_settings, running

GENERATION = 1795823639762143
DIGEST = "4d58bebb5875249ac8f390f106ddf9a4"


@dataclass(frozen=True, slots=True)
class File:
    """An object as it is on disk, and its row of the index."""

    data: bytes
    stamp: str
    row: str


# As commit 7ecdd20 left them, the last one before the modules moved into packages. Here item 8 was used before item 7.
FILES: Mapping[str, File] = {
    "pictures/train/images/7.jpg": File(
        b"image 7", f"{GENERATION} 7 9bb8f624 2e8cdc46", f"{GENERATION} 7 9bb8f624 1795823644.831439"
    ),
    "pictures/train/labels/7.png": File(
        b"label 7", f"{GENERATION} 7 eeec0f9b 52192457", f"{GENERATION} 7 eeec0f9b 1795823644.834236"
    ),
    "pictures/train/images/8.jpg": File(
        b"image 8", f"{GENERATION} 7 c5abca00 439dd993", f"{GENERATION} 7 c5abca00 1795823641.866195"
    ),
    "pictures/train/labels/8.png": File(
        b"label 8", f"{GENERATION} 7 b0ff33bf 3f082182", f"{GENERATION} 7 b0ff33bf 1795823641.874234"
    ),
}
MARKER = b"""Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache of gcs-prefetchd, layout 1. The daemon may delete anything below objects/.
"""
# What diskcache 5.6.3 made for the earlier daemon.
INDEX = """
CREATE TABLE Settings (key TEXT NOT NULL UNIQUE, value);
INSERT INTO Settings VALUES ('statistics', 0), ('tag_index', 0), ('eviction_policy', 'none'),
    ('size_limit', 4611686018427387904), ('cull_limit', 0), ('sqlite_auto_vacuum', 1), ('sqlite_cache_size', 8192),
    ('sqlite_journal_mode', 'wal'),
    ('sqlite_mmap_size', 67108864), ('sqlite_synchronous', 1), ('disk_min_file_size', 4611686018427387904),
    ('disk_pickle_protocol', 5), ('count', 0), ('size', 0), ('hits', 0), ('misses', 0);
CREATE TABLE Cache (rowid INTEGER PRIMARY KEY, key BLOB, raw INTEGER, store_time REAL, expire_time REAL, access_time REAL,
    access_count INTEGER DEFAULT 0, tag BLOB, size INTEGER DEFAULT 0, mode INTEGER DEFAULT 0, filename TEXT, value BLOB);
CREATE UNIQUE INDEX Cache_key_raw ON Cache(key, raw);
CREATE INDEX Cache_expire_time ON Cache (expire_time);
CREATE TRIGGER Settings_count_insert AFTER INSERT ON Cache FOR EACH ROW BEGIN
    UPDATE Settings SET value = value + 1 WHERE key = "count"; END;
CREATE TRIGGER Settings_count_delete AFTER DELETE ON Cache FOR EACH ROW BEGIN
    UPDATE Settings SET value = value - 1 WHERE key = "count"; END;
CREATE TRIGGER Settings_size_insert AFTER INSERT ON Cache FOR EACH ROW BEGIN
    UPDATE Settings SET value = value + NEW.size WHERE key = "size"; END;
CREATE TRIGGER Settings_size_update AFTER UPDATE ON Cache FOR EACH ROW BEGIN
    UPDATE Settings SET value = value + NEW.size - OLD.size WHERE key = "size"; END;
CREATE TRIGGER Settings_size_delete AFTER DELETE ON Cache FOR EACH ROW BEGIN
    UPDATE Settings SET value = value - OLD.size WHERE key = "size"; END;
"""
ROW = "INSERT INTO Cache VALUES (NULL, ?, 1, ?, NULL, ?, 0, NULL, 0, 1, NULL, ?)"


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """The directory of a daemon of commit 7ecdd20 that was stopped."""
    path = tmp_path / "cache"
    for folder in ("index", f"manifests/{DIGEST}", "objects", "tmp/00", "tmp/ff"):
        (path / folder).mkdir(mode=0o750, parents=True)
    (path / "CACHEDIR.TAG").write_bytes(MARKER)
    (path / "lock").write_bytes(b"     20982\n")
    (path / "daemon.log").write_text("2026-11-27 23:54:02,963 INFO stopping\n")
    for name, file in FILES.items():
        (path / "objects" / name).parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        (path / "objects" / name).write_bytes(file.data)
        os.setxattr(path / "objects" / name, "user.gcs.object", file.stamp.encode())
    write_index(path / "index/cache.db")
    write_manifest(path / "manifests" / DIGEST)
    return path


def write_index(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = wal")
    connection.executescript(INDEX)
    for name, file in FILES.items():
        used_s = float(file.row.split()[3])
        connection.execute(ROW, (name, used_s, used_s, file.row))
    connection.execute(ROW, ("complete", 0.0, 0.0, "complete"))
    connection.commit()
    connection.close()


def write_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text(
        '{"data_root": "gs://pictures/train", "patterns": ["images/{id}.jpg", "labels/{id}.png"], "incomplete": []}'
    )
    np.save(folder / "ids.npy", np.array([55, 56], dtype=np.uint8))
    np.save(folder / "ends.npy", np.array([1, 2], dtype=np.int64))
    np.save(folder / "generation.npy", np.full((2, 2), GENERATION, dtype=np.int64))
    np.save(folder / "size.npy", np.full((2, 2), 7, dtype=np.int64))
    np.save(folder / "crc32c.npy", np.array([[2612590116, 4008447899], [3316369920, 2969514943]], dtype=np.int64))


async def test_a_cache_of_the_version_before_is_reopened_with_its_objects_and_its_listing(
    gcs: GCSServer, cache_dir: Path
) -> None:
    """Without GCS, so that nothing can be downloaded again."""
    gcs.faults.add(Status(503), kind=Kind.LIST)
    async with running(make_settings(cache_dir, gcs.url, deadline_s=0.5)) as daemon:
        with closing(DaemonClient(cache_dir)) as client:
            listing = await asyncio.to_thread(client.manifest, DATA_ROOT)
        assert (listing.digest, listing.items) == (DIGEST, 2)
        await daemon.prefetcher.settled()
        assert len(daemon.cache) == len(FILES)
        for name, file in FILES.items():
            assert read_checked(daemon.directory.objects, name) == file.data
        assert [path for page in daemon.cache.pages() for path in page] == [
            "pictures/train/images/8.jpg",
            "pictures/train/labels/8.png",
            "pictures/train/images/7.jpg",
            "pictures/train/labels/7.png",
        ]
    assert gcs.counts.total(Kind.MEDIA) == 0


async def test_a_cache_of_another_layout_is_refused_in_one_line_that_explains_what_to_do(
    gcs: GCSServer, cache_dir: Path
) -> None:
    (cache_dir / "CACHEDIR.TAG").write_bytes(MARKER.replace(b"layout 1", b"layout 2"))
    with pytest.raises(CacheDirectoryError, match=r"^cache directory .*; name an empty directory$") as caught:
        async with running(make_settings(cache_dir, gcs.url)):
            pass
    assert "\n" not in str(caught.value)
    assert (cache_dir / "objects/pictures/train/images/7.jpg").read_bytes() == b"image 7"
