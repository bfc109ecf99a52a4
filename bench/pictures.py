"""The images of the loader benchmarks: JPEGs of about 100 KB with PNG labels, each under several names."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from rig import BUCKET

__all__ = ["make_pictures"]

SIDE = 512
# Blotches under noise: noise alone compresses to three times the size, blotches alone to a third.
BLOTCHES, NOISE, QUALITY = 32, 18, 85
CLASSES, CLASS_BLOCKS = 7, 16


def make_pictures(folder: Path, distinct: int, names_each: int = 1, seed: int = 0) -> Path:
    """Write `distinct * names_each` items below the folder, as a bucket; returns the data root within it.

    Hard links give the other names: a large dataset costs neither drawing time nor disk space.
    """
    root = folder / BUCKET / "items"
    random = np.random.default_rng(seed)
    for part, end, draw in (("images", "jpg", _jpeg), ("labels", "png", _label)):
        (root / part).mkdir(parents=True)
        for number in range(distinct):
            drawn = root / part / f"{number:06}.{end}"
            drawn.write_bytes(draw(random))
            for again in range(1, names_each):
                os.link(drawn, root / part / f"{number + again * distinct:06}.{end}")
    return root


def _jpeg(random: np.random.Generator) -> bytes:
    small = Image.fromarray(random.integers(0, 256, (BLOTCHES, BLOTCHES, 3), dtype=np.uint8))
    blotches = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = random.integers(-NOISE, NOISE, (SIDE, SIDE, 1), dtype=np.int16, endpoint=True)
    return _saved(Image.fromarray(np.clip(blotches + noise, 0, 255).astype(np.uint8)), "JPEG", quality=QUALITY)


def _label(random: np.random.Generator) -> bytes:
    blocks = Image.fromarray(random.integers(0, CLASSES, (CLASS_BLOCKS, CLASS_BLOCKS), dtype=np.uint8))
    return _saved(blocks.resize((SIDE, SIDE), Image.Resampling.NEAREST), "PNG")


def _saved(image: Image.Image, kind: str, **settings: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()
