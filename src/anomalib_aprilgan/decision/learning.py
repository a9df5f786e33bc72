"""What validation teaches about one class: bounds and best-F1 thresholds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from anomalib.metrics import F1AdaptiveThreshold, MinMax
from torch import Tensor, nn
from torchmetrics import CatMetric
from torchmetrics.utilities.data import dim_zero_cat

# Fused scores from text probability and map statistic, between two bounds of the latter; none in a zero-shot model.
Fuse = Callable[[Tensor, Tensor, tuple[float, float] | None], Tensor]


class RowLearner(nn.Module):
    """Collects the validation images of one class, across all processes, and learns from them.

    The bounds of the map statistic come first: scores are fused with them, and score thresholds are for fused scores.
    """

    def __init__(self) -> None:
        super().__init__()
        self.text_probability, self.statistic, self.label = CatMetric(), CatMetric(), CatMetric()
        self.pixel_threshold = BestF1(fields=["anomaly_map", "gt_mask"], strict=False)
        self.pixel_range = MinMax(fields=["anomaly_map"], strict=False)

    def update(self, images: Any, statistic: Callable[[Tensor], Tensor]) -> None:  # noqa: ANN401  # has a batch's fields
        """Take the images of this class in a batch."""
        self.text_probability.update(images.pred_score)
        if images.anomaly_map is not None:
            self.statistic.update(statistic(images.anomaly_map))
        if images.gt_label is not None:
            self.label.update(images.gt_label.float())
        self.pixel_threshold.update(images)
        self.pixel_range.update(images)

    def learned(self, fuse: Fuse | None) -> dict[str, float]:
        """Bounds and thresholds by name; only those that the images show."""
        if not self.text_probability.update_called:
            return {}
        scores = self.text_probability.compute()
        label = self.label.compute().bool() if self.label.update_called else None
        found: dict[str, float] = {}
        if fuse is not None:
            statistic, bounds = self.statistic.compute(), None
            if label is not None and label.any() and not label.all():  # good parts alone do not show the range
                bounds = statistic.min().item(), statistic.max().item()
                found |= {"map_maximum_min": bounds[0], "map_maximum_max": bounds[1]}
            scores = fuse(scores, statistic, bounds)
        found |= {"image_min": scores.min().item(), "image_max": scores.max().item()}
        if label is not None:
            images: Any = SimpleNamespace(pred_score=scores, gt_label=label)
            threshold = BestF1(fields=["pred_score", "gt_label"], sync_on_compute=False).to(scores.device)  # gathered
            threshold.update(images)
            found["image_threshold"] = threshold.compute().item()
        if self.pixel_threshold.update_called:
            found["pixel_threshold"] = self.pixel_threshold.compute().item()
        if self.pixel_range.update_called:
            low, high = self.pixel_range.compute()
            found |= {"pixel_min": low.item(), "pixel_max": high.item()}
        return found


class BestF1(F1AdaptiveThreshold):
    """anomalib's; gathered across processes, its targets are one tensor, of which anomalib makes an object a pixel."""

    def _has_anomalous_samples(self) -> bool:
        return bool((dim_zero_cat(self.target) == 1).any())

    def _has_normal_samples(self) -> bool:
        return bool((dim_zero_cat(self.target) == 0).any())
