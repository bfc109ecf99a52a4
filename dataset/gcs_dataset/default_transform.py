"""The transform of those who bring none: images to tensors that the default collate can batch."""

import numpy as np
import torch
from PIL import Image

__all__ = ["to_tensors"]


def to_tensors(pair: tuple[Image.Image, Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image as uint8 (channels, height, width); label likewise, or int64 (height, width) where it holds class indices.

    A batch of them needs images of one size: bring a transform that crops or resizes where they differ.
    """
    image, label = pair
    pixels, classes = _channels_first(image), _channels_first(label)
    if len(label.getbands()) == 1:
        return pixels, classes[0].to(torch.int64)
    return pixels, classes


def _channels_first(image: Image.Image) -> torch.Tensor:
    array = np.array(image)
    if array.ndim == 2:
        array = array[..., np.newaxis]
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
