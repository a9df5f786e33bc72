"""Metrics of validations and tests: for several classes one of each per class, and their mean."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..classes import images_of_row, names_of, rows_of
from ..running import align_metrics, all_gather_object

_GROUND_TRUTH = ("gt_label", "gt_mask")
_RANKED = {"pred_score", "anomaly_map"}


def renew_scores(metrics: Iterable[Any], batches: Sequence[Any]) -> None:
    """Let metrics of scores and labels begin anew with these batches; those of maps stay as they are."""
    for metric in metrics:
        if "pred_score" in metric.fields and set(metric.fields) <= {"pred_score", "gt_label"}:
            metric.reset()
            for batch in batches:
                metric.update(batch)


class ClassEvaluator(Evaluator):
    """anomalib's evaluator, whose metrics are computed class by class where the model knows several.

    The metric of a class is logged as ``image_AUROC/nut`` and the mean over the classes as ``image_AUROC``, as
    benchmarks are averaged: scores of different classes cannot be compared. A metric that needs normal and anomalous
    images, or pixels, is left out where one kind is missing, and does not count in the mean. Images of all loaders and
    of all processes count together.
    """

    _by_row: dict[int, list[Any]]  # copies of the metrics, for every class that occurred
    _truth: set[tuple[int, str, int]]  # row, field and value of the ground truth that occurred

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with fresh metrics."""
        del trainer, pl_module
        self._by_row, self._truth = {}, set()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: ImageBatch, *_: object
    ) -> None:
        """Update the metrics of the classes in the batch."""
        del outputs
        rows = rows_of(pl_module, batch)
        for row in sorted(set(rows.tolist())):
            metrics = self._metrics_of_row(row, trainer, pl_module.device)
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
        by_row = [self._metrics_of_row(row, trainer, pl_module.device) for row in rows]
        align_metrics(metric for metrics in by_row for metric in metrics)
        logged: dict[str, Tensor] = {}
        for metrics in zip(*by_row, strict=True):
            # torchmetrics returns 0 where there is nothing to tell apart.
            exist = {
                row: metric
                for row, metric in zip(rows, metrics, strict=True)
                if metric.update_called
                and all({(row, field, 0), (row, field, 1)} <= truth for field in _compared(metric))
            }
            values = {row: metric.compute() for row, metric in exist.items()}
            name = metrics[0].name
            if values:
                logged[name] = torch.stack(list(values.values())).float().mean()
            elif any(metric.update_called for metric in metrics):
                rank_zero_warn(f"{name} does not exist for these images: it needs normal and anomalous ones.")
            if len(names) > 1:
                logged |= {f"{name}/{names[row]}": value for row, value in values.items()}
        for name, value in logged.items():
            if trainer.barebones:  # Lightning logs nothing then; anomalib's evaluator stores its metrics so, too
                trainer.callback_metrics[name] = trainer.logged_metrics[name] = value
            else:  # never as a metric: Lightning keeps the kind of a name as long as the trainer
                pl_module.log(name, value, sync_dist=True)
        self._by_row.clear()

    on_validation_epoch_start = on_test_epoch_start
    on_validation_batch_end = on_test_batch_end  # type: ignore[assignment]  # anomalib's names the arguments it ignores
    on_validation_epoch_end = on_test_epoch_end

    def renew_scores(self, batches: Sequence[Any]) -> None:
        """Let metrics of scores begin anew with batches that have ``rows``; see ``renew_scores``."""
        for row, metrics in self._by_row.items():
            of_row = [images_of_row(batch, batch.rows, row) for batch in batches if (batch.rows == row).any()]
            renew_scores(metrics, of_row)

    def _metrics_of_row(self, row: int, trainer: Trainer, device: torch.device) -> list[Any]:
        if row not in self._by_row:
            metrics = self.test_metrics if trainer.testing else self.val_metrics
            self._by_row[row] = list(copy.deepcopy(metrics).to(device))
        return self._by_row[row]


def _compared(metric: Any) -> list[str]:  # noqa: ANN401  # anomalib makes the classes of its metrics at run time
    """Fields of the ground truth of which a metric needs both kinds."""
    is_ranked = not _RANKED.isdisjoint(metric.fields)
    return [field for field in _GROUND_TRUTH if is_ranked and field in metric.fields]
