"""Objects and data roots: names, URIs, and the rules of GCS for them."""

import pytest
from hypothesis import given

from gcs_prefetchd.shared.errors import InvalidNameError
from gcs_prefetchd.shared.objects import DataRoot, ObjectName, parse_object_uri, validate_bucket
from support.object_names import BUCKET, object_names


@given(object_names)
def test_an_objects_uri_parses_as_the_object(name: str) -> None:
    assert parse_object_uri(ObjectName(BUCKET, name).uri) == ObjectName(BUCKET, name)


@pytest.mark.parametrize("bucket", ["abc", "a-b_c", "a.b.c", "0" * 63, "a1.example.com", f"{'a' * 63}.{'b' * 63}.{'c' * 63}.d"])
def test_bucket_names_that_gcs_allows_are_accepted(bucket: str) -> None:
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
def test_any_other_bucket_name_is_refused_in_one_line_that_names_it(bucket: str) -> None:
    """Clients do not quote bucket names: with a slash or a question mark it would be another request."""
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
def test_an_invalid_uri_is_refused_in_one_line_that_names_it(uri: str, wrong: str) -> None:
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


def test_a_data_root_contains_the_objects_below_it_and_no_others() -> None:
    root = DataRoot.parse("gs://pictures/train")
    assert ObjectName("pictures", "train/images/1.jpg") in root
    assert ObjectName("pictures", "training/images/1.jpg") not in root
    assert ObjectName("pictures", "train") not in root
    assert ObjectName("drawings", "train/images/1.jpg") not in root
    assert ObjectName("pictures", "anything") in DataRoot.parse("gs://pictures")
