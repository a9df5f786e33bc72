"""Metrics of a model of several classes: one of each per class, and their mean."""

from __future__ import annotations

import copy
from typing import Any

import torch
from anomalib.metrics import Evaluator
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..class_rows import TRUTHS, class_index_of, part_of, rows_by_class
from ..ranks import even_out, told_by_all


class ClassEvaluator(Evaluator):
    """anomalib's evaluator; where batches tell classes, test metrics are taken class by class.

    The metric of a class is logged as ``image_AUROC/nut``, their mean as ``image_AUROC``: figures of one
    class are comparable, scores of different classes are not, so that is how benchmarks are averaged.
    A class for which a metric does not exist (no defects, no masks) has none, and does not count in the mean.
    Several processes count their images together, also those of a class that not all of them see.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # anomalib's arguments
        super().__init__(*args, **kwargs)
        self._of_class: dict[str, list[Any]] = {}
        self._seen: dict[tuple[str, str], set[int]] = {}

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # anomalib's signature
        """Update the metrics of the classes in the batch."""
        batch = kwargs.get("batch", args[1] if len(args) > 1 else None)
        class_index = class_index_of(batch)
        if class_index is None:
            super().on_test_batch_end(trainer, pl_module, *args, **kwargs)
            return
        names: tuple[str, ...] = pl_module.model.class_names  # type: ignore[assignment, union-attr]
        for number, rows in rows_by_class(class_index):
            part = part_of(batch, rows)
            for truth in TRUTHS:
                values = getattr(part, truth)
                present = set() if values is None else set(values.int().unique().tolist())
                self._seen[names[number], truth] = self._seen.get((names[number], truth), set()) | present
            for metric in self._metrics_of(names[number], class_index.device):
                metric.update(part)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log every class and the means."""
        seen: dict[tuple[str, str], set[int]] = {}
        for of_rank in told_by_all(self._seen):
            for key, present in of_rank.items():
                seen[key] = seen.get(key, set()) | present
        if not seen:
            even_out(self.test_metrics)
            super().on_test_epoch_end(trainer, pl_module)
            return
        known: tuple[str, ...] = pl_module.model.class_names  # type: ignore[assignment, union-attr]
        names = [name for name in known if (name, TRUTHS[0]) in seen]  # in the same order everywhere
        of_class = {name: self._metrics_of(name, pl_module.device) for name in names}
        even_out(metric for metrics in of_class.values() for metric in metrics)
        templates: list[Any] = list(self.test_metrics)
        for number, template in enumerate(templates):
            values: list[Tensor] = []
            for name, metrics in of_class.items():
                metric = metrics[number]
                # torchmetrics says 0 where there is nothing to tell apart.
                if all(len(seen[name, truth]) == 2 for truth in TRUTHS if truth in metric.fields):
                    values.append(metric.compute())
                    pl_module.log(f"{template.name}/{name}", values[-1], sync_dist=True)  # equal already
            if values:
                pl_module.log(str(template.name), torch.stack(values).mean(), sync_dist=True)
        self._of_class, self._seen = {}, {}

    def _metrics_of(self, name: str, device: torch.device) -> list[Any]:
        if name not in self._of_class:
            fresh: list[Any] = list(copy.deepcopy(self.test_metrics).to(device))
            for metric in fresh:
                metric.reset()
            self._of_class[name] = fresh
        return self._of_class[name]
