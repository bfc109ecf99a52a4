"""Names of objects and where they lie in the cache."""

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from gcs_prefetchd.shared.errors import InvalidNameError
from gcs_prefetchd.shared.objects import MAX_NAME_BYTES, DataRoot, ObjectName, parse_object_uri, validate_bucket
from gcs_prefetchd.shared.paths import _ORDINARY, _path_by_rules, cache_path, cache_path_of_uri, object_at_path

BUCKET = "pictures"

# What GCS allows, and what is hard in it more often than chance has it.
_characters = st.characters(exclude_categories=["Cs"])
_awkward = st.sampled_from(
    ["", ".", "..", "%", "%e", "%f", "%d", "%h", "%2E", "\n", "\x00", "a.jpg", "a", "d.d", ".jpg", "x" * 300]
)
_segments = st.one_of(_awkward, st.text(_characters, max_size=12), st.text(st.sampled_from("%edfhEDFH25.aA"), max_size=6))
object_names = (
    st.one_of(st.lists(_segments, min_size=1, max_size=6).map("/".join), st.text(_characters, min_size=1, max_size=1024))
    .map(lambda name: name.encode()[:1024].decode(errors="ignore"))
    .filter(bool)
)


@given(object_names)
@example("/" * 1024)
@example("\x00" * 1024)
@example("%" * 1024)
@example("é" * 512)
@example("😀" * 256)
@example(".")
@example("../../etc/passwd")
@example("%h/ab/abcdef")
def test_no_name_leads_outside_the_tree(name: str) -> None:
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
def test_two_names_never_share_a_path_nor_one_the_folder_of_another(names: list[str]) -> None:
    files = {cache_path(BUCKET, name) for name in names}
    assert len(files) == len(names)
    folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
    assert not files & folders


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(object_names, min_size=1, max_size=10, unique=True))
@example(["d", "d/e", "foo.jpg", "foo.jpg/x.jpg", "d/", "/", "x" * 255, "é" * 127 + ".jpg", "\n", "..", "a/../b"])
@example(["café.jpg", "cafe\u0301.jpg", "CAFÉ.jpg", "a.jpg", "A.jpg"])
@example(["/".join(["a"] * 512), "/" * 700, "%" * 680, "\x01" * 600])
def test_any_names_can_lie_on_a_disk_together(tmp_path: Path, names: list[str]) -> None:
    """On the file system itself: also what it says of case, of normalisation and of long paths."""
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
def test_a_path_tells_the_name_unless_it_holds_a_hash(name: str) -> None:
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
def test_only_a_path_that_the_mapping_makes_has_a_name(path: str) -> None:
    """Whatever an administrator puts into the tree, no file is taken for an object that lies elsewhere."""
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
def test_names_that_differ_in_case_or_normalisation_alone_stay_different(name: str) -> None:
    for other in (name.upper(), name.lower(), unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        assume(len(other.encode()) <= 1024)
        assert (cache_path(BUCKET, other) == cache_path(BUCKET, name)) == (other == name)


def test_one_word_in_two_normal_forms_has_two_paths() -> None:
    composed, decomposed = "caf\u00e9.jpg", "cafe\u0301.jpg"
    assert cache_path(BUCKET, composed) == f"{BUCKET}/{composed}"
    assert cache_path(BUCKET, decomposed) == f"{BUCKET}/{decomposed}"


@given(object_names)
def test_a_uri_reads_back_as_the_object(name: str) -> None:
    assert parse_object_uri(ObjectName(BUCKET, name).uri) == ObjectName(BUCKET, name)


@pytest.mark.parametrize("bucket", ["abc", "a-b_c", "a.b.c", "0" * 63, "a1.example.com", f"{'a' * 63}.{'b' * 63}.{'c' * 63}.d"])
def test_buckets_that_gcs_allows_pass(bucket: str) -> None:
    validate_bucket(bucket)


@pytest.mark.parametrize(
    "bucket",
    [
        *(
            "",
            "ab",
            "a" * 64,
            "Pictures",
            "-abc",
            "abc-",
            "a/b",
            "a b",
            "a..b",
            ".abc",
            "abc.",
            "a?b",
            "a#b",
            "a%2fb",
            "a\nb",
            "abc\n",
        ),
        *("192.168.0.1", "bücket", "a" * 64 + ".com", ".".join(["a" * 60] * 4), "..", "a\x00b", "x" * 10_000),
    ],
)
def test_any_other_bucket_is_refused_in_one_line_that_names_it(bucket: str) -> None:
    """Clients do not quote buckets: one that holds a slash or a question mark would be another request."""
    with pytest.raises(InvalidNameError) as caught:
        validate_bucket(bucket)
    text = str(caught.value)
    assert text.startswith(repr(bucket)[:150])
    assert "\n" not in text
    assert len(text) < 500


@pytest.mark.parametrize(
    ("uri", "wrong"),
    [
        ("", "is not a gs:// URI"),
        ("/data/images", "is not a gs:// URI"),
        ("s3://pictures/a.jpg", "is not a gs:// URI"),
        ("GS://pictures/a.jpg", "is not a gs:// URI"),
        ("gs:/pictures/a.jpg", "is not a gs:// URI"),
        ("gs://", "is not a valid bucket name"),
        ("gs:///a.jpg", "is not a valid bucket name"),
        ("gs://Pictures/a.jpg", "is not a valid bucket name"),
        ("gs://pictures?x/a.jpg", "is not a valid bucket name"),
        ("gs://pictures/" + "x" * 1025, "1025 bytes"),
        ("gs://pictures/" + "é" * 513, "1026 bytes"),
        ("gs://pictures/\ud800.jpg", "not valid Unicode"),
    ],
)
def test_a_bad_uri_gets_one_line_that_names_it(uri: str, wrong: str) -> None:
    for parse in (parse_object_uri, DataRoot.parse):
        with pytest.raises(InvalidNameError, match=wrong) as caught:
            parse(uri)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("uri", ["gs://pictures", "gs://pictures/"])
def test_an_object_needs_a_name(uri: str) -> None:
    with pytest.raises(InvalidNameError, match=rf"'{uri}' is not a valid object name: it has 0 bytes"):
        parse_object_uri(uri)


@pytest.mark.parametrize(
    ("uri", "root", "folder"),
    [
        ("gs://pictures", "gs://pictures", ""),
        ("gs://pictures/", "gs://pictures", ""),
        ("gs://pictures/train", "gs://pictures/train", "train/"),
        ("gs://pictures/train/", "gs://pictures/train", "train/"),
        ("gs://pictures/a/b//", "gs://pictures/a/b", "a/b/"),
        ("gs://pictures/a?b#c", "gs://pictures/a?b#c", "a?b#c/"),
    ],
)
def test_a_data_root_is_the_same_with_and_without_trailing_slashes(uri: str, root: str, folder: str) -> None:
    assert DataRoot.parse(uri).uri == root
    assert DataRoot.parse(root) == DataRoot.parse(uri)
    assert DataRoot.parse(uri).folder == folder


def test_a_data_root_holds_what_lies_below_it_and_nothing_else() -> None:
    root = DataRoot.parse("gs://pictures/train")
    assert ObjectName("pictures", "train/images/1.jpg") in root
    assert ObjectName("pictures", "training/images/1.jpg") not in root
    assert ObjectName("pictures", "train") not in root
    assert ObjectName("drawings", "train/images/1.jpg") not in root
    assert ObjectName("pictures", "anything") in DataRoot.parse("gs://pictures")


# --- The short way of ordinary names


@given(st.one_of(st.from_regex(_ORDINARY, fullmatch=True), object_names))
@example("a" * 200 + ".jpg")
@example("images/7.jpg\n")
@example("v1.0/7.jpg")
@example("images/7")
@example("a/" * 600 + "7.jpg")
def test_the_short_way_of_a_name_ends_where_the_rules_do(name: str) -> None:
    assert cache_path("pictures", name) == f"pictures/{_path_by_rules(name)}"


@given(st.one_of(st.from_regex(_ORDINARY, fullmatch=True), object_names), st.sampled_from(["pictures", "a.b.c", "0" * 63]))
def test_the_path_of_a_uri_is_that_of_its_name(name: str, bucket: str) -> None:
    assume(len(name.encode()) <= MAX_NAME_BYTES)
    assert cache_path_of_uri(f"gs://{bucket}/{name}") == cache_path(bucket, name)


@pytest.mark.parametrize("uri", ["images/7.jpg", "gs://pictures", "gs://ab/7.jpg", "gs://Pictures/7.jpg", "gs://1.2.3.4/7.jpg"])
def test_a_uri_that_is_none_has_no_path(uri: str) -> None:
    with pytest.raises(InvalidNameError):
        cache_path_of_uri(uri)
