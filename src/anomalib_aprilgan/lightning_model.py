"""APRIL-GAN as an anomalib model: steps, set-up order, checkpoints, export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch, InferenceBatch
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam

from .adapters import LinearAdapters
from .backbone import ClipArchitecture, image_statistics, load_clip
from .checkpoint import Provenance, check_shapes, load_adapters, save_adapters
from .losses import adapter_loss
from .memory_bank import MemoryBank
from .post_processing import AprilGANPostProcessor
from .pre_processing import CLIP_MEAN, CLIP_STD, AprilGANPreProcessor
from .prompts import PromptEnsemble
from .references import draw_references, list_references, read_reference
from .torch_model import AprilGANModel
from .weights import AUTHORS_ADAPTERS, authors_adapters

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "anomalib_aprilgan"
_BACKBONE_PREFIX = "model._backbone."
# The CLIP that the authors' adapters were trained for; its name comes with and without QuickGELU.
_AUTHORS_BACKBONES = ("ViT-L-14-336", "ViT-L-14-336-quickgelu")


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
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        architecture = ClipArchitecture.load(str(backbone), (height, width), quick_gelu)
        tapped = architecture.check_stages(tuple(stages))
        remembered = tapped if memory_stages is None else architecture.check_stages(memory_stages, "memory_stages")
        _check_few_shot(k_shot, references)
        map_limit = float(len(tapped) + (len(remembered) if k_shot else 0))
        mean, std = image_statistics(str(backbone), str(pretrained)) or (CLIP_MEAN, CLIP_STD)
        super().__init__(
            pre_processor=AprilGANPreProcessor((height, width), mean, std) if pre_processor is True else pre_processor,
            post_processor=AprilGANPostProcessor(map_limit) if post_processor is True else post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.architecture = architecture
        self.pretrained = str(pretrained)
        self.adapters = adapters
        self.class_name = class_name
        self.prompts = PromptEnsemble() if prompts is None else PromptEnsemble.from_file(prompts)
        self.k_shot = k_shot
        self.references = references
        self.seed = seed
        self.reference_paths: list[str] = []
        self.provenance = Provenance()
        if class_name is not None:
            self.prompts.sentences(class_name)  # refuses an empty name now, not after CLIP was loaded
        linear = LinearAdapters(len(tapped), architecture.width, architecture.embed_dim)
        linear.requires_grad_(adapters is None)
        self.model = AprilGANModel(linear, MemoryBank(), tapped, remembered)
        self._loaded_adapters: str | None = None
        self._restored_fingerprint: str | None = None
        self._reference_source: list[str] | None = None
        self._trained = False
        self._fitting = False

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
        image = {"fields": ["pred_score", "gt_label"], "prefix": "image_"}
        pixel = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
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
        """anomalib's callbacks; called before Lightning looks at ``configure_optimizers``.

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
        """Load CLIP and adapters, encode class names, fill the memory bank: once, or again for other data.

        Without a trainer, ``setup("predict")`` makes the model ready to be called.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            FileNotFoundError: Weights or references are missing.
            ValueError: They do not fit.
        """
        self._fitting = stage == "fit"
        if not self.model.has_backbone:
            self._attach_backbone()
        if self._trainer is not None and self.trainer.ckpt_path is not None:
            return  # Lightning restores a checkpoint next; `_prepare` follows in the start hooks
        self._prepare(stage)

    def on_fit_start(self) -> None:
        """Refuse data that adapters cannot learn from, and note what they will have seen."""
        self._prepare("fit")
        if self.adapters is not None:
            msg = f"`adapters={self.adapters!r}` are given and not trained. Pass `adapters=None` to train fresh ones."
            raise RuntimeError(msg)
        datamodule = self._datamodule
        train_data = getattr(datamodule, "train_data", None)
        if train_data is not None and not getattr(train_data, "has_anomalous", True):
            msg = (
                "`adapters=None` trains fresh adapters, which takes images of defects with masks; the training data of "
                f"{getattr(datamodule, 'name', 'the datamodule')} has not a single anomalous image. Train on the test "
                "images of other data sets with `anomalib_aprilgan.data.AuxiliaryData`, or pass trained `adapters`."
            )
            raise ValueError(msg)
        self.provenance = Provenance(
            trained_on=_trained_on(datamodule),
            backbone=self.architecture.name,
            fingerprint=self.model.backbone.fingerprint,
            stages=list(self.model.stages),
            quick_gelu=self.architecture.quick_gelu,
            image_size=list(self.architecture.image_size),
            versions={name: version(name) for name in ("anomalib", "open_clip_torch", "torch")},
        )

    def on_fit_end(self) -> None:
        """From here on the adapters are trained."""
        self._trained = True
        self._fitting = False

    def on_validation_start(self) -> None:
        """Complete what waited for a checkpoint."""
        if not self._fitting:
            self._prepare("validate")

    def on_test_start(self) -> None:
        """Complete what waited for a checkpoint."""
        self._prepare("test")

    def on_predict_start(self) -> None:
        """Complete what waited for a checkpoint."""
        self._prepare("predict")

    def _prepare(self, stage: str) -> None:
        self._load_given_adapters()
        self._encode_classes(stage)
        self._fill_memory_bank(stage)
        if stage in {"validate", "test"}:
            self._warn_of_seen_data()
        if stage == "predict" and self.learning_type == LearningType.ONE_CLASS:
            warnings.warn(
                "The adapters are untrained: the maps mean nothing. Train them with `fit`, or pass `adapters`.",
                stacklevel=2,
            )

    @property
    def _datamodule(self) -> AnomalibDataModule | None:
        return getattr(self.trainer, "datamodule", None) if self._trainer is not None else None

    def _attach_backbone(self) -> None:
        backbone = load_clip(self.architecture, self.pretrained)
        if self._restored_fingerprint not in {None, backbone.fingerprint}:
            msg = (
                f"`pretrained`: the checkpoint belongs to a CLIP with weights {self._restored_fingerprint}, "
                f"{self.pretrained} has weights {backbone.fingerprint}."
            )
            raise ValueError(msg)
        self.model.attach_backbone(backbone.to(self._target_device))

    @property
    def _target_device(self) -> torch.device:
        # Lightning moves the module only after `setup`; encoding should not wait for that.
        return self.trainer.strategy.root_device if self._trainer is not None else self.device

    def _load_given_adapters(self) -> None:
        if self.adapters is None or self._loaded_adapters == CHECKPOINT_KEY:
            return
        name = self.adapters
        if name == "auto":
            target = getattr(self._datamodule, "name", None)
            name = next(key for key, source in AUTHORS_ADAPTERS.items() if source.trained_on != target)
        if name == self._loaded_adapters:
            return
        if name in AUTHORS_ADAPTERS:
            if self.architecture.name not in _AUTHORS_BACKBONES:
                msg = (
                    f"`adapters={self.adapters!r}` were trained for the CLIP {_AUTHORS_BACKBONES[0]}, the model has "
                    f"{self.architecture.name}. Pass an adapter file for it, or None to train fresh ones."
                )
                raise ValueError(msg)
            path = authors_adapters(name)
            state_dict, _ = load_adapters(path)
            provenance = Provenance(trained_on={AUTHORS_ADAPTERS[name].trained_on: []}, backbone=_AUTHORS_BACKBONES[0])
        else:
            path = Path(name).expanduser()
            state_dict, provenance = load_adapters(path)
        provenance.check(self.architecture, self.model.backbone.fingerprint, self.model.stages, str(path))
        check_shapes(state_dict, self.model.adapters.state_dict(), str(path))
        self.model.adapters.load_state_dict(state_dict)
        self.provenance = provenance
        self._loaded_adapters = name
        logger.info("Adapters: %s, trained on %s", path, provenance.trained_on or "unknown data")

    def _encode_classes(self, stage: str) -> None:
        names = self._wanted_classes(stage)
        if names == self.model.class_names:
            return
        known = dict(zip(self.model.class_names, self.model.text_features, strict=True))
        backbone = self.model.backbone
        features = [
            known[name] if name in known else backbone.encode_states(*self.prompts.sentences(name)) for name in names
        ]
        self.model.set_classes(names, torch.stack(features).to(self._target_device))
        logger.info("Class names in the prompts: %s", ", ".join(names))

    def _wanted_classes(self, stage: str) -> tuple[str, ...]:
        if self.class_name is not None:
            return (self.class_name,)
        datamodule = self._datamodule
        if datamodule is not None:
            class_names = getattr(datamodule, "class_names", None)
            if class_names:
                return tuple(class_names)
            if datamodule.category:
                return (datamodule.category,)
        if len(self.model.class_names) == 1 or (self.model.class_names and stage in {"fit", "validate", "test"}):
            return self.model.class_names
        return ("object",)

    def _fill_memory_bank(self, stage: str) -> None:
        if not self.k_shot:
            return
        datamodule = self._datamodule
        if self.references is not None:
            source = ["references", str(self.references)]
        elif datamodule is not None and getattr(datamodule, "train_data", None) is not None:
            source = ["training images", datamodule.name, datamodule.category]
        elif self.model.memory_bank.k_shot or stage == "validate":
            return  # what is remembered stays; a validation without data needs nothing
        else:
            msg = f"`k_shot={self.k_shot}` needs normal images: pass `references`, or a datamodule with training images."
            raise ValueError(msg)
        wanted = [*source, str(self.k_shot), str(self.seed)]
        if wanted == self._reference_source and self.model.memory_bank.k_shot:
            return
        if self.references is not None:
            files = list_references(self.references)
        else:
            samples = datamodule.train_data.samples
            files = sorted(Path(path) for path in samples.image_path[samples.label_index == 0])
        chosen = draw_references(files, self.k_shot, self.seed, " ".join(source))
        pre_process = self.pre_processor or nn.Identity()
        images = torch.cat([pre_process(read_reference(file)) for file in chosen]).to(self._target_device)
        self.model.remember(images)
        self._reference_source = wanted
        self.reference_paths = [str(file) for file in chosen]
        logger.info("References: %s", ", ".join(self.reference_paths))
        if isinstance(self.post_processor, AprilGANPostProcessor):
            self._bound_map_maximum(images)

    def _bound_map_maximum(self, images: Tensor) -> None:
        """Bounds of the map maximum for the case that no validation data tells better ones.

        From below what good parts reach: the lowest of the references, each held out in turn (for
        a single one, 0). From above what a map can reach where every stage is certain.
        """
        limit = float(len(self.model.stages) + len(self.model.memory_stages))
        post_processor = self.post_processor
        post_processor.to(images.device).set_defaults(limit)
        post_processor.fuse_map_maximum = True
        if self.model.memory_bank.k_shot > 1 and len(self.model.class_names) == 1:
            post_processor.map_maximum_min.copy_(self.model.held_out_maxima(images).min())

    def _warn_of_seen_data(self) -> None:
        datamodule = self._datamodule
        if datamodule is None or self._fitting:
            return
        for dataset, categories in _trained_on(datamodule).items():
            seen = self.provenance.was_trained_on(dataset, categories)
            if seen:
                warnings.warn(
                    f"\n{'!' * 100}\nNOT ZERO-SHOT: the adapters were trained on {dataset} ({', '.join(seen)}), which is "
                    "the data under test. The figures will be too good. Use adapters trained on other data, for "
                    f"instance `adapters='auto'`.\n{'!' * 100}",
                    stacklevel=2,
                )

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
            self._make_ready()
        return super().forward(batch, *args, **kwargs)

    def training_step(self, batch: Batch) -> Tensor:
        """Focal and dice loss of the adapters on a batch with masks."""
        if batch.gt_mask is None:
            msg = "Training adapters needs masks (`gt_mask`), and this batch has none."
            raise ValueError(msg)
        probabilities = self.model.stage_probabilities(batch.image.as_subclass(Tensor), self._class_index(batch))
        loss = adapter_loss(probabilities, batch.gt_mask.as_subclass(Tensor))
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=batch.batch_size)
        return loss

    def validation_step(self, batch: Batch) -> STEP_OUTPUT:
        """Predictions, from which the post-processor learns; while fitting also the loss, to be monitored."""
        predictions, probabilities = self.model.infer(batch.image.as_subclass(Tensor), self._class_index(batch))
        if self._fitting and batch.gt_mask is not None:
            loss = adapter_loss(probabilities, batch.gt_mask.as_subclass(Tensor))
            self.log("val_loss", loss, prog_bar=True, batch_size=batch.batch_size, sync_dist=True)
        return batch.update(**predictions._asdict())

    def test_step(self, batch: Batch) -> STEP_OUTPUT:
        """Predictions."""
        return self._predictions(batch)

    def predict_step(self, batch: Batch) -> STEP_OUTPUT:
        """Predictions."""
        return self._predictions(batch)

    def _predictions(self, batch: Batch) -> Batch:
        predictions = self.model(batch.image.as_subclass(Tensor), self._class_index(batch))
        return batch.update(**predictions._asdict())

    def _class_index(self, batch: Batch) -> Tensor | None:
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
        checkpoint[CHECKPOINT_KEY] = {
            "class_names": list(self.model.class_names),
            "fingerprint": self.model.backbone.fingerprint if self.model.has_backbone else self._restored_fingerprint,
            "provenance": self.provenance.to_dict(),
            "references": self.reference_paths,
            "reference_source": self._reference_source,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for what was learned, and complete it with the CLIP that is already here."""
        super().on_load_checkpoint(checkpoint)
        state_dict, learned = checkpoint["state_dict"], checkpoint[CHECKPOINT_KEY]
        provenance = Provenance.from_dict(learned["provenance"])
        if self.model.has_backbone:
            backbone = self.model.backbone
            provenance.check(self.architecture, backbone.fingerprint, self.model.stages, "the checkpoint")
            state_dict.update({f"{_BACKBONE_PREFIX}{name}": value for name, value in backbone.state_dict().items()})
        prefix = "model.adapters."
        adapters = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        check_shapes(adapters, self.model.adapters.state_dict(), "the checkpoint")
        self.model.set_classes(learned["class_names"], torch.empty_like(state_dict["model.text_features"]))
        self.model.memory_bank.tokens = torch.empty_like(state_dict["model.memory_bank.tokens"])
        self.provenance = provenance
        self.reference_paths = learned["references"]
        self._reference_source = learned["reference_source"]
        self._restored_fingerprint = learned["fingerprint"]
        self._loaded_adapters = CHECKPOINT_KEY
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
        save_adapters(path, self.model.adapters.state_dict(), self.provenance)
        return path

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401  # anomalib's arguments, passed on
        """Export for anomalib's ``TorchInferencer``; see anomalib's ``ExportMixin.to_torch``."""
        with self._ready_for_export():
            return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401
        """Export to ONNX; see anomalib's ``ExportMixin.to_onnx``."""
        with self._ready_for_export():
            return super().to_onnx(*args, **kwargs)

    def _make_ready(self) -> None:
        if not self.model.has_backbone or not self.model.class_names:
            self.setup("predict")

    @contextmanager
    def _ready_for_export(self) -> Iterator[None]:
        """Text features and banks inside, the text tower outside."""
        if not self.model.has_backbone:
            self._attach_backbone()
        self._prepare("predict")
        backbone = self.model.backbone
        text, backbone.text = backbone.text, None
        try:
            yield
        finally:
            backbone.text = text


def _check_few_shot(k_shot: int, references: str | list[str] | None) -> None:
    if k_shot < 0:
        msg = f"`k_shot` must be 0 (zero-shot) or more, got {k_shot}."
        raise ValueError(msg)
    if references is not None and not k_shot:
        msg = "`references` are given but `k_shot` is 0. Set `k_shot` to the number of them to use."
        raise ValueError(msg)


def _trained_on(datamodule: AnomalibDataModule | None) -> dict[str, list[str]]:
    """anomalib's names of the data sets of a datamodule, and their categories."""
    if datamodule is None:
        return {}
    sources = getattr(datamodule, "sources", None)
    if sources is not None:
        return dict(sources)
    return {datamodule.name: [datamodule.category] if datamodule.category else []}
