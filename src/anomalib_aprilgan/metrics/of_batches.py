"""Metrics for anomalib's ``Evaluator``, which are updated with batches."""

from __future__ import annotations

import torch
from anomalib.metrics import AnomalibMetric
from anomalib.metrics.aupro import _AUPRO
from anomalib.utils.cv import connected_components_cpu
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from .streaming import Counting


class _AnySizeAUPRO(_AUPRO):
    shapes: list[Tensor]

    def __init__(self, *, fpr_limit: float = 0.3) -> None:
        super().__init__(fpr_limit=fpr_limit)
        self.add_state("shapes", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take maps and masks ``(B, H, W)``, and keep their pixels in a row."""
        super().update(preds.flatten(), target.flatten())
        self.shapes.append(torch.tensor([target.shape], device=target.device))

    def perform_cca(self) -> Tensor:
        """For every pixel ``(N,)`` of all masks the number of its region, 0 for none."""
        shapes, masks = dim_zero_cat(self.shapes), dim_zero_cat(self.target)
        found, highest = [], 0
        for shape, flat in zip(shapes.tolist(), torch.split(masks, shapes.prod(dim=1).tolist()), strict=True):
            regions = connected_components_cpu(flat.reshape(shape).unsqueeze(1).float().cpu()).flatten()
            found.append(torch.where(regions > 0, regions + highest, 0))
            highest = max(highest, int(found[-1].max()))
        return torch.cat(found).to(masks.device)


class AUPRO(AnomalibMetric, _AnySizeAUPRO):  # type: ignore[misc]  # as anomalib makes its own
    """anomalib's AUPRO, whose maps ``(B, H, W)`` may be of another size in every batch."""

    default_fields = ("anomaly_map", "gt_mask")


class _PublishedAUPRO(Counting):
    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Take maps and masks ``(B, H, W)``."""
        masks = _without_channel(masks).bool()
        labels = masks.flatten(1).any(dim=1)
        self.count(masks, _without_channel(maps), labels, labels.float())

    def compute(self) -> Tensor:
        """The area, NaN where it does not exist."""
        return torch.tensor(self.warned({"aupro": self.figures()["aupro"]})["aupro"])


class PublishedAUPRO(AnomalibMetric, _PublishedAUPRO):  # type: ignore[misc]  # as anomalib makes its own
    """Area under the per-region overlap by the protocol of the paper.

    200 thresholds are spaced evenly between the lowest and the highest pixel; false-positive rates below 0.3 are
    stretched to [0, 1] (the authors' ``test.py``). ``AUPRO`` sweeps every threshold instead. Memory is bounded
    (``Counting``). Maps ``(B, H, W)`` may be of another size in every batch.

    The thresholds depend on the scale of the maps. The paper's figures are those of raw maps, which a model shows with
    ``post_processor=False``; a post-processor that scales maps changes the figure somewhat.
    """

    default_fields = ("anomaly_map", "gt_mask")


class _ChallengeF1Max(Counting):
    def update(self, scores: Tensor, labels: Tensor, maps: Tensor, masks: Tensor) -> None:
        """Take scores and labels ``(B,)``, maps and masks ``(B, H, W)``."""
        self.count(_without_channel(masks).bool(), _without_channel(maps), labels.flatten(), scores.flatten())

    def compute(self) -> Tensor:
        """The mean, NaN where it does not exist."""
        name = "challenge_f1_max"
        return torch.tensor(self.warned({name: self.figures()[name]})[name])


class ChallengeF1Max(AnomalibMetric, _ChallengeF1Max):  # type: ignore[misc]  # as anomalib makes its own
    """Harmonic mean of the F1-max of images and of pixels, which ranks the VAND challenge of CVPR 2023.

    Memory is bounded (``Counting``). Maps ``(B, H, W)`` may be of another size in every batch.
    """

    default_fields = ("pred_score", "gt_label", "anomaly_map", "gt_mask")


def _without_channel(pixels: Tensor) -> Tensor:
    plain = pixels.as_subclass(Tensor)
    return plain.reshape(len(plain), *plain.shape[-2:])
