"""A directory is served as buckets: read on request, never left, never written. The same from the command line."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from gcs_prefetchd.testing import ServingGCS, serving
from gcs_prefetchd.testing.directory_bucket import DiskBucket
from gcs_prefetchd.testing.stored_objects import Attributes

BIG = os.urandom(3_000_000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {"bucket/images/1.jpg": b"one", "bucket/images/2.jpg": b"two", "bucket/big": BIG, "secret": b"no"}
    for name, data in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "outside").write_bytes(b"no")
    return tmp_path / "root"


@pytest.fixture
def server(root: Path) -> Iterator[ServingGCS]:
    with serving(root=root) as server:
        yield server


def get(server: ServingGCS, path: str, **headers: str) -> bytes:
    with urlopen(Request(server.url + path, headers=headers)) as response:
        body: bytes = response.read()
    return body


def test_files_are_objects_and_directories_are_in_their_names(server: ServingGCS) -> None:
    assert server.names("bucket") == ["big", "images/1.jpg", "images/2.jpg"]
    assert get(server, "/bucket/images/1.jpg") == b"one"
    assert get(server, "/bucket/big") == BIG
    assert get(server, "/bucket/big", Range="bytes=100-2000099") == BIG[100:2_000_100]
    listed = json.loads(get(server, "/storage/v1/b/bucket/o?prefix=images/"))
    assert [(item["name"], item["size"], item["contentType"]) for item in listed["items"]] == [
        ("images/1.jpg", "3", "image/jpeg"),
        ("images/2.jpg", "3", "image/jpeg"),
    ]


def test_a_file_that_changes_is_a_new_generation(server: ServingGCS, root: Path) -> None:
    before = server.get("bucket", "images/1.jpg")
    path = root / "bucket/images/1.jpg"
    path.write_bytes(b"uno!")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    after = server.get("bucket", "images/1.jpg")
    assert before is not None
    assert after is not None
    assert after.generation > before.generation
    assert after.crc32c != before.crc32c
    assert get(server, "/bucket/images/1.jpg") == b"uno!"
    path.unlink()
    assert server.get("bucket", "images/1.jpg") is None


def test_a_file_is_hashed_once(root: Path) -> None:
    bucket = DiskBucket("bucket", root / "bucket")
    assert not bucket.is_quick("big")
    first = bucket.get("big")
    assert bucket.is_quick("big")
    assert bucket.get("big") is first


@pytest.mark.parametrize(
    "path",
    [
        "/bucket/../secret",
        "/bucket/..%2Fsecret",
        "/bucket/images/../../secret",
        "/bucket/%2e%2e/%2e%2e/outside",
        "/bucket/..%2F..%2Foutside",
        "/bucket//etc/passwd",
        "/bucket/%2Fetc%2Fpasswd",
        "/storage/v1/b/bucket/o/..%2F..%2Foutside?alt=media",
        "/storage/v1/b/bucket/o/%2Fetc%2Fpasswd?alt=media",
        "/storage/v1/b/../o/secret?alt=media",
        "/storage/v1/b/%2e%2e/o/outside?alt=media",
        "/../outside",
        "/bucket/images",
        "/bucket/images/",
        "/bucket/./big",
        "/bucket/big%00",
        "/bucket/" + "x" * 300,
    ],
)
def test_no_name_leaves_the_bucket(server: ServingGCS, path: str) -> None:
    with pytest.raises(HTTPError) as caught:
        get(server, path)
    with caught.value as refused:
        assert refused.code == 404


def test_uploads_and_deletions_stay_in_memory(server: ServingGCS, root: Path) -> None:
    server.put("bucket", "images/1.jpg", b"new", content_type="image/png")
    server.put("bucket", "images/3.jpg", b"three")
    server.delete("bucket", "images/2.jpg")
    assert server.names("bucket") == ["big", "images/1.jpg", "images/3.jpg"]
    assert get(server, "/bucket/images/1.jpg") == b"new"
    assert (root / "bucket/images/1.jpg").read_bytes() == b"one"
    assert (root / "bucket/images/2.jpg").exists()
    assert not (root / "bucket/images/3.jpg").exists()


def test_an_object_uploaded_again_after_its_deletion_exists_again(root: Path) -> None:
    bucket = DiskBucket("bucket", root / "bucket")
    assert bucket.delete("big")
    assert not bucket.delete("big")
    bucket.put("big", b"small", Attributes())
    stored = bucket.get("big")
    assert stored is not None
    assert stored.read(0, 5) == b"small"


def test_file_names_that_are_not_unicode_are_not_listed(server: ServingGCS, root: Path) -> None:
    (root / "bucket" / os.fsdecode(b"\xff")).write_bytes(b"")
    assert server.names("bucket") == ["big", "images/1.jpg", "images/2.jpg"]


COMMAND = [sys.executable, "-m", "gcs_prefetchd.testing"]


@contextmanager
def running(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command; yields its process and its first line."""
    with subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().rstrip()
        finally:
            process.kill()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_reports_when_it_is_ready_and_stops_cleanly_on_a_signal(root: Path, signal_number: int) -> None:
    with running("--root", str(root), "--port", "0", "--latency-ms", "1.5") as (process, line):
        matched = re.fullmatch(r"GCS emulator ready at (http://127\.0\.0\.1:\d+): 3 objects in 1 bucket, 1\.5 ms latency", line)
        assert matched
        with urlopen(f"{matched[1]}/bucket/images/2.jpg") as response:
            assert response.read() == b"two"
        with urlopen(f"{matched[1]}/_counts") as response:
            assert json.load(response)["objects"]["media"] == {"bucket/images/2.jpg": 1}
        process.send_signal(signal_number)
        rest, errors = process.communicate(timeout=30)
        assert (process.returncode, rest, errors) == (0, "", "")


def test_the_command_refuses_what_it_cannot_serve_in_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[tuple[str, ...], str]] = [
        (("--root", str(tmp_path / "nope")), f"root {tmp_path}/nope: No such file or directory\n"),
        (("--root", str(root / "secret")), f"root {root}/secret: Not a directory\n"),
        (("--root", str(tmp_path / "empty")), f"root {tmp_path}/empty: holds no directory to serve as a bucket\n"),
    ]
    with serving() as taken:
        where = ("--root", str(root), "--port", str(taken.port))
        cases.append((where, f"cannot listen on 127.0.0.1:{taken.port}: Address already in use\n"))
        for options, error in cases:
            done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60, check=False)
            assert (done.returncode, done.stdout, done.stderr) == (2, "", error)


@pytest.mark.parametrize("option", ["--port=70000", "--port=x", "--latency-ms=-1", "--latency-ms=nan", "--bytes-per-s=0"])
def test_the_command_refuses_invalid_options(root: Path, option: str) -> None:
    command = [*COMMAND, "--root", str(root), option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"argument {option.partition('=')[0]}: " in done.stderr
