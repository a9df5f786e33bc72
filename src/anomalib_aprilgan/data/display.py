"""Images at the size at which they are shown."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_dtype

from .reading import read_picture


def display_image(path: str, max_side: int) -> Tensor:
    """The image of a file, ``(3, h, w)``, uint8, at most ``max_side`` long.

    Args:
        path: The file.
        max_side: Longest side in pixels.

    Raises:
        UnreadableImageError: The file cannot be read.
    """
    image = read_picture(path)
    scale = max_side / max(image.shape[-2:])
    if scale < 1.0:
        image = resize(image, [max(1, round(side * scale)) for side in image.shape[-2:]], antialias=True)
    shown: Tensor = to_dtype(image.clamp(0.0, 1.0), torch.uint8, scale=True)
    return shown
