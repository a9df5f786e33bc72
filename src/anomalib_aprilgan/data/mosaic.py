"""2 x 2 mosaics of images of one category, the paper's augmentation for training on MVTec AD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mosaic(images: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Paste four images and their masks into one canvas, as the authors do (dataset.py, combine_img).

    The canvas is twice as wide and high as the first image. The images are pasted unscaled at its
    four quarters' corners, left to right and top to bottom; later ones overwrite, what sticks out
    is lost, gaps stay black.

    Args:
        images: Four ``(3, H_i, W_i)``.
        masks: Four ``(H_i, W_i)``.

    Returns:
        Image ``(3, 2 H_0, 2 W_0)`` and mask ``(2 H_0, 2 W_0)``.

    Raises:
        ValueError: There are not four of each.
    """
    if len(images) != 4 or len(masks) != 4:
        msg = f"`images` and `masks` must be four each, got {len(images)} and {len(masks)}."
        raise ValueError(msg)
    height, width = images[0].shape[-2:]
    image_canvas = torch.zeros(3, 2 * height, 2 * width, dtype=images[0].dtype)
    mask_canvas = torch.zeros(2 * height, 2 * width, dtype=masks[0].dtype)
    corners = ((0, 0), (0, width), (height, 0), (height, width))
    for (top, left), image, mask in zip(corners, images, masks, strict=True):
        rows = min(image.shape[-2], 2 * height - top)
        columns = min(image.shape[-1], 2 * width - left)
        image_canvas[:, top : top + rows, left : left + columns] = image[:, :rows, :columns]
        mask_canvas[top : top + rows, left : left + columns] = mask[:rows, :columns]
    return image_canvas, mask_canvas
