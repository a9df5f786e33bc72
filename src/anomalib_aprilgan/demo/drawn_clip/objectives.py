"""What the small CLIP is trained for, as functions of logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import Caption


def patch_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy of patches, in which every pair of twins counts the same.

    Half of it is about the defect's patches and those of the good twin at the same place, so that
    only what is seen can tell them apart, not where; half is about all other patches.

    Args:
        logits: ``(2 B, L, 2)``, square grids: good pictures first, then their bad twins.
        mask: ``(B, H, H)`` of the bad ones. A patch is defective from 6 % of its pixels on; with
            fewer it counts as neither.
    """
    share = F.adaptive_avg_pool2d(mask.unsqueeze(1), math.isqrt(logits.shape[1])).flatten(1)
    defective, untouched = share > 0.06, share == 0
    target = torch.cat([torch.zeros_like(defective), defective])
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten().long(), reduction="none").view(2, *share.shape)
    loss = loss.mean(dim=0)
    parts = [(loss * part).sum(dim=1) / part.sum(dim=1).clamp(min=1) for part in (defective, untouched)]
    return (parts[0] + parts[1]).mean() / 2.0


def ranking_loss(margins: Tensor) -> Tensor:
    """Logistic loss of every bad picture against every good one of the same product.

    What a product looks like shifts the scores of all its pictures alike. That need not be told from a
    defect to rank them, which is what the image AUROC of a product asks for.

    Args:
        margins: ``(2, P, N)`` logit of the anomalous minus that of the normal state: of good pictures and of
            bad ones, ``N`` of each of ``P`` products.
    """
    good, bad = margins
    return F.softplus(good.unsqueeze(1) - bad.unsqueeze(2)).mean()


def contrastive_loss(logits: Tensor, ignored: Tensor) -> Tensor:
    """CLIP's symmetric loss of ``(B, B)`` similarities, pairs that fit by chance left out."""
    logits = logits.masked_fill(ignored, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2.0


def also_fits(captions: list[Caption], shown: list[tuple[str, str | None]]) -> Tensor:
    """``(B, B)``: whether the caption of another picture (column) is true of this one (row) too."""
    fits = torch.tensor([[caption.fits(*picture) for caption in captions] for picture in shown])
    return fits & ~torch.eye(len(shown), dtype=torch.bool)
