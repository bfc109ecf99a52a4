"""Decodes the bytes of an object or a file to an image: the only place that unpacks or decodes anything."""

import io
import zlib

from PIL import Image, UnidentifiedImageError

from gcs_prefetchd.shared.errors import ItemError

__all__ = ["decode", "gunzip"]

GZIP_MAGIC = b"\x1f\x8b"
MAX_GUNZIPPED_BYTES = 1 << 30  # no image of a dataset is larger, and 300 KB of gzip can hold 315 MB


def decode(data: bytes, name: str, mode: str | None = "RGB") -> Image.Image:
    """The image that `data` holds, fully loaded and converted to `mode`; None keeps the stored mode.

    Objects stored with Content-Encoding: gzip arrive as stored and are unpacked here. Raises ItemError, which names the image
    `name` (a path or a URI), if the bytes are not a valid image, or one that is too large to unpack safely.
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
    except Exception as exc:  # Pillow's parsers raise many kinds: OSError, SyntaxError, struct.error, ...
        raise ItemError(f"{name}: is not an image that Pillow can read ({len(data)} bytes: {_describe(exc)})") from exc


def _describe(exc: Exception) -> str:
    # "cannot identify image file <_io.BytesIO object at 0x...>" adds nothing to the name of its class.
    text = "" if isinstance(exc, UnidentifiedImageError) else f": {exc}"
    return f"{type(exc).__name__}{text}"


def gunzip(data: bytes, name: str, limit_bytes: int = MAX_GUNZIPPED_BYTES) -> bytes:
    """Unpack all members of a gzip stream, up to the limit; raises ItemError."""
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
            raise ItemError(f"{name}: is truncated gzip")
        rest = inflater.unused_data
    return bytes(unpacked)
