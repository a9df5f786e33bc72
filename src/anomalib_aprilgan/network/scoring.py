"""From features to scores and maps: the arithmetic of the method, without state (arXiv:2305.17382, sec. 2).

Patches are in row-major order of their ``grid`` (rows, columns); a ``size`` is height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur_image

# The authors' constant (test.py), in place of CLIP's learned logit_scale.
TEMPERATURE = 100.0
# Cosine distance that no patch of two different photographs keeps to all over; rounding gives about 1e-7.
_SAME_IMAGE = 1e-5


def text_logits(features: Tensor, text_features: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Logits ``(B, L, 2)``: cosine similarity with the normal and the anomalous text, times the temperature.

    Features ``(B, L, D)`` are normalised here; those of the texts, ``(B, D, 2)`` or ``(D, 2)``, have unit columns.
    """
    return temperature * F.normalize(features, dim=-1) @ text_features


def text_probability(image_feature: Tensor, text_features: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Zero-shot score ``(B,)`` in ``[0, 1]``: probability that images ``(B, D)``, of any length, show an anomaly."""
    return text_logits(image_feature.unsqueeze(1), text_features, temperature).squeeze(1).softmax(dim=-1)[:, 1]


def text_probability_maps(logits: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Normal and anomalous probability ``(B, 2, H, W)`` of every pixel, from a stage's logits ``(B, L, 2)``.

    The logits are interpolated and the softmax is taken after it, as the authors do (test.py).
    """
    return _to_map(logits, grid, size).softmax(dim=1)


def nearest_normal_distance(patch_tokens: Tensor, bank: Iterable[Tensor]) -> Tensor:
    """Distance ``(B, L)`` of every patch ``(B, L, C)`` to the most similar remembered normal patch.

    One minus the cosine similarity: 0 is "seen before", 2 is "opposite". A bank with more shots can lower a distance,
    never raise it (arXiv:2305.17382, sec. 2.2). Its parts have unit rows, ``(N, C)``, or ``(B, N, C)`` for an image
    each. They are visited one by one, so that memory grows with the largest part and not with their sum. An empty bank
    gives a RuntimeError.
    """
    patches = F.normalize(patch_tokens, dim=-1)
    nearest: Tensor | None = None
    for part in bank:
        similarity = (patches @ part.mT).amax(dim=-1)
        nearest = similarity if nearest is None else torch.maximum(nearest, similarity)
    if nearest is None:
        msg = "The memory bank is empty: fill it with `MemoryBank.fill` before asking for distances."
        raise RuntimeError(msg)
    return 1.0 - nearest


def unlabelled_distance(
    tokens: Sequence[Tensor], banks: Sequence[Sequence[Tensor]], lowest_share: float
) -> list[Tensor]:
    """Distance of every patch to references that may be defective, for every stage (MuSc, arXiv:2401.16753, sec. 3.3).

    A patch is compared with every reference. The mean over the lowest share of these distances counts: over at least
    one of them, and as many as the share gives, rounded down. A defect that a few references share stays far from most
    of them. A reference that is the very image, all of whose patches are there at every stage, does not count, unless
    it is the only one.

    Args:
        tokens: Patches ``(B, L, C)`` of every stage.
        banks: For every stage the unit rows of each of ``K`` references: ``(N, C)``, or ``(B, N, C)`` for an image
            each.
        lowest_share: In ``(0, 1]``.

    Returns:
        ``(B, L)`` in ``[0, 2]`` for every stage.

    Raises:
        RuntimeError: There is no reference.
    """
    number = len(banks[0])
    if not number:
        nearest_normal_distance(tokens[0], ())  # raises
    distances = [
        torch.stack([nearest_normal_distance(stage, [reference]) for reference in bank])  # (K, B, L)
        for stage, bank in zip(tokens, banks, strict=True)
    ]
    farthest = torch.stack([stage.amax(dim=-1) for stage in distances]).amax(dim=0)
    is_itself = (farthest < _SAME_IMAGE) & (number > 1)  # (K, B)
    others = number - is_itself.sum(dim=0)
    counted = (others * lowest_share + 1e-6).floor().clamp(min=1)  # (B,)
    most = max(1, int(number * lowest_share + 1e-6))
    places = torch.arange(most, device=counted.device)
    weights = (places[:, None] < counted) / counted  # (most, B)
    found = []
    for stage in distances:
        # Beyond every distance, and finite: it is multiplied with 0.
        apart = torch.where(is_itself[..., None], torch.full_like(stage, 4.0), stage)
        lowest = apart.topk(most, dim=0, largest=False, sorted=True).values
        found.append((lowest * weights[..., None]).sum(dim=0))
    return found


def distance_map(distance: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Patch distances ``(B, L)`` of one stage, interpolated to pixels ``(B, H, W)``."""
    return _to_map(distance.unsqueeze(-1), grid, size).squeeze(1)


def neighbourhood_mean(patch_tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Tokens ``(B, L, C)`` averaged, in fp32, with those of the patches around (PatchCore, arXiv:2106.08265, sec. 3.1).

    The square of odd ``side`` is cut at the border; a ``side`` of 1 leaves the tokens as they are.
    """
    if side == 1:
        return patch_tokens
    planes = rearrange(patch_tokens.float(), "b (h w) c -> b c h w", h=grid[0], w=grid[1])
    means = F.avg_pool2d(planes, side, stride=1, padding=side // 2, count_include_pad=False)
    return rearrange(means, "b c h w -> b (h w) c")


def accepted_share(references: Tensor, accepted: Tensor) -> Tensor:
    """How surely a pixel shows what accepted good parts show and references do not: ``(B, H, W)`` in ``[0, 1]``.

    From the distances to both: 1 for what accepted parts have, 0 where they are not twice as near as the references.
    """
    return (1.0 - 2.0 * accepted / references.clamp(min=1e-6)).clamp(min=0.0)


def mean_colour(images: Tensor) -> Tensor:
    """Mean ``(B, 3)`` of every channel of images ``(B, 3, H, W)``, in fp32."""
    return images.float().mean(dim=(-2, -1))


def smooth(anomaly_map: Tensor, sigma: float) -> Tensor:
    """A map ``(B, H, W)`` blurred with a Gaussian, which is cut at four deviations and mirrored at the border.

    ``sigma`` is in pixels, 0 for none; both sides must be longer than ``smoothing_radius``. No value leaves the
    range of the map.
    """
    if not sigma:
        return anomaly_map
    side = 2 * smoothing_radius(sigma) + 1
    blurred: Tensor = gaussian_blur_image(anomaly_map.unsqueeze(1), [side, side], [sigma, sigma])
    return blurred.squeeze(1)


def smoothing_radius(sigma: float) -> int:
    """How many pixels ``smooth`` looks to either side."""
    return int(4.0 * sigma + 0.5)


def _to_map(patches: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    planes = rearrange(patches, "b (h w) c -> b c h w", h=grid[0], w=grid[1])
    return F.interpolate(planes, size=size, mode="bilinear", align_corners=True)
