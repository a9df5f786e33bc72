"""What anomalib asks of a model class before it runs: default parts, trainer arguments, an empty validation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from anomalib.metrics import AUPR, AUROC, Evaluator, F1Max
from anomalib.models.components import AnomalibModule
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import EVAL_DATALOADERS

from .checkpoint import check_file
from .data.pre_processing import AprilGANPreProcessor
from .metrics import AUPRO
from .results.evaluator import ClassEvaluator
from .results.visualizer import AprilGANVisualizer


class Components:
    """Mix-in with anomalib's ``configure_*`` methods that need nothing of the model."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **options: object) -> AnomalibModule:
        """The model of a checkpoint, and what replaces its arguments; see anomalib's ``load_from_checkpoint``."""
        check_file(checkpoint_path)
        parent: Any = super()
        try:
            model: AnomalibModule = parent.load_from_checkpoint(checkpoint_path, **options)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            msg = f"`ckpt_path`: the tensors of {checkpoint_path} do not fit the model: {error}"
            raise ValueError(msg) from error
        return model

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check before training: it would set thresholds from a handful of images."""
        return {"num_sanity_val_steps": 0}

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> AprilGANPreProcessor:
        """Resize and normalisation of the published method, at 518 x 518 pixels by default."""
        return AprilGANPreProcessor(image_size or (518, 518))

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """The paper's metrics, class by class: AUROC, F1-max and AP of images and pixels, and the pixels' AUPRO."""
        image: dict[str, Any] = {"fields": ["pred_score", "gt_label"], "prefix": "image_"}
        pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
        of_images = [metric(**image) for metric in (AUROC, F1Max, AUPR)]
        return ClassEvaluator(test_metrics=[*of_images, *(metric(**pixel) for metric in (AUROC, F1Max, AUPR, AUPRO))])

    @classmethod
    def configure_visualizer(cls) -> AprilGANVisualizer:
        """Drawings whose heatmaps share one colour range."""
        return AprilGANVisualizer()

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Nothing, for a trainer without a datamodule: the Engine validates zero-shot models with or without data."""
        return []


def mend_optimizer_of_command_line(module: LightningModule) -> None:
    """Let Lightning accept the bound ``partial`` that anomalib's ``--optimizer`` makes of ``configure_optimizers``.

    Its check for overridden methods, which comes after ``configure_callbacks``, looks for a ``__wrapped__`` function.
    """
    from_command_line = getattr(vars(module).get("configure_optimizers"), "__func__", None)
    if isinstance(from_command_line, partial):
        vars(from_command_line)["__wrapped__"] = from_command_line.func
