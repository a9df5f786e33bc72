"""What one class learns from its validation images: values by hand, and what is not learned."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from anomalib_aprilgan.decision.learning import BestF1, RowLearner


def images(scores: list[float], maxima: list[float] | None = None, labels: list[int] | None = None) -> Any:
    """The fields of a batch: maps with one pixel above zero, which is the defect where the label says so."""
    maps = masks = None
    if maxima is not None:
        maps = torch.zeros(len(scores), 4, 4)
        maps[:, 1, 2] = torch.tensor(maxima)
    if maxima is not None and labels is not None:
        masks = torch.zeros(len(scores), 4, 4, dtype=torch.uint8)
        masks[:, 1, 2] = torch.tensor(labels)
    return SimpleNamespace(
        pred_score=torch.tensor(scores),
        anomaly_map=maps,
        gt_label=None if labels is None else torch.tensor(labels),
        gt_mask=masks,
    )


def maximum(anomaly_map: Tensor) -> Tensor:
    return anomaly_map.amax(dim=(1, 2))


def fuse(text: Tensor, statistic: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    low, high = bounds or (0.0, 8.0)
    return 0.5 * (text + (statistic - low) / (high - low))


def learner(*batches: Any) -> RowLearner:
    built = RowLearner()
    for batch in batches:
        built.update(batch, maximum)
    return built


def test_zero_shot_by_hand() -> None:
    found = learner(images([0.1, 0.3], [1.0, 2.0], [0, 0]), images([0.7], [3.0], [1])).learned(None)
    assert found == pytest.approx(
        {
            "image_min": 0.1,
            "image_max": 0.7,
            "image_threshold": 0.7,
            "pixel_min": 0.0,
            "pixel_max": 3.0,
            "pixel_threshold": 3.0,
        }
    )


def test_bounds_come_before_the_scores_that_are_fused_with_them() -> None:
    found = learner(images([0.1, 0.2], [1.0, 2.0], [0, 0]), images([0.6, 0.8], [5.0, 4.0], [1, 1])).learned(fuse)
    assert (found["map_maximum_min"], found["map_maximum_max"]) == (1.0, 5.0)
    # Fused: 0.05, 0.5 * (0.2 + 0.25), 0.5 * (0.6 + 1), 0.5 * (0.8 + 0.75).
    assert found["image_min"] == pytest.approx(0.05)
    assert found["image_max"] == pytest.approx(0.8)
    assert found["image_threshold"] == pytest.approx(0.775)


@pytest.mark.parametrize("labels", [None, [0, 0], [1, 1]])
def test_bounds_are_not_learned_from_images_that_do_not_show_the_range(labels: list[int] | None) -> None:
    found = learner(images([0.1, 0.8], [1.0, 5.0], labels)).learned(fuse)
    assert not {"map_maximum_min", "map_maximum_max"} & set(found)
    assert (found["image_min"], found["image_max"]) == pytest.approx((0.5 * (0.1 + 0.125), 0.5 * (0.8 + 0.625)))
    assert ("image_threshold" in found) == (labels is not None)


def test_without_maps_nothing_is_said_of_pixels() -> None:
    found = learner(images([0.1, 0.8], None, [0, 1])).learned(None)
    assert set(found) == {"image_min", "image_max", "image_threshold"}


def test_without_images_nothing_is_learned() -> None:
    assert learner().learned(None) == learner().learned(fuse) == {}


def test_states_gathered_across_processes() -> None:
    """Gathering turns the lists of a torchmetrics state into tensors."""
    whole = learner(images([0.1, 0.2], [1.0, 2.0], [0, 1]))
    expected = whole.learned(fuse)
    gathered = RowLearner()
    for name in ("text_probability", "statistic", "label"):
        metric = getattr(gathered, name)
        metric.value, metric._update_count = torch.cat(getattr(whole, name).value), 1
    gathered.pixel_threshold, gathered.pixel_range = whole.pixel_threshold, whole.pixel_range
    assert gathered.learned(fuse) == expected


def test_targets_of_the_threshold_may_be_one_tensor() -> None:
    metric = BestF1(fields=["pred_score", "gt_label"])
    metric.update(SimpleNamespace(pred_score=torch.tensor([0.2, 0.9]), gt_label=torch.tensor([False, True])))
    metric.preds, metric.target = torch.cat(metric.preds), torch.cat(metric.target)
    assert metric.compute().item() == pytest.approx(0.9)
