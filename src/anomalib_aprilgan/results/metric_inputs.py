"""What metrics see of a batch: the same scores in validation as in tests, whatever the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, LightningModule, Trainer

from ..classes import rows_of
from ..decision.fusion import ScoreFusion
from ..decision.post_processing import AprilGANPostProcessor
from .evaluator import ClassEvaluator, renew_scores


class MetricInputs(Callback):
    """Puts scores and maps within ``[0, 1]`` before the evaluators see them; ``after`` comes after them.

    torchmetrics puts a batch with a value outside ``[0, 1]`` through a sigmoid, and other batches not. Here raw values
    are divided by what they cannot exceed, so that their order stays. The fused scores of a validation wait for the
    bounds that are learned from it.
    """

    def __init__(self) -> None:
        self.after = BatchAsBefore(self)
        self.before: tuple[Any, Any] | None = None
        self._fused: list[Any] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a validation that was interrupted has collected."""
        del trainer, pl_module
        self._fused = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: ImageBatch, *_: object
    ) -> None:
        """Show scores as they are until now, and keep what fused ones are made from."""
        del trainer, outputs
        ours, score, anomaly_map = pl_module.post_processor, batch.pred_score, batch.anomaly_map
        self.before = score, anomaly_map
        _show(batch, pl_module)
        if isinstance(ours, AprilGANPostProcessor) and ours.fuse_map_maximum and anomaly_map is not None:
            rows, statistic = rows_of(pl_module, batch), ours.fusion.statistic(anomaly_map)
            kept = {"text": score, "statistic": statistic, "rows": rows, "gt_label": batch.gt_label}
            self._fused.append(SimpleNamespace(**kept))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: ImageBatch, *_: object
    ) -> None:
        """Show raw values within ``[0, 1]``; those on a scale are so already."""
        del trainer, outputs
        self.before = None
        post_processor = pl_module.post_processor
        if not (isinstance(post_processor, PostProcessor) and post_processor.enable_normalization):
            self.before = batch.pred_score, batch.anomaly_map
            _show(batch, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fuse with the bounds that the validation has taught, and let all metrics of scores begin anew."""
        ours: Any = pl_module.post_processor
        for batch in self._fused:
            batch.pred_score = ours.decide_scores(batch.text, batch.statistic, batch.rows)[0]
        for evaluator in [callback for callback in vars(trainer)["callbacks"] if isinstance(callback, Evaluator)]:
            if self._fused and isinstance(evaluator, ClassEvaluator):
                evaluator.renew_scores(self._fused)
            elif self._fused:
                renew_scores(evaluator.val_metrics, self._fused)
        self._fused = []


class BatchAsBefore(Callback):
    """Gives a batch back what ``MetricInputs`` has replaced."""

    def __init__(self, inputs: MetricInputs) -> None:
        self.inputs = inputs

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: ImageBatch, *_: object
    ) -> None:
        """Put score and map back."""
        del trainer, pl_module, outputs
        if self.inputs.before is not None:
            batch.pred_score, batch.anomaly_map = self.inputs.before
            self.inputs.before = None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: ImageBatch, *_: object
    ) -> None:
        """Do as in a test."""
        self.on_test_batch_end(trainer, pl_module, outputs, batch)


def _show(batch: ImageBatch, pl_module: LightningModule) -> None:
    """Replace raw score and map by what lies within ``[0, 1]``, in the same order."""
    model: Any = pl_module  # an AprilGAN, whose module is a layer above
    shown: Any = batch
    ours = model.post_processor
    is_ours = isinstance(ours, AprilGANPostProcessor)
    fusion: ScoreFusion = ours.fusion if is_ours else model.own_fusion
    is_fused = ours.fuse_map_maximum if is_ours else model.model.few_shot is not None
    if is_fused and shown.pred_score is not None:
        floor, ceiling = fusion.range(model.model.map_ceiling)
        low, high = floor.min(), torch.maximum(ceiling.max(), floor.min() + 1e-6)
        shown.pred_score = (shown.pred_score - low) / (high - low)
    if shown.anomaly_map is not None:
        shown.anomaly_map = shown.anomaly_map / model.model.map_ceiling
