"""Bytes of an object or a file to an image: the one place where anything is unpacked or decoded."""

import io
import zlib

from PIL import Image, UnidentifiedImageError

from gcs_prefetchd.shared.errors import ItemError

__all__ = ["decode", "gunzip"]

GZIP_MAGIC = b"\x1f\x8b"
MAX_GUNZIPPED_BYTES = 1 << 30  # no image of a dataset is larger, and 300 KB of gzip can hold 315 MB


def decode(data: bytes, name: str, mode: str | None = "RGB") -> Image.Image:
    """The image that `data` holds, fully loaded and converted to `mode`; None keeps the stored mode.

    Objects stored with Content-Encoding: gzip arrive as they are stored and are unpacked here. Raises ItemError, which calls
    the image `name` (a path or a URI), where the bytes are no image, or one too large to be unpacked safely.
    """
    if data.startswith(GZIP_MAGIC):
        data = gunzip(data, name)
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            # Converting to the mode that an image already has copies it.
            return image if mode is None or image.mode == mode else image.convert(mode)
    except Image.DecompressionBombError as exc:
        raise ItemError(f"{name}: {exc} (PIL.Image.MAX_IMAGE_PIXELS sets the limit)") from exc
    except Exception as exc:  # Pillow's parsers raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
        raise ItemError(f"{name}: is no image that Pillow can read ({len(data)} bytes: {_reason(exc)})") from exc


def _reason(exc: Exception) -> str:
    # "cannot identify image file <_io.BytesIO object at 0x...>" says nothing more than its class does.
    text = "" if isinstance(exc, UnidentifiedImageError) else f": {exc}"
    return f"{type(exc).__name__}{text}"


def gunzip(data: bytes, name: str, limit_bytes: int = MAX_GUNZIPPED_BYTES) -> bytes:
    """Unpack all members of a gzip stream, no further than the limit; raises ItemError."""
    unpacked = bytearray()
    rest = data
    while rest:
        inflater = zlib.decompressobj(wbits=31)
        try:
            unpacked += inflater.decompress(rest, limit_bytes + 1 - len(unpacked))
        except zlib.error as exc:
            raise ItemError(f"{name}: is damaged gzip ({exc})") from exc
        if len(unpacked) > limit_bytes:
            raise ItemError(f"{name}: its gzip unpacks to more than {limit_bytes} bytes")
        if not inflater.eof:
            raise ItemError(f"{name}: is gzip that ends too early")
        rest = inflater.unused_data
    return bytes(unpacked)
