"""AUPRO over maps of different sizes."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import anomalib.metrics
import pytest
import torch
from scipy.ndimage import label
from torchvision.tv_tensors import Mask

from anomalib_aprilgan.metrics import AUPRO


def batch(seed: int, count: int, height: int, width: int) -> Any:
    """Maps and masks, each with two regions."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(count, height, width, dtype=torch.uint8)
    mask[:, 2:5, 3:8], mask[:, height - 6 : height - 2, width - 5 : width - 1] = 1, 1
    maps = 0.4 * mask + torch.rand(count, height, width, generator=generator)
    return SimpleNamespace(anomaly_map=maps, gt_mask=Mask(mask))


def slow_aupro(batches: list[Any]) -> float:
    """From all thresholds: mean overlap of all regions over the share of good pixels up to 0.3."""
    maps = [image for part in batches for image in part.anomaly_map]
    masks = [image for part in batches for image in part.gt_mask]
    regions = []
    for values, mask in zip(maps, masks, strict=True):
        numbers, count = label(mask.numpy())
        regions += [values.numpy()[numbers == number + 1] for number in range(count)]
    good = torch.cat([values[mask == 0] for values, mask in zip(maps, masks, strict=True)])
    points = [(0.0, 0.0)]
    for cut in torch.cat([values.flatten() for values in maps]).unique().flip(0):
        overlap = sum((region >= cut.item()).mean() for region in regions) / len(regions)
        points.append(((good >= cut).float().mean().item(), overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        end = min(x1, 0.3)
        if x0 < end:
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    return area / 0.3


def value(metric: Any, batches: list[Any]) -> float:
    for part in batches:
        metric.update(part)
    return metric.compute().item()


def test_equals_anomalibs_where_sizes_are_equal() -> None:
    batches = [batch(0, 3, 16, 20), batch(1, 1, 16, 20)]
    theirs = anomalib.metrics.AUPRO(fields=["anomaly_map", "gt_mask"])
    assert value(AUPRO(), batches) == pytest.approx(value(theirs, batches), abs=1e-6)
    assert AUPRO(prefix="pixel_").name == "pixel_AUPRO"


def test_sizes_may_differ() -> None:
    batches = [batch(0, 2, 16, 20), batch(1, 1, 24, 12), batch(2, 1, 14, 30)]
    assert value(AUPRO(), batches) == pytest.approx(slow_aupro(batches), abs=1e-5)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        value(anomalib.metrics.AUPRO(fields=["anomaly_map", "gt_mask"]), batches)


def test_regions_of_different_images_stay_apart() -> None:
    metric = AUPRO()
    for part in (batch(0, 2, 16, 20), batch(1, 1, 24, 12)):
        metric.update(part)
    numbers = metric.perform_cca()
    assert numbers.shape == (2 * 16 * 20 + 24 * 12,)
    assert numbers.unique().tolist() == [*range(7)]
