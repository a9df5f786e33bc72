"""Synthetic defects on images of good parts, for those who have no others to train on."""

from __future__ import annotations

import torch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from torch import Tensor
from torchvision.tv_tensors import Image, Mask


def synthetic_defect(image: Tensor, seed: int) -> tuple[Image, Mask]:
    """The image with blots of noise, drawn by anomalib's Perlin generator, and where they are.

    The defect depends on the seed alone; the state of torch's generator is left as it was. No
    texture data set is used, so that nothing is downloaded.

    Args:
        image: ``(3, H, W)`` in ``[0, 1]``.
        seed: Any non-negative integer below 2^63.

    Returns:
        Image ``(3, H, W)`` in ``[0, 1]``, and mask ``(H, W)``, 1 on the defect.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        changed, mask = PerlinAnomalyGenerator(probability=1.0)(image.as_subclass(Tensor))
    return Image(changed.clamp(0.0, 1.0)), Mask(mask[0].to(torch.uint8))
