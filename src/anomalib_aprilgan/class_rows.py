"""A batch of images of several classes, taken apart by class."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor

PREDICTIONS = ("pred_score", "pred_label", "anomaly_map", "pred_mask")
TRUTHS = ("gt_label", "gt_mask")


def class_index_of(batch: object) -> Tensor | None:
    """``(B,)`` the class of every image, which the steps of a model of several classes note on a batch."""
    return getattr(batch, "class_index", None)


def rows_by_class(class_index: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every class that occurs, in ascending order, and the rows ``(N,)`` of its images.

    Args:
        class_index: ``(B,)`` the class of every image.
    """
    for number in sorted(set(class_index.tolist())):
        yield number, (class_index == number).nonzero().flatten()


def part_of(batch: object, rows: Tensor) -> Any:  # noqa: ANN401  # has a batch's fields
    """Some images of a batch, with the fields that bounds, thresholds and metrics are about."""
    fields = {name: getattr(batch, name, None) for name in (*PREDICTIONS, *TRUTHS)}
    return SimpleNamespace(**{name: None if value is None else value[rows] for name, value in fields.items()})
