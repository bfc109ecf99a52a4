"""Object names map to paths in the cache, and back."""

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from gcs_prefetchd.shared.errors import InvalidNameError
from gcs_prefetchd.shared.objects import MAX_NAME_BYTES, ObjectName
from gcs_prefetchd.shared.paths import _ORDINARY, _path_by_rules, cache_path, cache_path_of_uri, object_at_path
from support.object_names import BUCKET, object_names


@given(object_names)
@example("/" * 1024)
@example("\x00" * 1024)
@example("%" * 1024)
@example("é" * 512)
@example("😀" * 256)
@example(".")
@example("../../etc/passwd")
@example("%h/ab/abcdef")
def test_no_name_maps_outside_the_tree(name: str) -> None:
    path = cache_path(BUCKET, name)
    bucket, *segments = path.split("/")
    assert bucket == BUCKET
    assert segments
    assert not {"", ".", ".."} & set(segments)
    assert not any(ord(character) < 32 or ord(character) == 127 for character in path)
    assert all(len(segment.encode()) <= 255 for segment in segments)
    assert len(path.encode()) <= len(BUCKET) + 1 + 2048


@given(st.lists(object_names, min_size=2, max_size=12, unique=True))
@example(["d", "d/e"])
@example(["d", "d/", "d//", "/d", "d/e", "d/e/f"])
@example(["foo.jpg", "foo.jpg/x.jpg", "foo.jpg%d", "foo.jpg%d/x.jpg"])
@example(["d%f", "d", "d%25f", "d%f/x", "d.f"])
@example(["%e", "/", "//", "%e%f", "a/%e"])
@example([".", "%2E", "%252E", "..", "./.", "../.."])
@example(["x" * 300, "x" * 301, "%h", "%h/x"])
@example(["A.JPG", "a.jpg", "A.jpg"])
def test_names_never_share_a_path_nor_is_one_the_folder_of_another(names: list[str]) -> None:
    files = {cache_path(BUCKET, name) for name in names}
    assert len(files) == len(names)
    folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
    assert not files & folders


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(object_names, min_size=1, max_size=10, unique=True))
@example(["d", "d/e", "foo.jpg", "foo.jpg/x.jpg", "d/", "/", "x" * 255, "é" * 127 + ".jpg", "\n", "..", "a/../b"])
@example(["café.jpg", "cafe\u0301.jpg", "CAFÉ.jpg", "a.jpg", "A.jpg"])
@example(["/".join(["a"] * 512), "/" * 700, "%" * 680, "\x01" * 600])
def test_any_names_can_coexist_on_a_disk(tmp_path: Path, names: list[str]) -> None:
    """On a real file system, with its own rules for case, normalization and long paths."""
    root = tmp_path / os.urandom(8).hex()
    for number, name in enumerate(names):
        path = root / cache_path(BUCKET, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    for number, name in enumerate(names):
        assert (root / cache_path(BUCKET, name)).read_text() == str(number)
    assert sum(len(files) for _, _, files in os.walk(root)) == len(names)


@given(object_names)
@example("%h/ab/cd")
@example("a%fb.jpg")
def test_a_path_maps_back_to_the_name_unless_it_is_a_hash(name: str) -> None:
    path = cache_path(BUCKET, name)
    if path.startswith(f"{BUCKET}/%h/"):
        assert object_at_path(path) is None
    else:
        assert object_at_path(path) == ObjectName(BUCKET, name)


@given(st.one_of(object_names, st.text()))
@example("pictures/%h/ab/abcd")
@example("pictures/a%2Fb.jpg")
@example("pictures/%41.jpg")
@example("pictures/d")
@example("pictures/../x.jpg")
@example("pictures/\udcff.jpg")
@example("pictures")
@example("")
def test_only_paths_of_the_mapping_have_a_name(path: str) -> None:
    """Whatever an administrator puts into the tree, no file counts as an object with another path."""
    name = object_at_path(path)
    assert name is None or cache_path(name.bucket, name.name) == path


@given(object_names)
def test_only_names_too_long_for_a_file_system_are_hashed(name: str) -> None:
    longest = max(len(segment.encode()) for segment in name.split("/"))
    if "/%h/" in cache_path(BUCKET, name):
        assert 3 * longest + 2 > 255 or 3 * len(name.encode()) + 4 * name.count("/") + 4 > 2048
    else:
        assert longest <= 255


@pytest.mark.parametrize(
    "name",
    [
        "images/0001.jpg",
        "train/v1.0/images/a b.jpg",
        "Ümläut/日本.png",
        "n02110341/n02110341_1.JPEG",
        "a/b/c/d/e.tar.gz",
        "train/labels/-1_(2)+~.png",
    ],
)
def test_ordinary_names_map_to_themselves(name: str) -> None:
    assert cache_path(BUCKET, name) == f"{BUCKET}/{name}"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("d", "d%f"),
        ("d/e", "d/e%f"),
        ("foo.jpg/x.jpg", "foo.jpg%d/x.jpg"),
        ("a/", "a/%e%f"),
        ("a//b.png", "a/%e/b.png"),
        ("../x.jpg", "%2E%2E/x.jpg"),
        (".", "%2E%f"),
        ("100%.png", "100%25.png"),
        ("a\nb.png", "a%0Ab.png"),
        (".jpg", ".jpg%f"),
        ("x" * 256, "%h/85/85e62acd750c4eb56b7b6a1d66dca5bfaac5f062608a1a893410d0288936c09a"),
    ],
)
def test_the_mapping_never_changes(name: str, path: str) -> None:
    """Readers of other versions compute it too, and caches outlive upgrades."""
    assert cache_path(BUCKET, name) == f"{BUCKET}/{path}"


@given(object_names)
def test_names_that_differ_only_in_case_or_normalization_have_different_paths(name: str) -> None:
    for other in (name.upper(), name.lower(), unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        assume(len(other.encode()) <= 1024)
        assert (cache_path(BUCKET, other) == cache_path(BUCKET, name)) == (other == name)


def test_one_word_in_two_normal_forms_has_two_paths() -> None:
    composed, decomposed = "caf\u00e9.jpg", "cafe\u0301.jpg"
    assert cache_path(BUCKET, composed) == f"{BUCKET}/{composed}"
    assert cache_path(BUCKET, decomposed) == f"{BUCKET}/{decomposed}"


# --- The shortcut for ordinary names


@given(st.one_of(st.from_regex(_ORDINARY, fullmatch=True), object_names))
@example("a" * 200 + ".jpg")
@example("images/7.jpg\n")
@example("v1.0/7.jpg")
@example("images/7")
@example("a/" * 600 + "7.jpg")
def test_the_shortcut_for_a_name_gives_the_path_of_the_rules(name: str) -> None:
    assert cache_path("pictures", name) == f"pictures/{_path_by_rules(name)}"


@given(st.one_of(st.from_regex(_ORDINARY, fullmatch=True), object_names), st.sampled_from(["pictures", "a.b.c", "0" * 63]))
def test_the_path_of_a_uri_is_the_path_of_its_name(name: str, bucket: str) -> None:
    assume(len(name.encode()) <= MAX_NAME_BYTES)
    assert cache_path_of_uri(f"gs://{bucket}/{name}") == cache_path(bucket, name)


@pytest.mark.parametrize("uri", ["images/7.jpg", "gs://pictures", "gs://ab/7.jpg", "gs://Pictures/7.jpg", "gs://1.2.3.4/7.jpg"])
def test_an_invalid_uri_has_no_path(uri: str) -> None:
    with pytest.raises(InvalidNameError):
        cache_path_of_uri(uri)
