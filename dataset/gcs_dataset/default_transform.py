"""The default transform: images to tensors that the default collate function can batch."""

import numpy as np
import torch
from PIL import Image

__all__ = ["to_tensors"]


def to_tensors(pair: tuple[Image.Image, Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Image as uint8 (channels, height, width); label likewise, or int64 (height, width) if it holds class indices.

    Images of one batch must have the same size: if they differ, use a transform that crops or resizes them.
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
