"""Metrics of a model of several classes: one of each per class, and their mean."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.metrics import Evaluator
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

_TRUTHS = ("gt_label", "gt_mask")
# What metrics may ask of a batch.
_FIELDS = ("pred_score", "pred_label", "anomaly_map", "pred_mask", *_TRUTHS)


class ClassEvaluator(Evaluator):
    """anomalib's evaluator; where batches tell classes, test metrics are taken class by class.

    The metric of a class is logged as ``image_AUROC/nut``, their mean as ``image_AUROC``: figures of one
    class are comparable, scores of different classes are not, so that is how benchmarks are averaged.
    A class for which a metric does not exist (no defects, no masks) has none, and does not count in the mean.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # anomalib's arguments
        super().__init__(*args, **kwargs)
        self._of_class: dict[str, list[Any]] = {}
        self._seen: dict[tuple[str, str], set[int]] = {}

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # anomalib's signature
        """Update the metrics of the classes in the batch."""
        batch = kwargs.get("batch", args[1] if len(args) > 1 else None)
        class_index: Tensor | None = getattr(batch, "class_index", None)
        if class_index is None:
            super().on_test_batch_end(trainer, pl_module, *args, **kwargs)
            return
        names: tuple[str, ...] = pl_module.model.class_names  # type: ignore[assignment, union-attr]
        for number in sorted(set(class_index.tolist())):
            rows = (class_index == number).nonzero().flatten()
            fields = {name: getattr(batch, name, None) for name in _FIELDS}
            part: Any = SimpleNamespace(
                **{name: None if value is None else value[rows] for name, value in fields.items()}
            )
            for truth in _TRUTHS:
                values = getattr(part, truth)
                present = set() if values is None else set(values.int().unique().tolist())
                self._seen[names[number], truth] = self._seen.get((names[number], truth), set()) | present
            for metric in self._metrics_of(names[number], class_index.device):
                metric.update(part)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log every class and the means."""
        if not self._of_class:
            super().on_test_epoch_end(trainer, pl_module)
            return
        templates: list[Any] = list(self.test_metrics)
        for number, template in enumerate(templates):
            values: list[Tensor] = []
            for name, metrics in self._of_class.items():
                metric = metrics[number]
                # torchmetrics says 0 where there is nothing to tell apart.
                if all(len(self._seen[name, truth]) == 2 for truth in _TRUTHS if truth in metric.fields):
                    values.append(metric.compute())
                    pl_module.log(f"{template.name}/{name}", values[-1])
            if values:
                pl_module.log(str(template.name), torch.stack(values).mean())
        self._of_class, self._seen = {}, {}

    def _metrics_of(self, name: str, device: torch.device) -> list[Any]:
        if name not in self._of_class:
            fresh: list[Any] = list(copy.deepcopy(self.test_metrics).to(device))
            for metric in fresh:
                metric.reset()
            self._of_class[name] = fresh
        return self._of_class[name]
