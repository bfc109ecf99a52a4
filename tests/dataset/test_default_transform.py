"""The default transform: tensors of images and labels. test_image_dataset.py uses it with class indices."""

from pathlib import Path

import torch
from PIL import Image

from gcs_dataset import ImageDataset, to_tensors
from support.datasets import write_local


def test_colour_labels_become_tensors_like_images(tmp_path: Path) -> None:
    write_local(tmp_path, 5)
    image, label = ImageDataset(tmp_path, ["0003"], transform=to_tensors)[0]
    assert (image.shape, label.shape, label.dtype) == ((3, 16, 16), (3, 16, 16), torch.uint8)
    assert label[:, 0, 0].tolist() == [3, 6, 252]


def test_sixteen_bit_classes_are_kept() -> None:
    _, label = to_tensors((Image.new("RGB", (2, 2)), Image.new("I;16", (2, 2), 40_000)))
    assert set(label.flatten().tolist()) == {40_000}
