"""The paper's PRO and the challenge's F1-max for anomalib's ``Evaluator``, beside its own metrics."""

from __future__ import annotations

from typing import Any

import torch
from anomalib.metrics import AnomalibMetric
from torch import Tensor

from .streaming import StreamingMetrics


class _PublishedAUPRO(StreamingMetrics):
    def update(self, maps: Tensor, masks: Tensor) -> None:  # type: ignore[override]  # of a batch's fields
        """Take maps and masks ``(B, H, W)``."""
        masks = _without_channel(masks).bool()
        labels = masks.flatten(1).any(dim=1)
        super().update(masks, _without_channel(maps), labels, labels.float())

    def compute(self) -> Tensor:  # type: ignore[override]  # one figure
        """The area, NaN where it does not exist."""
        figures: dict[str, float] = super().compute()
        return torch.tensor(figures["aupro"])


class PublishedAUPRO(AnomalibMetric, _PublishedAUPRO):  # type: ignore[misc]  # as anomalib makes its own
    """Area under the per-region overlap by the protocol of the paper.

    200 thresholds are spaced evenly between the lowest and the highest pixel; false-positive rates below 0.3 are
    stretched to [0, 1] (the authors' ``test.py``). ``anomalib.metrics.AUPRO`` sweeps every threshold instead. Memory is
    bounded (:class:`StreamingMetrics`). Maps ``(B, H, W)`` may be of another size in every batch.
    """

    default_fields = ("anomaly_map", "gt_mask")


class _ChallengeF1Max(StreamingMetrics):
    def update(self, scores: Tensor, labels: Tensor, maps: Tensor, masks: Tensor) -> None:  # type: ignore[override]
        """Take scores and labels ``(B,)``, maps and masks ``(B, H, W)``."""
        super().update(_without_channel(masks).bool(), _without_channel(maps), labels.flatten(), scores.flatten())

    def compute(self) -> Tensor:  # type: ignore[override]  # one figure
        """The mean, NaN where it does not exist."""
        figures: dict[str, float] = super().compute()
        return torch.tensor(figures["challenge_f1_max"])


class ChallengeF1Max(AnomalibMetric, _ChallengeF1Max):  # type: ignore[misc]  # as anomalib makes its own
    """Harmonic mean of the F1-max of images and of pixels, which ranks the VAND challenge of CVPR 2023.

    Memory is bounded (:class:`StreamingMetrics`). Maps ``(B, H, W)`` may be of another size in every batch.
    """

    default_fields = ("pred_score", "gt_label", "anomaly_map", "gt_mask")


def _without_channel(pixels: Any) -> Tensor:  # noqa: ANN401  # a tensor of any subclass
    plain: Tensor = pixels.as_subclass(Tensor)
    return plain.reshape(len(plain), *plain.shape[-2:])
