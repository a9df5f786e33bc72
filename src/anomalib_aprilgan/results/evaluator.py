"""Metrics of a test: for several classes one of each per class, and their mean."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..classes import names_of, rows_of
from ..running import align_metrics, all_gather_object

_GROUND_TRUTH = ("gt_label", "gt_mask")


class ClassEvaluator(Evaluator):
    """anomalib's evaluator, whose test metrics are computed class by class where the model knows several.

    The metric of a class is logged as ``image_AUROC/nut`` and the mean over the classes as ``image_AUROC``, as
    benchmarks are averaged: scores of different classes cannot be compared. A class whose images do not define a metric
    (no defects, no masks) does not count in its mean. Images of all loaders and of all processes count together.
    """

    _by_row: dict[int, list[Any]]  # copies of the test metrics, for every class that occurred
    _truth: set[tuple[int, str, int]]  # row, field and value of the ground truth that occurred

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with fresh metrics."""
        del trainer, pl_module
        self._by_row, self._truth = {}, set()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: ImageBatch, *_: object
    ) -> None:
        """Update the metrics of the classes in the batch."""
        del trainer, outputs
        rows = rows_of(pl_module, batch)
        for row in sorted(set(rows.tolist())):
            metrics = self._metrics_of_row(row, pl_module.device)
            values = {field: getattr(batch, field, None) for metric in metrics for field in metric.fields}
            part = {field: None if value is None else value[rows == row] for field, value in values.items()}
            for field in _GROUND_TRUTH:
                if (truth := part.get(field)) is not None:
                    self._truth |= {(row, field, value) for value in truth.int().unique().tolist()}
            for metric in metrics:
                metric.update(SimpleNamespace(**part))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of every class and their means."""
        names = names_of(pl_module)
        by_rank = all_gather_object((set(self._by_row), self._truth))
        rows = sorted({row for of_rank, _ in by_rank for row in of_rank})  # in the same order in all processes
        truth = {entry for _, of_rank in by_rank for entry in of_rank}
        by_row = [self._metrics_of_row(row, pl_module.device) for row in rows]
        align_metrics(metric for metrics in by_row for metric in metrics)
        logged: dict[str, Tensor] = {}
        for metrics in zip(*by_row, strict=True):
            name, fields = metrics[0].name, [field for field in _GROUND_TRUTH if field in metrics[0].fields]
            # torchmetrics returns 0 where there is nothing to tell apart.
            values = {
                row: metric.compute()
                for row, metric in zip(rows, metrics, strict=True)
                if metric.update_called
                and (len(names) <= 1 or all({(row, field, 0), (row, field, 1)} <= truth for field in fields))
            }
            if values:
                logged[name] = torch.stack(list(values.values())).float().mean()
            if len(names) > 1:
                logged |= {f"{name}/{names[row]}": value for row, value in values.items()}
        for name, value in logged.items():
            if trainer.barebones:  # Lightning logs nothing then; anomalib's evaluator stores its metrics so, too
                trainer.callback_metrics[name] = trainer.logged_metrics[name] = value
            else:  # never as a metric: Lightning keeps the kind of a name as long as the trainer
                pl_module.log(name, value, sync_dist=True)
        self._by_row.clear()

    def _metrics_of_row(self, row: int, device: torch.device) -> list[Any]:
        if row not in self._by_row:
            self._by_row[row] = list(copy.deepcopy(self.test_metrics).to(device))
        return self._by_row[row]
