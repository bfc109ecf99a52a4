"""The loader that reads directly from GCS: what it retries, permanent errors, its deadline, one client per process.

The module gcs_client has no tests of its own: this loader and the listing are its only users, and all its promises are theirs.
"""

import gc
import gzip
import logging
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from gcs_dataset import ImageDataset, gcs_pil_loader
from gcs_dataset.gcs_client import storage_client
from gcs_dataset.gcs_loader import GCSLoader
from gcs_prefetchd.shared.errors import (
    AccessDeniedError,
    CredentialsError,
    InvalidNameError,
    ItemError,
    ObjectMissingError,
    OriginError,
    OriginUnavailableError,
    PrefetchdError,
    SettingsError,
)
from gcs_prefetchd.testing import (
    Close,
    Cut,
    Drip,
    EmptyBody,
    Fault,
    FlippedByte,
    HtmlPage,
    Kind,
    LongBody,
    MissingHash,
    Reset,
    ServingGCS,
    Stall,
    Status,
)
from support.datasets import ROOT, fill, gcs, image_bytes, number_of, read_all, warnings_of

URI = f"{ROOT}/images/0007.jpg"
KEY = "pictures/set/images/0007.jpg"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServingGCS]:
    with gcs(monkeypatch) as server:
        fill(server, 8)
        yield server


def pairs_from_workers(context: str) -> list[tuple[int, int]]:
    dataset = ImageDataset(ROOT, ["0001", "0002", "0003", "0004"], gcs_pil_loader, Numbers(), label_mode="index")
    workers = 2 if context == "fork" else 1  # a spawned worker takes seconds to import torch
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context)
    return [tuple(pair) for pair in loader]


class Numbers:
    """A transform that returns the numbers that image and label were made from."""

    def __call__(self, pair: tuple[object, object]) -> tuple[int, int]:
        image, label = pair
        return number_of(image), label.getpixel((0, 0))  # type: ignore[arg-type,attr-defined]


def test_an_image_is_read_by_one_request(server: ServingGCS) -> None:
    assert number_of(gcs_pil_loader(URI)) == 7
    counts = server.counts
    assert (counts.total(), counts.total(Kind.MEDIA)) == (1, 1)


def test_no_mode_keeps_class_indices(server: ServingGCS) -> None:
    label = gcs_pil_loader(f"{ROOT}/labels/0003.png", mode=None)
    assert (label.mode, label.getpixel((0, 0))) == ("P", 3)


@pytest.mark.parametrize(
    "fault",
    [
        Status(408),
        Status(429, retry_after="0"),
        Status(500),
        Status(502),
        Status(503),
        Status(504),
        Status(204),
        FlippedByte(),
        LongBody(),
        EmptyBody(),
        HtmlPage(),
        Cut(100),
        Cut(100, "chunked"),
        Cut(100, "close"),
        Reset(),
        Reset(100),
        Close(),
    ],
    ids=str,
)
def test_transient_errors_are_retried(server: ServingGCS, fault: Fault) -> None:
    server.faults.add(fault, KEY, requests=1)
    assert number_of(gcs_pil_loader(URI)) == 7
    assert server.counts.media[KEY] == 2


def test_a_response_without_a_hash_is_checked_against_the_metadata(server: ServingGCS) -> None:
    server.faults.add(MissingHash(), KEY)
    assert number_of(gcs_pil_loader(URI)) == 7
    assert (server.counts.media[KEY], server.counts.metadata[KEY]) == (1, 1)


def test_a_page_of_the_right_length_is_not_the_object(server: ServingGCS) -> None:
    server.faults.add(HtmlPage(body="x" * len(image_bytes(7))), KEY, requests=1)
    assert number_of(gcs_pil_loader(URI)) == 7
    assert server.counts.media[KEY] == 2


@pytest.mark.parametrize("fault", [Drip(), Stall(100), Stall(None)], ids=str)
def test_the_deadline_is_kept_whatever_the_server_does(server: ServingGCS, fault: Fault) -> None:
    server.faults.add(fault, KEY)
    started_s = time.monotonic()
    with pytest.raises(OriginUnavailableError, match=f"{URI}: gave up after 0.6 s .*no complete response") as caught:
        GCSLoader(deadline_s=0.6)(URI)
    assert time.monotonic() - started_s < 5
    assert "attempts" in str(caught.value)
    server.release()


def test_a_body_that_drips_is_requested_again(server: ServingGCS) -> None:
    server.faults.add(Drip(), KEY, requests=1)
    assert number_of(GCSLoader(deadline_s=4)(URI)) == 7


def test_the_last_failure_is_named_at_the_deadline(server: ServingGCS) -> None:
    server.faults.add(Status(503, body="the weather"), KEY)
    with pytest.raises(OriginUnavailableError, match=f"{URI}: gave up .*503.*the weather"):
        GCSLoader(deadline_s=0.5)(URI)


