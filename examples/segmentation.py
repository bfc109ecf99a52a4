"""A small segmentation task: images of shapes on a noisy ground, the class of every pixel, and a network that learns it."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

__all__ = ["CLASSES", "SIDE", "make_pairs", "network"]

SIDE = 128
CLASSES = 3  # ground, disc, square


def make_pairs(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` images (JPEG) and labels (PNG of class indices) to `folder/images` and `folder/labels`."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    random = np.random.default_rng(seed)
    down, across = np.mgrid[:SIDE, :SIDE]
    for item in range(count):
        label = np.zeros((SIDE, SIDE), np.uint8)
        for kind in (1, 2):
            y, x = random.integers(20, SIDE - 20, 2)
            size = random.integers(10, 30)
            distance_y, distance_x = np.abs(down - y), np.abs(across - x)
            disc, square = distance_y**2 + distance_x**2 < size**2, np.maximum(distance_y, distance_x) < size
            label[disc if kind == 1 else square] = kind
        colours = random.integers(0, 256, (CLASSES, 3))
        image = np.clip(colours[label] + random.normal(0, 25, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"images/{item:05}.jpg", quality=90)
        Image.fromarray(label).save(folder / f"labels/{item:05}.png")


def network() -> nn.Module:
    """From images (N, 3, SIDE, SIDE) in [0, 1] to the logits of the classes (N, CLASSES, SIDE, SIDE)."""

    def block(channels_in: int, channels_out: int, stride: int) -> list[Any]:
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *block(3, 16, 2),
        *block(16, 32, 2),
        *block(32, 32, 1),
        nn.Conv2d(32, CLASSES, 1),
        nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False),
    )
