"""From features to scores and maps: the arithmetic of the method, without state (arXiv:2305.17382, sec. 2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur_image

# The authors' constant (test.py); CLIP's learned logit_scale is not used.
TEMPERATURE = 100.0


def text_logits(features: Tensor, text_features: Tensor) -> Tensor:
    """Scaled cosine similarity of features with the normal and the anomalous text.

    Args:
        features: ``(B, L, D)``, any length; normalised here.
        text_features: ``(B, D, 2)`` or ``(D, 2)``, unit columns: normal, anomalous.

    Returns:
        Logits ``(B, L, 2)`` in ``[-100, 100]``.
    """
    return TEMPERATURE * F.normalize(features, dim=-1) @ text_features


def text_probability(image_feature: Tensor, text_features: Tensor) -> Tensor:
    """Probability that an image shows the anomalous text rather than the normal one (zero-shot score).

    Args:
        image_feature: ``(B, D)``, any length; normalised here.
        text_features: ``(B, D, 2)`` or ``(D, 2)``, unit columns.

    Returns:
        ``(B,)`` in ``[0, 1]``.
    """
    return text_logits(image_feature.unsqueeze(1), text_features).squeeze(1).softmax(dim=-1)[:, 1]


def text_probability_maps(logits: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Normal and anomalous probability of every pixel, from the logits of the patches of one stage.

    The logits are interpolated and the softmax is taken after it, as the authors do (test.py).

    Args:
        logits: ``(B, L, 2)``, patches row by row.
        grid: Rows and columns of patches, ``L`` in all.
        size: Height and width of the map in pixels.

    Returns:
        ``(B, 2, H, W)``, summing to one over the second axis.
    """
    return _to_map(logits, grid, size).softmax(dim=1)


def nearest_normal_distance(patch_tokens: Tensor, bank: Iterable[Tensor]) -> Tensor:
    """Distance of every patch to the most similar remembered normal patch.

    One minus the cosine similarity: 0 is "seen before", 2 is "opposite". A bank with more
    shots can lower a distance, never raise it (arXiv:2305.17382, sec. 2.2).

    Args:
        patch_tokens: ``(B, L, C)``, any length; normalised here.
        bank: Parts ``(N, C)`` of the remembered patches of one stage, unit rows. They are
            visited one by one, so that memory grows with the largest part and not with their sum.

    Returns:
        ``(B, L)`` in ``[0, 2]``, up to rounding.

    Raises:
        RuntimeError: The bank is empty.
    """
    patches = F.normalize(patch_tokens, dim=-1)
    nearest: Tensor | None = None
    for part in bank:
        similarity = (patches @ part.T).amax(dim=-1)
        nearest = similarity if nearest is None else torch.maximum(nearest, similarity)
    if nearest is None:
        msg = "The memory bank is empty: fill it with `MemoryBank.fill` before asking for distances."
        raise RuntimeError(msg)
    return 1.0 - nearest


def distance_map(distance: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Patch distances of one stage, interpolated to pixels.

    Args:
        distance: ``(B, L)``, patches row by row.
        grid: Rows and columns of patches, ``L`` in all.
        size: Height and width of the map in pixels.

    Returns:
        ``(B, H, W)``.
    """
    return _to_map(distance.unsqueeze(-1), grid, size).squeeze(1)


def neighbourhood_mean(patch_tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Tokens of every patch averaged with those of the patches around it (PatchCore, arXiv:2106.08265, sec. 3.1).

    Args:
        patch_tokens: ``(B, L, C)``, patches row by row.
        grid: Rows and columns of patches, ``L`` in all.
        side: Side of the square neighbourhood in patches, odd. At the border the patches that are there count.

    Returns:
        ``(B, L, C)`` in fp32; for a ``side`` of 1 the tokens as they are.
    """
    if side == 1:
        return patch_tokens
    planes = rearrange(patch_tokens.float(), "b (h w) c -> b c h w", h=grid[0], w=grid[1])
    means = F.avg_pool2d(planes, side, stride=1, padding=side // 2, count_include_pad=False)
    return rearrange(means, "b c h w -> b (h w) c")


def smooth(anomaly_map: Tensor, sigma: float) -> Tensor:
    """A map blurred with a Gaussian, which is cut at four deviations and mirrored at the border.

    Args:
        anomaly_map: ``(B, H, W)``, both sides longer than :func:`smoothing_radius`.
        sigma: Standard deviation in pixels; 0 for the map as it is.

    Returns:
        ``(B, H, W)``, between the lowest and the highest value of the map.
    """
    if not sigma:
        return anomaly_map
    side = 2 * smoothing_radius(sigma) + 1
    blurred: Tensor = gaussian_blur_image(anomaly_map.unsqueeze(1), [side, side], [sigma, sigma])
    return blurred.squeeze(1)


def smoothing_radius(sigma: float) -> int:
    """How many pixels :func:`smooth` looks to either side."""
    return int(4.0 * sigma + 0.5)


def map_statistic(anomaly_map: Tensor, top_share: float = 0.0) -> Tensor:
    """The number that stands for a map in the score of its image.

    Args:
        anomaly_map: ``(B, H, W)``.
        top_share: Share of the pixels, the highest ones, whose mean is taken: at least one pixel, 1 for all; 0 for
            the maximum.

    Returns:
        ``(B,)``.
    """
    pixels = anomaly_map.flatten(1)
    if not top_share:
        return pixels.amax(dim=1)
    return pixels.topk(max(1, round(top_share * pixels.shape[1])), dim=1).values.mean(dim=1)


def fused_score(text_probability: Tensor, statistic: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Few-shot score: the mean of text probability and map statistic, the latter scaled by its bounds (sec. 2.2).

    Args:
        text_probability: ``(B,)`` in ``[0, 1]``.
        statistic: ``(B,)``, see :func:`map_statistic`.
        low: Scalar, what becomes 0.
        high: Scalar, what becomes 1; where it equals ``low`` the statistic is only shifted.

    Returns:
        ``(B,)``; within ``[0, 1]`` where the statistic is within its bounds.
    """
    span = high - low
    return 0.5 * (text_probability + (statistic - low) / torch.where(span == 0, torch.ones_like(span), span))


def _to_map(patches: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    planes = rearrange(patches, "b (h w) c -> b c h w", h=grid[0], w=grid[1])
    return F.interpolate(planes, size=size, mode="bilinear", align_corners=True)
