"""APRIL-GAN as an anomalib model: steps, set-up order, checkpoints, export."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch, InferenceBatch
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam

from .adapters import LinearAdapters
from .backbone import ClipArchitecture, image_statistics
from .checkpoint import save_adapters
from .losses import adapter_loss
from .memory_bank import MemoryBank
from .post_processing import AprilGANPostProcessor
from .pre_processing import CLIP_MEAN, CLIP_STD, AprilGANPreProcessor
from .preparation import Preparation
from .prompts import PromptEnsemble
from .references import References
from .torch_model import AprilGANModel

CHECKPOINT_KEY = "anomalib_aprilgan"
_BACKBONE_PREFIX = "model._backbone."


class AprilGAN(AnomalibModule):
    """APRIL-GAN: zero-/few-shot anomaly detection with CLIP, linear adapters and memory banks.

    A frozen CLIP compares an image and its patches with an ensemble of sentences about good and
    bad objects. A linear adapter per tapped stage, trained on *another* data set, brings patches
    into the joint space. With ``k_shot`` normal reference images, every patch is also compared
    with theirs (arXiv:2305.17382).

    Args:
        backbone: open_clip architecture name, or path of an open_clip model-config JSON.
        pretrained: open_clip tag, or path of a weight file (safetensors, .pt, OpenAI's archive).
        quick_gelu: Activation of CLIP: ``True`` QuickGELU, ``False`` GELU, ``None`` what the
            architecture's config says, which for ViT-L-14-336 is the GELU of the published results.
        image_size: Side of the square that images are resized to, or height and width, in pixels.
        stages: Tapped blocks of the vision tower, counted from 1.
        adapters: ``"mvtec"`` or ``"visa"`` (the authors', by the data set they were trained on),
            ``"auto"`` (the one of them not trained on the target), a file, or ``None``: fresh ones
            that ``fit`` trains.
        class_name: Name of the object in the sentences; else the datamodule's category, else
            "object".
        prompts: YAML file with own ``normal``, ``anomalous`` and ``templates`` lists; else the paper's.
        k_shot: Number of normal reference images; 0 for zero-shot.
        references: Folder or list of reference images; else drawn from the datamodule's training
            images.
        memory_stages: Tapped blocks of the memory bank; else those of ``stages``.
        seed: Seed of the draw of references.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        ValueError: An argument is out of its range; the text says which and what to do.
        FileNotFoundError: A file that an argument names is missing.
    """

    model: AprilGANModel

    def __init__(
        self,
        backbone: str = "ViT-L-14-336",
        pretrained: str = "openai",
        quick_gelu: bool | None = None,
        image_size: int | tuple[int, int] = 518,
        stages: Sequence[int] = (6, 12, 18, 24),
        adapters: str | None = "auto",
        class_name: str | None = None,
        prompts: str | None = None,
        k_shot: int = 0,
        references: str | list[str] | None = None,
        memory_stages: Sequence[int] | None = None,
        seed: int = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Lightning saves these very names as hyperparameters: plain data, whatever config library they came from.
        backbone, pretrained, adapters = str(backbone), str(pretrained), None if adapters is None else str(adapters)
        image_size = _height_and_width(image_size)
        stages, memory_stages = tuple(stages), None if memory_stages is None else tuple(memory_stages)
        references = _plain_references(references)
        architecture = ClipArchitecture.load(backbone, image_size, quick_gelu)
        tapped = architecture.check_stages(stages)
        remembered = tapped if memory_stages is None else architecture.check_stages(memory_stages, "memory_stages")
        _check_few_shot(k_shot, references)
        map_limit = len(tapped) + (0.5 * len(remembered) if k_shot else 0.0)
        mean, std = image_statistics(backbone, pretrained) or (CLIP_MEAN, CLIP_STD)
        super().__init__(
            pre_processor=AprilGANPreProcessor(image_size, mean, std) if pre_processor is True else pre_processor,
            post_processor=AprilGANPostProcessor(map_limit) if post_processor is True else post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        if isinstance(self.post_processor, AprilGANPostProcessor):
            self.post_processor.set_defaults(map_limit)
        self.adapters = adapters
        self.k_shot = k_shot
        ensemble = PromptEnsemble() if prompts is None else PromptEnsemble.from_file(prompts)
        if class_name is not None:
            ensemble.sentences(class_name)  # refuses an empty name now, not after CLIP was loaded
        self.preparation = Preparation(
            architecture, pretrained, adapters, class_name, ensemble, k_shot, references, seed
        )
        linear = LinearAdapters(len(tapped), architecture.width, architecture.embed_dim)
        linear.requires_grad_(adapters is None)
        self.model = AprilGANModel(linear, MemoryBank(), tapped, remembered)
        self._trained = False
        self._fitting = False
        self._saw_defect = False

    # -- what anomalib asks -------------------------------------------------------------------------

    @property
    def learning_type(self) -> LearningType:
        """ONE_CLASS while there are fresh adapters to train (anomalib then trains), else ZERO_SHOT or FEW_SHOT."""
        if self.adapters is None and (self._fitting or not self._trained):
            return LearningType.ONE_CLASS
        return LearningType.FEW_SHOT if self.k_shot else LearningType.ZERO_SHOT

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check before training: it would set thresholds from a handful of images."""
        return {"num_sanity_val_steps": 0}

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> AprilGANPreProcessor:
        """Resize and normalisation of the published method, at 518 x 518 pixels by default."""
        return AprilGANPreProcessor(image_size or (518, 518))

    def configure_post_processor(self) -> AprilGANPostProcessor:
        """Post-processor for four stages, zero-shot."""
        return AprilGANPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """The paper's metrics: AUROC, F1-max and AP of images and pixels, and the pixels' AUPRO."""
        image: dict[str, Any] = {"fields": ["pred_score", "gt_label"], "prefix": "image_"}
        pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
        return Evaluator(
            test_metrics=[
                AUROC(**image),
                F1Max(**image),
                AUPR(**image),
                AUROC(**pixel),
                F1Max(**pixel),
                AUPR(**pixel),
                AUPRO(**pixel),
            ],
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The paper's optimizer: Adam, learning rate 1e-3, betas 0.5 and 0.999, no schedule."""
        return Adam(self.model.adapters.parameters(), lr=1e-3, betas=(0.5, 0.999))

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """The callbacks that anomalib wants; called before Lightning looks at ``configure_optimizers``.

        anomalib's ``--optimizer`` replaces that method by a bound ``partial``, at which Lightning's
        check for overridden methods fails; ``__wrapped__`` is where it looks for the function.
        """
        from_command_line = getattr(self.__dict__.get("configure_optimizers"), "__func__", None)
        if isinstance(from_command_line, partial):
            from_command_line.__wrapped__ = from_command_line.func  # type: ignore[attr-defined]
        return super().configure_callbacks()

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Nothing, for a trainer without a datamodule.

        ``Engine.predict`` and ``anomalib benchmark`` validate zero-shot models before all else,
        with or without data, and would stop without this. A datamodule's loader comes first.
        """
        return []

    # -- set-up -------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load CLIP; without a trainer, ``setup("predict")`` makes the model ready to be called.

        That is: load adapters, encode class names, fill the memory bank, once or again for other data. With a
        trainer this waits for the start hooks, since a checkpoint is restored between this and them.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            FileNotFoundError: Weights or references are missing.
            ValueError: They do not fit.
        """
        self._fitting = stage == "fit"
        self.preparation.attach_backbone(self.model, self._target_device)
        if self._trainer is None:
            self._prepare(stage)

    def on_fit_start(self) -> None:
        """Refuse data that adapters cannot learn from, and note what they will have seen."""
        self._prepare("fit")
        if self.adapters is not None:
            msg = f"`adapters={self.adapters!r}` are given and not trained. Pass `adapters=None` to train fresh ones."
            raise RuntimeError(msg)
        datamodule = self._datamodule
        has_defects = getattr(getattr(datamodule, "train_data", None), "has_anomalous", None)
        if has_defects is False:
            self._refuse_normal_data()
        self._saw_defect = bool(has_defects)  # else the first epoch will tell
        self.preparation.note_training(self.model, datamodule)

    def on_train_epoch_end(self) -> None:
        """Refuse loaders without a defect, which only show it in passing."""
        if not self._saw_defect:
            self._refuse_normal_data()

    def _refuse_normal_data(self) -> None:
        name = getattr(self._datamodule, "name", "the loader")
        msg = (
            "`adapters=None` trains fresh adapters, which takes images of defects with masks; the training data of "
            f"{name} has not a single anomalous image. Train on the test images of other data sets with "
            "`anomalib_aprilgan.data.AuxiliaryData`, or pass trained `adapters`."
        )
        raise ValueError(msg)

    def on_fit_end(self) -> None:
        """From here on the adapters are trained."""
        self._trained = True
        self._fitting = False

    def on_validation_start(self) -> None:
        """Complete the set-up, with what a checkpoint may have brought."""
        if not self._fitting:
            self._prepare("validate")

    def on_test_start(self) -> None:
        """Complete the set-up, with what a checkpoint may have brought."""
        self._prepare("test")

    def on_predict_start(self) -> None:
        """Complete the set-up, with what a checkpoint may have brought."""
        self._prepare("predict")

    @torch.no_grad()
    @torch.inference_mode(mode=False)  # what is made here outlives the loop that asks for it
    def _prepare(self, stage: str) -> None:
        datamodule, preparation = self._datamodule, self.preparation
        preparation.load_adapters(self.model, datamodule)
        preparation.encode_classes(self.model, datamodule, single=stage in {"predict", "export"})
        self.model.to(self._target_device)
        if stage == "fit":
            return  # adapters are trained without a memory bank
        held_out_maxima = preparation.fill_memory_bank(
            self.model, datamodule, self.pre_processor, optional=stage == "validate"
        )
        if held_out_maxima is not None and isinstance(self.post_processor, AprilGANPostProcessor):
            self._bound_map_maximum(self.post_processor, held_out_maxima)
        elif held_out_maxima is not None:
            warnings.warn(
                "`post_processor` is not an AprilGANPostProcessor: scores stay those of the text, references change "
                "the maps alone.",
                stacklevel=2,
            )
        if stage in {"validate", "test"}:
            preparation.warn_of_seen_data(datamodule)
        if self.learning_type == LearningType.ONE_CLASS:
            warnings.warn(
                "The adapters are untrained: the maps mean nothing. Train them with `fit`, or pass `adapters`.",
                stacklevel=2,
            )

    def _bound_map_maximum(self, post_processor: AprilGANPostProcessor, held_out_maxima: Tensor) -> None:
        """Bounds and thresholds for the case that no validation data tells better ones.

        The map maximum is bounded from below by what good parts reach: the lowest of the references,
        each held out in turn (for a single one, 0); from above by what a map reaches where every stage is
        certain, a cosine distance of one half counting as certain. Pixels are cut above all held-out maps.
        """
        limit = len(self.model.stages) + 0.5 * len(self.model.memory_stages)
        post_processor.set_defaults(limit, held_out_maxima)
        post_processor.fuse_map_maximum = True

    @property
    def _datamodule(self) -> AnomalibDataModule | None:
        datamodule = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        return datamodule if isinstance(datamodule, AnomalibDataModule) else None

    @property
    def _target_device(self) -> torch.device:
        # Lightning moves the module only after `setup`; encoding should not wait for that.
        return self.trainer.strategy.root_device if self._trainer is not None else self.device

    # -- steps --------------------------------------------------------------------------------------

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> InferenceBatch:  # noqa: ANN401  # anomalib's signature
        """Scores, labels, maps and masks of images as a camera gives them.

        Args:
            batch: ``(B, 3, H, W)``, float in ``[0, 1]``, any size.
            *args: Ignored, as in anomalib.
            **kwargs: Ignored, as in anomalib.

        Returns:
            ``pred_score`` and ``pred_label`` ``(B,)``, ``anomaly_map`` and ``pred_mask`` at the model's image size.
        """
        if not torch.compiler.is_compiling():
            if batch.ndim != 4 or batch.shape[1] != 3:
                msg = f"`batch` must be (B, 3, H, W), got {tuple(batch.shape)}."
                raise ValueError(msg)
            self._make_ready()
        return super().forward(batch, *args, **kwargs)

    def training_step(self, batch: ImageBatch) -> Tensor:
        """Focal and dice loss of the adapters on a batch with masks."""
        if batch.gt_mask is None:
            msg = "Training adapters needs masks (`gt_mask`), and this batch has none."
            raise ValueError(msg)
        mask = _plain(batch.gt_mask)
        self._saw_defect = self._saw_defect or bool(mask.any())
        loss = adapter_loss(self.model.stage_probabilities(_plain(batch.image), self._class_index(batch)), mask)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=batch.batch_size)
        return loss

    def validation_step(self, batch: ImageBatch) -> STEP_OUTPUT:
        """Predictions, from which the post-processor learns; while fitting also the loss, to be monitored."""
        predictions, probabilities = self.model.infer(_plain(batch.image), self._class_index(batch))
        if self._fitting and batch.gt_mask is not None:
            loss = adapter_loss(probabilities, _plain(batch.gt_mask))
            self.log("val_loss", loss, prog_bar=True, batch_size=batch.batch_size, sync_dist=True)
        return cast("STEP_OUTPUT", batch.update(**predictions._asdict()))

    # Lightning leaves out the arguments that a step does not declare.
    def test_step(self, batch: ImageBatch) -> STEP_OUTPUT:  # type: ignore[override]
        """Predictions."""
        return self._predictions(batch)

    def predict_step(self, batch: ImageBatch) -> STEP_OUTPUT:  # type: ignore[override]
        """Predictions."""
        return self._predictions(batch)

    def _predictions(self, batch: ImageBatch) -> STEP_OUTPUT:
        predictions = self.model(_plain(batch.image), self._class_index(batch))
        return cast("STEP_OUTPUT", batch.update(**predictions._asdict()))

    def _class_index(self, batch: ImageBatch) -> Tensor | None:
        class_names = getattr(batch, "class_name", None)
        if len(self.model.class_names) == 1 or class_names is None:
            return None
        return self.model.class_index(class_names)

    # -- checkpoints and export ---------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was learned and leave the frozen CLIP out: megabytes, not gigabytes."""
        super().on_save_checkpoint(checkpoint)
        state_dict = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: value for name, value in state_dict.items() if not name.startswith(_BACKBONE_PREFIX)
        }
        checkpoint[CHECKPOINT_KEY] = self.preparation.to_checkpoint(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for what was learned, and complete it with the CLIP that is already here."""
        super().on_load_checkpoint(checkpoint)
        if CHECKPOINT_KEY not in checkpoint:
            msg = "`ckpt_path` must be a checkpoint that AprilGAN wrote; this one holds nothing of it."
            raise ValueError(msg)
        state_dict = checkpoint["state_dict"]
        learned = {name.removeprefix("model."): value for name, value in state_dict.items()}
        self.preparation.from_checkpoint(self.model, checkpoint[CHECKPOINT_KEY], learned)
        if self.model.has_backbone:
            backbone = self.model.backbone.state_dict()
            state_dict.update({f"{_BACKBONE_PREFIX}{name}": value for name, value in backbone.items()})
        self._trained = True

    def save_adapters(self, path: str | Path) -> Path:
        """Write the adapters with their provenance, to be given as ``adapters`` elsewhere.

        Args:
            path: A name ending in ``.safetensors``.

        Raises:
            ValueError: Another ending.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            msg = f"`path` must end in .safetensors, got {path.name}."
            raise ValueError(msg)
        save_adapters(path, self.model.adapters.state_dict(), self.preparation.provenance)
        return path

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401  # anomalib's arguments, passed on
        """Export for anomalib's ``TorchInferencer``; see anomalib's ``ExportMixin.to_torch``."""
        with self._ready_for_export():
            return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]  # noqa: ANN401  # anomalib's mixin, not Lightning's
        """Export to ONNX; see anomalib's ``ExportMixin.to_onnx``."""
        with self._ready_for_export():
            return super().to_onnx(*args, **kwargs)

    def _make_ready(self) -> None:
        if not self.model.has_backbone or not self.model.class_names:
            self.setup("predict")

    @contextmanager
    def _ready_for_export(self) -> Iterator[None]:
        """Text features and banks inside, the text tower outside."""
        self.preparation.attach_backbone(self.model, self._target_device)
        self._prepare("export")
        backbone = self.model.backbone
        text, backbone.text = backbone.text, None
        try:
            yield
        finally:
            backbone.text = text


def _plain(tensor: Any) -> Tensor:  # noqa: ANN401  # torchvision's subclasses carry no types
    """Without torchvision's subclass, which would go through every operation."""
    return cast("Tensor", tensor.as_subclass(Tensor))


def _height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2:
        msg = f"`image_size` must be one side, or height and width, got {sides}."
        raise ValueError(msg)
    return sides[0], sides[1]


def _plain_references(references: References | None) -> str | list[str] | None:
    if references is None or isinstance(references, (str, os.PathLike)):
        return None if references is None else str(references)
    return [str(reference) for reference in references]


def _check_few_shot(k_shot: int, references: str | list[str] | None) -> None:
    if k_shot < 0:
        msg = f"`k_shot` must be 0 (zero-shot) or more, got {k_shot}."
        raise ValueError(msg)
    if references is not None and not k_shot:
        msg = "`references` are given but `k_shot` is 0. Set `k_shot` to the number of them to use."
        raise ValueError(msg)
