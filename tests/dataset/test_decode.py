"""Bytes to images: modes, gzip, and everything that is not an image."""

import gzip
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image

from gcs_dataset.decode import decode, gunzip
from gcs_prefetchd.shared.errors import ItemError
from support.datasets import SIZE, encoded, image_bytes, label_bytes, number_of


def test_an_image_is_loaded_and_in_rgb() -> None:
    image = decode(image_bytes(7), "x")
    assert (image.mode, image.size, number_of(image)) == ("RGB", (SIZE, SIZE), 7)


def test_a_grey_image_becomes_rgb() -> None:
    assert decode(encoded(Image.new("L", (4, 4), 9), "PNG"), "x").getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_no_mode_keeps_class_indices(mode: str) -> None:
    stored = Image.new(mode, (4, 4), 1)
    image = decode(encoded(stored, "PNG"), "x", None)
    assert (image.mode, image.getpixel((0, 0))) == (mode, stored.getpixel((0, 0)))


def test_palette_labels_become_colours_in_rgb() -> None:
    assert decode(label_bytes(3), "x").getpixel((0, 0)) == (3, 6, 252)


@pytest.mark.parametrize("members", [1, 2])
def test_a_gzipped_object_is_unpacked(members: int) -> None:
    data = image_bytes(7)
    parts = [data] if members == 1 else [data[:100], data[100:]]
    assert number_of(decode(b"".join(gzip.compress(part) for part in parts), "x")) == 7


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>sign in</html>", image_bytes(7)[:200], b"\x89PNG\r\n\x1a\n", gzip.compress(b"text"), bytes(1000)],
    ids=["empty", "html", "cut", "header", "gzipped text", "zeros"],
)
def test_bytes_that_are_not_an_image_are_named(data: bytes) -> None:
    with pytest.raises(ItemError, match=r"gs://b/images/7\.jpg: is not an image"):
        decode(data, "gs://b/images/7.jpg")


@pytest.mark.parametrize("data", [gzip.compress(image_bytes(7))[:-20], gzip.compress(image_bytes(7))[:40] + bytes(80)])
def test_damaged_gzip_is_named(data: bytes) -> None:
    with pytest.raises(ItemError, match=r"x: is (damaged gzip|truncated gzip)"):
        decode(data, "x")


def test_gzip_that_unpacks_to_too_many_bytes_is_named_and_not_unpacked() -> None:
    bomb = gzip.compress(bytes(1 << 24)) * 4
    tracemalloc.start()
    try:
        with pytest.raises(ItemError, match="x: its gzip unpacks to more than 1000 bytes"):
            gunzip(bomb, "x", limit_bytes=1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_gzip_may_unpack_to_the_limit() -> None:
    assert gunzip(gzip.compress(bytes(600)) + gzip.compress(bytes(400)), "x", limit_bytes=1000) == bytes(1000)


def test_a_decompression_bomb_is_named() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    with pytest.raises(ItemError, match=r"x: Image size .* exceeds limit"):
        decode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""), "x")
