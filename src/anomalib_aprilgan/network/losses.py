"""The losses that train the adapters, on each stage's ``(B, 2, H, W)`` probabilities: normal, anomalous."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTHING = 1e-5
# In a mask: nobody knows whether this pixel is anomalous.
UNKNOWN = 255
# Share of the pixels of an anomalous image that are taken to be anomalous where no mask tells.
TOP_SHARE = 0.02


def focal_loss(probabilities: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss on probabilities, as the authors train with it (loss.py, alpha=None).

    ``mean(-(1 - p_t)^gamma * log p_t)`` with ``p_t`` the probability of the true channel, the one-hot target clamped to
    ``[1e-5, 1 - 1e-5]`` and ``1e-5`` added. A ``gamma`` of 0 gives cross entropy. The target ``(B, H, W)`` is 1 (or
    true) where anomalous; another shape gives a ValueError.
    """
    _check_shapes(probabilities, target)
    one_hot = F.one_hot(target.long(), num_classes=2).movedim(-1, 1).to(probabilities.dtype)
    one_hot = one_hot.clamp(SMOOTHING, 1.0 - SMOOTHING)
    true_probability = (one_hot * probabilities).sum(dim=1) + SMOOTHING
    return (-((1.0 - true_probability) ** gamma) * true_probability.log()).mean()


def dice_loss(probability: Tensor, target: Tensor) -> Tensor:
    """One minus the dice overlap of anomalous probability and mask, both ``(B, H, W)`` (authors' BinaryDiceLoss).

    It is averaged over the images. The authors squeeze the mask of a batch of one and average over its rows. Different
    shapes give a ValueError.
    """
    if probability.shape != target.shape:
        shapes = f"{tuple(probability.shape)} and {tuple(target.shape)}"
        msg = f"`probability` and `target` must have one shape, got {shapes}."
        raise ValueError(msg)
    predicted, expected = probability.flatten(1), target.flatten(1).to(probability.dtype)
    overlap = (predicted * expected).sum(dim=1)
    return 1.0 - ((2.0 * overlap + 1.0) / (predicted.sum(dim=1) + expected.sum(dim=1) + 1.0)).mean()


def adapter_loss(stage_probabilities: Sequence[Tensor], target: Tensor) -> Tensor:
    """Focal plus dice loss for masks ``(B, H, W)``, summed over the stages: what the paper minimises."""
    losses = [focal_loss(maps, target) + dice_loss(maps[:, 1], target) for maps in stage_probabilities]
    return torch.stack(losses).sum()


def partial_adapter_loss(stage_probabilities: Sequence[Tensor], target: Tensor) -> Tensor:
    """Every image contributes what is known of it: ``adapter_loss`` with a mask, else one of its label.

    This is ours, not the paper's, which trains on masks alone. ``target`` ``(B, H, W)`` is 0, 1 or ``UNKNOWN``.
    The loss is the mean over the images. One with a mask, a normal one's being zero, counts with
    ``adapter_loss``; where all have one this *is* that loss. An image of which any pixel is unknown is
    anomalous somewhere and counts with ``multiple_instance_loss``.
    """
    known = ~(target == UNKNOWN).flatten(1).any(dim=1)
    if known.all():
        return adapter_loss(stage_probabilities, target)
    for maps in stage_probabilities:
        _check_shapes(maps, target)
    loss = multiple_instance_loss([maps[~known] for maps in stage_probabilities])
    if not known.any():
        return loss
    share = known.float().mean()
    return share * adapter_loss([maps[known] for maps in stage_probabilities], target[known]) + (1.0 - share) * loss


def multiple_instance_loss(stage_probabilities: Sequence[Tensor]) -> Tensor:
    """Loss of images that are anomalous nobody knows where: their most anomalous pixels shall be so.

    Multiple-instance learning with an image as the bag and its pixels as the instances; ours, not the paper's. In
    every stage, the anomalous probability is averaged over the highest ``TOP_SHARE`` of the pixels. Its ``-log`` is
    the loss of an image, summed over the stages. Only normal images in the training hold the other pixels down.
    """
    losses = []
    for maps in stage_probabilities:
        anomalous = maps[:, 1].flatten(1)
        highest = anomalous.topk(math.ceil(TOP_SHARE * anomalous.shape[1]), dim=1).values
        losses.append(-(highest.mean(dim=1) + SMOOTHING).log().mean())
    return torch.stack(losses).sum()


def _check_shapes(probabilities: Tensor, target: Tensor) -> None:
    expected = (probabilities.shape[0], *probabilities.shape[2:])
    if probabilities.ndim != 4 or probabilities.shape[1] != 2 or tuple(target.shape) != expected:
        shapes = f"{tuple(probabilities.shape)} and {tuple(target.shape)}"
        msg = f"`probabilities` must be (B, 2, H, W) and `target` (B, H, W), got {shapes}."
        raise ValueError(msg)