def test_image_and_label_are_fetched_at_the_same_time(server: ServingGCS) -> None:
    server.faults.add(Stall(None), "*")

    def release_both() -> None:
        server.wait_for(lambda counts: counts.open_media == 2)
        server.faults.clear()
        server.release()

    releasing = threading.Thread(target=release_both)
    releasing.start()
    image, _ = ImageDataset(ROOT, ["0007"], GCSLoader(deadline_s=20))[0]
    releasing.join()
    assert number_of(image) == 7
    assert server.counts.total() == 2


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        (f"{ROOT}/images/none.jpg", ObjectMissingError),
        ("gs://nowhere/images/7.jpg", ObjectMissingError),
        ("gs://closed/images/7.jpg", AccessDeniedError),
        ("gs://payers/images/7.jpg", OriginError),
    ],
)
def test_a_permanent_error_is_named_after_one_request(server: ServingGCS, uri: str, error: type[PrefetchdError]) -> None:
    for bucket in ["closed", "payers"]:
        server.put(bucket, "images/7.jpg", image_bytes(7))
    server.deny("closed")
    server.requester_pays("payers")
    with pytest.raises(error, match=uri) as caught:
        gcs_pil_loader(uri)
    assert type(caught.value) is error
    assert server.counts.total(Kind.MEDIA) == 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # google-auth leaves the response open after which it cannot sign in
def test_a_401_is_permanent_and_names_the_remedy(server: ServingGCS) -> None:
    server.require_token("secret")
    with pytest.raises(CredentialsError, match=f"{URI}: GCS does not accept the credentials .*gcloud auth"):
        gcs_pil_loader(URI)
    assert server.counts.total(Kind.MEDIA) == 1
    gc.collect()


def test_a_user_project_pays(server: ServingGCS) -> None:
    server.put("payers", "images/7.jpg", image_bytes(7))
    server.requester_pays("payers")
    assert number_of(GCSLoader(user_project="mine")("gs://payers/images/7.jpg")) == 7


def test_an_object_that_is_not_an_image_is_named(server: ServingGCS) -> None:
    server.put("pictures", "set/images/text.jpg", b"not an image")
    with pytest.raises(ItemError, match=f"{ROOT}/images/text.jpg: is not an image"):
        gcs_pil_loader(f"{ROOT}/images/text.jpg")


def test_a_gzipped_object_is_fetched_as_stored_and_unpacked_here(server: ServingGCS) -> None:
    packed = gzip.compress(image_bytes(7))
    server.put("pictures", "set/images/packed.jpg", packed, content_encoding="gzip")
    assert number_of(gcs_pil_loader(f"{ROOT}/images/packed.jpg")) == 7
    assert gcs_pil_loader.read(f"{ROOT}/images/packed.jpg") == packed


@pytest.mark.parametrize("uri", ["images/7.jpg", "http://pictures/7.jpg", "gs://pictures", "gs://Pictures/7.jpg"])
def test_an_invalid_uri_is_named(uri: str) -> None:
    with pytest.raises(InvalidNameError, match=r"is not a (gs:// URI|valid object name|valid bucket name)"):
        gcs_pil_loader(uri)


def test_an_endpoint_that_is_not_a_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:9000")
    with pytest.raises(SettingsError, match="STORAGE_EMULATOR_HOST=localhost:9000: must be a URL"):
        gcs_pil_loader(URI)


@pytest.mark.parametrize("key", [None, "{}", "not JSON", '{"type": "service_account", "private_key": "none"}'])
def test_missing_and_corrupt_credentials_name_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str | None
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # no request to the metadata server
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    if key is not None:
        (tmp_path / "key.json").write_text(key)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    with pytest.raises(CredentialsError, match=r"no usable Google credentials.*gcloud auth") as caught:
        gcs_pil_loader(URI)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_while_their_parent_has_read_too(server: ServingGCS, context: str) -> None:
    assert number_of(gcs_pil_loader(URI)) == 7
    assert pairs_from_workers(context) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert number_of(gcs_pil_loader(URI)) == 7


def test_a_forked_child_uses_connections_of_its_own(server: ServingGCS) -> None:
    gcs_pil_loader(URI)
    parents_client = storage_client()
    child = os.fork()
    if child == 0:
        os._exit(0 if number_of(gcs_pil_loader(URI)) == 7 and storage_client() is not parents_client else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert number_of(gcs_pil_loader(URI)) == 7
    assert storage_client() is parents_client


def test_two_requests_at_a_time_overflow_no_pool(server: ServingGCS, caplog: pytest.LogCaptureFixture) -> None:
    dataset = ImageDataset(ROOT, [f"{number:04d}" for number in range(8)], gcs_pil_loader)
    with caplog.at_level(logging.WARNING):
        assert [number_of(image) for image, _ in (dataset[i] for i in range(8))] == list(range(8))
    assert warnings_of(caplog) == []
    assert server.counts.total() == 16  # no request for the bucket, none for telemetry


def test_the_loader_is_pickled_as_its_settings(server: ServingGCS) -> None:
    gcs_pil_loader(URI)
    copy = pickle.loads(pickle.dumps(GCSLoader(7, user_project="mine")))
    assert (copy.deadline_s, copy.user_project) == (7, "mine")


def test_an_error_reaches_the_main_process_unchanged(server: ServingGCS) -> None:
    dataset = ImageDataset(ROOT, ["0001", "missing"], gcs_pil_loader, Numbers())
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    with pytest.raises(ObjectMissingError, match=f"{ROOT}/(images|labels)/missing"):
        read_all(loader)
