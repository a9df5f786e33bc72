"""APRIL-GAN as an anomalib model: steps, set-up order, checkpoints, export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

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

from .arguments import check_few_shot, check_maps, height_and_width, plain_references, size_of_shape
from .checkpoint import save_adapters
from .class_names import class_of_file, words_of_classes
from .clip.architecture import ClipArchitecture
from .clip.prompts import PromptEnsemble
from .clip.weights import image_statistics
from .data.gathering import class_name_of
from .data.pre_processing import CLIP_MEAN, CLIP_STD, AprilGANPreProcessor, prepared
from .data.reading_hooks import ReadingHooks, unreadable_files
from .decision.calibration import Calibration
from .decision.post_processing import AprilGANPostProcessor
from .distributed import all_gather_object
from .export import of_one_class, without_text_tower
from .network.adapters import LinearAdapters
from .network.losses import partial_adapter_loss
from .network.model import AprilGANModel, HeldOut
from .network.tiling import check_tiles, run_tiled
from .preparation import Preparation
from .results.callback import put_post_processor_first
from .results.evaluator import ClassEvaluator
from .results.table import DecisionsWriter
from .results.visualizer import AprilGANVisualizer

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "anomalib_aprilgan"
# Tiles of a large image that go through CLIP together.
_TILES_AT_ONCE = 4
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
        class_name: Words for the object in the sentences; else the datamodule's category, else "object". For
            several products in one model a list of names, or a mapping from names to words. Every image then goes to
            the class that its datamodule tells, or whose name a folder of its path has.
        default_class: The one of several classes for images that tell none of them, and the one that an export is
            of; else such images are an error.
        class_aliases: Whether MVTec AD's and VisA's names that are no words (``pcb1``) are replaced by some in the
            sentences; the published results use the names.
        prompts: YAML file with own ``normal``, ``anomalous`` and ``templates`` lists; else the paper's.
        k_shot: Number of normal reference images; 0 for zero-shot.
        references: Folder or list of reference images; for several classes a mapping from their names to such, or a
            folder with a folder of each name; else drawn from the datamodule's training images.
        memory_stages: Tapped blocks of the memory bank; else those of ``stages``.
        seed: Seed of the draw of references.
        tile_size: Side in pixels of the overlapping tiles that large images are inspected in, each at ``image_size``;
            maps are then as large as the images. Unset, images are resized as a whole.
        tile_overlap: Share of a tile's side that its neighbour covers too, at least.
        smoothing_sigma: Standard deviation of the Gaussian that the anomaly map is smoothed with, in pixels of the
            map at ``image_size``: 0 or more, four times it within the shorter side; 0, as published, for none.
        neighbourhood: Side in patches, odd, of the square whose tokens are averaged before patches are compared with
            those of the references (as PatchCore does); 1, as published, for each patch alone.
        top_share: Share of the map's pixels in [0, 1], the highest ones, whose mean stands for the map in the score
            with references (0.01: the highest 1 %); 0, as published, for its maximum.
        aspect_ratio: Width over height of the pictures, above 0: ``image_size`` must then be one number and is the
            side of the square that is given this shape at about the same cost (:func:`pre_processing.aspect_size`).
            Unset, ``image_size`` is what it says. Not for tiles.
        calibration: Normal images that set the thresholds, no defect needed: ``"references"`` (each left out in turn,
            with light variants), or others, as a folder, a list or a mapping like ``references``. Unset, labelled
            validation images set them, or documented defaults hold.
        false_positive_rate: Share of good parts that a calibrated threshold may flag, in (0, 0.5].
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one; ``"anomalib"`` for the metrics that its other models
            have, which ``anomalib benchmark`` needs to put them into one table.
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
        class_name: dict[str, str] | list[str] | str | None = None,
        prompts: str | None = None,
        k_shot: int = 0,
        references: dict[str, str | list[str]] | list[str] | str | None = None,
        memory_stages: Sequence[int] | None = None,
        seed: int = 0,
        default_class: str | None = None,
        class_aliases: bool = False,
        tile_size: int | None = None,
        tile_overlap: float = 0.25,
        smoothing_sigma: float = 0.0,
        neighbourhood: int = 1,
        top_share: float = 0.0,
        aspect_ratio: float | None = None,
        calibration: dict[str, str | list[str]] | list[str] | str | None = None,
        false_positive_rate: float = 0.01,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool | Literal["anomalib"] = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Lightning saves these very names as hyperparameters: plain data, whatever config library they came from.
        backbone, pretrained, adapters = str(backbone), str(pretrained), None if adapters is None else str(adapters)
        if aspect_ratio is None:
            image_size = size = height_and_width(image_size)
        else:
            size = size_of_shape(image_size, aspect_ratio, tile_size, backbone)
        stages, memory_stages = tuple(stages), None if memory_stages is None else tuple(memory_stages)
        references, calibration = plain_references(references), plain_references(calibration)
        architecture = ClipArchitecture.load(backbone, size, quick_gelu)
        tapped = architecture.check_stages(stages)
        remembered = tapped if memory_stages is None else architecture.check_stages(memory_stages, "memory_stages")
        check_few_shot(k_shot, references)
        check_maps(smoothing_sigma, neighbourhood, size)
        if not isinstance(post_processor, bool) and getattr(post_processor, "top_share", 0.0) != top_share:
            msg = "`post_processor` and `top_share` do not go together: pass `AprilGANPostProcessor(top_share=...)`."
            raise ValueError(msg)
        map_limit = len(tapped) + (0.5 * len(remembered) if k_shot else 0.0)
        tiled = tile_size is not None
        if tile_size is not None:
            check_tiles(tile_size, tile_overlap)
        if not isinstance(pre_processor, bool) and getattr(pre_processor, "tiled", False) != tiled:
            msg = "`pre_processor` and `tile_size` do not go together: pass `AprilGANPreProcessor(..., tiled=True)`."
            raise ValueError(msg)
        mean, std = image_statistics(backbone, pretrained) or (CLIP_MEAN, CLIP_STD)
        super().__init__(
            pre_processor=AprilGANPreProcessor(size, mean, std, tiled=tiled)
            if pre_processor is True
            else pre_processor,
            post_processor=AprilGANPostProcessor(map_limit, top_share=top_share)
            if post_processor is True
            else post_processor,
            evaluator=AnomalibModule.configure_evaluator() if evaluator == "anomalib" else evaluator,
            visualizer=visualizer,
        )
        if isinstance(self.post_processor, AprilGANPostProcessor):
            self.post_processor.set_defaults(map_limit)
        self.adapters = adapters
        self.k_shot = k_shot
        ensemble = PromptEnsemble() if prompts is None else PromptEnsemble.from_file(prompts)
        words = words_of_classes(class_name)
        for said in (words or {}).values():
            ensemble.sentences(said)  # refuses an empty name now, not after CLIP was loaded
        if default_class is not None and (words is None or default_class not in words):
            msg = f"`default_class` must be one of the classes in `class_name` ({class_name}), got {default_class!r}."
            raise ValueError(msg)
        self.default_class = default_class
        self.tile_size, self.tile_overlap = tile_size, tile_overlap
        self.preparation = Preparation(
            architecture,
            pretrained,
            adapters,
            words,
            ensemble,
            class_aliases,
            k_shot,
            references,
            seed,
            tile_size,
            top_share,
        )
        self.calibration = None if calibration is None else Calibration(calibration, false_positive_rate, seed)
        if self.calibration is not None:
            self._check_calibration(self.calibration)
        linear = LinearAdapters(len(tapped), architecture.width, architecture.embed_dim)
        linear.requires_grad_(adapters is None)
        self.model = AprilGANModel(linear, tapped, remembered, smoothing_sigma, neighbourhood)
        self._reading_hooks = ReadingHooks()
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
        """The paper's metrics, class by class: AUROC, F1-max and AP of images and pixels, and the pixels' AUPRO."""
        image: dict[str, Any] = {"fields": ["pred_score", "gt_label"], "prefix": "image_"}
        pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "prefix": "pixel_", "strict": False}
        return ClassEvaluator(
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

    @classmethod
    def configure_visualizer(cls) -> AprilGANVisualizer:  # type: ignore[override]  # anomalib's has other arguments
        """Pictures whose heatmaps share one colour range."""
        return AprilGANVisualizer()

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
        # Those that the trainer was given move behind the post-processor, and there is none besides.
        callbacks: list[Callback] = [] if self._trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        given = [callback for callback in callbacks if isinstance(callback, DecisionsWriter)]
        own = [self._reading_hooks, *(given or [DecisionsWriter()])]
        return [*cast("list[Callback]", super().configure_callbacks()), *own]

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
        else:
            put_post_processor_first(self.trainer)
            self._reading_hooks.install(self.trainer, stage)  # before Lightning starts the loaders' workers

    def on_fit_start(self) -> None:
        """Refuse data that adapters cannot learn from, and note what they will have seen."""
        if self.tile_size is not None:
            msg = "`tile_size` is for inspection. Train the adapters without it, then pass them as `adapters`."
            raise RuntimeError(msg)
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
        self._saw_defect = any(all_gather_object(self._saw_defect))
        if not self._saw_defect:
            self._refuse_normal_data()

    def _refuse_normal_data(self) -> None:
        name = getattr(self._datamodule, "name", "the loader")
        msg = (
            "`adapters=None` trains fresh adapters, which takes images of defects; the training data of "
            f"{name} has not a single anomalous image. Wrap datamodules with defects, with masks or labels alone, in "
            "`anomalib_aprilgan.data.AuxiliaryData`; for good parts alone give it `synthetic_rate=0.5`; or pass "
            "trained `adapters`."
        )
        raise ValueError(msg)

    def on_fit_end(self) -> None:
        """From here on the adapters are trained; thresholds for others do not hold."""
        if self.calibration is not None:
            self.calibration.forget()
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

    def on_predict_end(self) -> None:
        """Say once more which files of a folder could not be read."""
        skipped = unreadable_files(self.trainer.predict_dataloaders)
        if skipped:
            names = ", ".join(path.name for path in skipped)
            warnings.warn(f"{len(skipped)} files could not be read and have no prediction: {names}.", stacklevel=2)

    @torch.no_grad()
    @torch.inference_mode(mode=False)  # what is made here outlives the loop that asks for it
    def _prepare(self, stage: str) -> None:
        datamodule, preparation = self._datamodule, self.preparation
        preparation.load_adapters(self.model, datamodule)
        single = stage == "export" or (stage == "predict" and not self._is_told_classes())
        preparation.encode_classes(self.model, datamodule, single=single)
        if isinstance(self.post_processor, AprilGANPostProcessor):
            self.post_processor.set_classes(self.model.class_names)
        self.model.to(self._target_device)
        if stage == "fit":
            return  # adapters are trained without a memory bank
        filled = preparation.fill_memory_bank(self.model, datamodule, self.pre_processor, optional=stage == "validate")
        if filled and isinstance(self.post_processor, AprilGANPostProcessor):
            for number, held_out in filled.items():
                self._bound_map_maximum(self.post_processor.of_class(number), held_out)
            self.post_processor.fuse_map_maximum = True
        elif filled:
            warnings.warn(
                "`post_processor` is not an AprilGANPostProcessor: scores stay those of the text, references change "
                "the maps alone.",
                stacklevel=2,
            )
        if self.calibration is not None:
            self._calibrate(self.calibration)
        if stage in {"validate", "test"}:
            preparation.warn_of_seen_data(datamodule)
        if self.learning_type == LearningType.ONE_CLASS:
            warnings.warn(
                "The adapters are untrained: the maps mean nothing. Train them with `fit`, or pass `adapters`.",
                stacklevel=2,
            )

    def _bound_map_maximum(self, post_processor: AprilGANPostProcessor, held_out: HeldOut) -> None:
        """Bounds and thresholds for the case that no validation data tells better ones.

        The map maximum is bounded from below by what good parts reach: the lowest of the references,
        each held out in turn (for a single one, 0); from above by what a map reaches where every stage is
        certain, a cosine distance of one half counting as certain. Pixels are cut above all held-out maps.
        """
        if post_processor.calibrated:
            if self.calibration is None:
                warnings.warn(
                    "The references have changed; the thresholds are still the calibrated ones.", stacklevel=2
                )
            return
        post_processor.set_defaults(self._map_limit, *held_out)

    @property
    def _map_limit(self) -> float:
        return len(self.model.stages) + (0.5 * len(self.model.memory_stages) if self.model.is_few_shot else 0.0)

    def _check_calibration(self, calibration: Calibration) -> None:
        """Refuse a calibration that cannot be, before CLIP is loaded."""
        if calibration.from_references and not self.k_shot:
            msg = (
                "`calibration='references'` needs `k_shot` and `references`. Without them calibrate with a folder of "
                f"at least {calibration.least} normal images, or another `false_positive_rate`."
            )
            raise ValueError(msg)
        if not isinstance(self.post_processor, AprilGANPostProcessor):
            msg = "`calibration` sets the thresholds of an AprilGANPostProcessor: leave `post_processor` as it is."
            raise ValueError(msg)  # two arguments that do not go together

    def _calibrate(self, calibration: Calibration) -> None:
        """Thresholds of every class from normal images, unless they are those already."""
        names, preparation = self.model.class_names, self.preparation
        for number, name in enumerate(names):
            if self.k_shot and not self.model.memory_bank(number).k_shot:
                continue  # a validation without data: the references are still to come
            references = preparation.reference_paths.get(name, [])
            files = partial(calibration.files_of, name, names, references)
            key = [str(calibration.normals), str(calibration.false_positive_rate), preparation.words_of(name)]
            key += [str(preparation.provenance.to_dict()), *references]
            if calibration.is_done(name, key, files):
                continue
            normals, part = files(), cast("AprilGANPostProcessor", self.post_processor).of_class(number)
            part.set_defaults(self._map_limit)  # the bounds that scores are fused with
            score = partial(self._raw_score, number=number)
            bank, tiles = self.model.memory_bank(number), preparation.number_of_tiles
            found = calibration.thresholds(normals, bank, tiles, score)
            part.calibrate(found.image, found.pixel, self._map_limit)
            calibration.note(name, key, normals)
            logger.info(
                "Calibrated %s with %s normal images: image threshold %.4f, pixel threshold %.4f (raw).",
                name,
                len(normals),
                found.image,
                found.pixel,
            )

    def _raw_score(self, image: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Raw score, fused where there are references, and map maximum of one image ``(1, 3, H, W)`` of a class."""
        image = image.to(self._target_device)
        index = None if len(self.model.class_names) == 1 else torch.tensor([number], device=image.device)
        raw = self._infer(image if self.tile_size is not None else prepared(self.pre_processor, image), index)
        score, anomaly_map = cast("tuple[Tensor, Tensor]", (raw.pred_score, raw.anomaly_map))
        post_processor = cast("AprilGANPostProcessor", self.post_processor)
        if post_processor.fuse_map_maximum:
            score = post_processor.of_class(number).fuse(score, anomaly_map)
        return score[0], anomaly_map.amax()

    @property
    def _datamodule(self) -> AnomalibDataModule | None:
        datamodule = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        return datamodule if isinstance(datamodule, AnomalibDataModule) else None

    def _is_told_classes(self) -> bool:
        """Whether the images to be predicted come with their classes."""
        loaders = self.trainer.predict_dataloaders if self._trainer is not None else None
        datasets = [
            getattr(loader, "dataset", None) for loader in (loaders if isinstance(loaders, list) else [loaders])
        ]
        return any("class_name" in getattr(dataset, "samples", ()) for dataset in datasets)

    @property
    def _target_device(self) -> torch.device:
        # Lightning moves the module only after `setup`; encoding should not wait for that.
        return self.trainer.strategy.root_device if self._trainer is not None else self.device

    # -- steps --------------------------------------------------------------------------------------

    def forward(self, batch: Tensor, class_name: str | Sequence[str] | None = None) -> InferenceBatch:
        """Scores, labels, maps and masks of images as a camera gives them.

        Args:
            batch: ``(B, 3, H, W)``, float in ``[0, 1]``, any size.
            class_name: The class of all images, or of each; not needed for a model of one class.

        Returns:
            ``pred_score`` and ``pred_label`` ``(B,)``, ``anomaly_map`` and ``pred_mask`` at the model's image size.

        Raises:
            ValueError: The batch has another shape, or the classes are missing or unknown.
        """
        if not torch.compiler.is_compiling():
            if batch.ndim != 4 or batch.shape[1] != 3:
                msg = f"`batch` must be (B, 3, H, W), got {tuple(batch.shape)}."
                raise ValueError(msg)
            self._make_ready()
        # The length would fix the batch size of an export.
        class_index = None if len(self.model.class_names) == 1 else self._rows_of(class_name, len(batch))
        images = batch if self.tile_size is not None else prepared(self.pre_processor, batch)
        predictions = self._infer(images, class_index)
        if isinstance(self.post_processor, AprilGANPostProcessor):
            predictions = self.post_processor(predictions, class_index)
        elif self.post_processor:
            predictions = self.post_processor(predictions)
        return predictions

    def _infer(self, images: Tensor, class_index: Tensor | None) -> InferenceBatch:
        """Raw scores and maps of prepared images; in tiled mode of images as they are, one after the other."""
        if self.tile_size is None:
            return cast("InferenceBatch", self.model(images, class_index))
        scores, maps = [], []
        for number, image in enumerate(images):
            index = None if class_index is None else class_index[number]

            def score(tiles: Tensor, index: Tensor | None = index) -> tuple[Tensor, Tensor]:
                out = self.model(
                    prepared(self.pre_processor, tiles), None if index is None else index.expand(len(tiles))
                )
                return out.pred_score, out.anomaly_map

            one, anomaly_map = run_tiled(image, self.tile_size, self.tile_overlap, _TILES_AT_ONCE, score)
            scores.append(one)
            maps.append(anomaly_map)
        # No copy of the map of a single large image.
        return InferenceBatch(torch.stack(scores), None, maps[0][None] if len(maps) == 1 else torch.stack(maps), None)

    def training_step(self, batch: ImageBatch) -> Tensor:
        """Focal and dice loss of the adapters on a batch with masks; where there are none, that of the labels."""
        mask = _mask_of(batch)
        if mask is None:
            msg = (
                "Training adapters needs masks (`gt_mask`), and this batch has none. To train on images with labels "
                "alone, wrap their datamodule: `anomalib_aprilgan.data.AuxiliaryData(datamodules=[...])`."
            )
            raise ValueError(msg)
        self._saw_defect = self._saw_defect or bool(mask.any())
        loss = partial_adapter_loss(self.model.stage_probabilities(_plain(batch.image), self._class_index(batch)), mask)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=batch.batch_size)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Predictions, from which the post-processor learns; while fitting also the loss, to be monitored."""
        del batch_idx, dataloader_idx
        if not self._fitting:
            return self._predictions(batch)
        predictions, probabilities = self.model.infer(_plain(batch.image), self._class_index(batch, note=True))
        mask = _mask_of(batch)
        if mask is not None:
            loss = partial_adapter_loss(probabilities, mask)
            self.log("val_loss", loss, prog_bar=True, batch_size=batch.batch_size, sync_dist=True)
        return cast("STEP_OUTPUT", batch.update(**predictions._asdict()))

    # Lightning leaves out the arguments that a step does not declare.
    def test_step(self, batch: ImageBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> STEP_OUTPUT:  # type: ignore[override]
        """Predictions."""
        del batch_idx, dataloader_idx
        return self._predictions(batch)

    def predict_step(self, batch: ImageBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> STEP_OUTPUT:  # type: ignore[override]
        """Predictions."""
        del batch_idx, dataloader_idx
        return self._predictions(batch)

    def _predictions(self, batch: ImageBatch) -> STEP_OUTPUT:
        predictions = self._infer(_plain(batch.image), self._class_index(batch, note=True))
        return cast("STEP_OUTPUT", batch.update(**predictions._asdict()))

    @property
    def classes(self) -> SimpleNamespace:
        """The classes of the model."""
        return SimpleNamespace(names=self.model.class_names)

    def rows_of(self, batch: ImageBatch) -> Tensor:
        """``(B,)`` the class of every image."""
        index = self._class_index(batch)
        return torch.zeros(batch.batch_size, dtype=torch.long) if index is None else index

    def _class_index(self, batch: ImageBatch, *, note: bool = False) -> Tensor | None:
        """Row of the class of every image; ``note`` leaves it on the batch, for thresholds and metrics by class."""
        if len(self.model.class_names) == 1:
            return None
        names = getattr(batch, "class_name", None)
        if names is None:
            # While predicting, the trainer's datamodule may be the one of an earlier test.
            told = None if self.trainer.predicting else self._datamodule
            category = None if told is None else class_name_of(told)
            paths = batch.image_path or [""] * batch.batch_size
            known = self.model.class_names
            names = [category if category in known else class_of_file(path, known) for path in paths]
        index = self._rows_of_classes(names)
        if note:
            batch.class_index = index  # type: ignore[attr-defined]  # a field of ours, not of anomalib's own batches
        return index

    def _rows_of(self, class_name: str | Sequence[str] | None, number: int) -> Tensor | None:
        """Rows of the classes that a caller names for so many images."""
        names = self.default_class if class_name is None else class_name
        if names is None:
            return None  # the model says what is missing
        return self._rows_of_classes([names] * number if isinstance(names, str) else names)

    def _rows_of_classes(self, names: Sequence[str]) -> Tensor:
        known = self.model.class_names
        unknown = sorted({name for name in names if name not in known})
        if unknown and self.default_class is None:
            msg = (
                f"{unknown[0]} is of none of the classes {known}. Name the folder of the images after the class, or "
                "set `default_class` to the class of all such images."
            )
            raise ValueError(msg)
        return self.model.class_index([name if name in known else cast("str", self.default_class) for name in names])

    # -- checkpoints and export ---------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was learned and leave the frozen CLIP out: megabytes, not gigabytes."""
        super().on_save_checkpoint(checkpoint)
        state_dict = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: value for name, value in state_dict.items() if not name.startswith(_BACKBONE_PREFIX)
        }
        checkpoint[CHECKPOINT_KEY] = self.preparation.to_checkpoint(self.model)
        checkpoint[CHECKPOINT_KEY]["calibration"] = {} if self.calibration is None else self.calibration.used

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for what was learned, and complete it with the CLIP that is already here."""
        super().on_load_checkpoint(checkpoint)
        if CHECKPOINT_KEY not in checkpoint:
            msg = "`ckpt_path` must be a checkpoint that AprilGAN wrote; this one holds nothing of it."
            raise ValueError(msg)
        state_dict = checkpoint["state_dict"]
        learned = {name.removeprefix("model."): value for name, value in state_dict.items()}
        self.preparation.from_checkpoint(self.model, checkpoint[CHECKPOINT_KEY], learned)
        if self.calibration is not None:
            self.calibration.restore(checkpoint[CHECKPOINT_KEY].get("calibration", {}))
        if isinstance(self.post_processor, AprilGANPostProcessor):
            self.post_processor.set_classes(self.model.class_names)
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

    @contextmanager
    def _ready_for_export(self) -> Iterator[None]:
        if self.tile_size is not None:
            msg = (
                "`tile_size` cannot be exported: the tiles depend on the image. Export without it, and run the "
                "exported model on tiles with `anomalib_aprilgan.network.tiling.run_tiled`."
            )
            raise RuntimeError(msg)
        self.preparation.attach_backbone(self.model, self._target_device)
        self._prepare("export")
        with without_text_tower(self.model), of_one_class(self, self.model, self.default_class):
            yield

    def _make_ready(self) -> None:
        if not self.model.has_backbone or not self.model.class_names:
            self.setup("predict")


def _mask_of(batch: ImageBatch) -> Tensor | None:
    """``(B, H, W)`` masks of a batch, ``UNKNOWN`` where only the label is known; ``None`` where it tells neither."""
    mask = batch.gt_mask if batch.gt_mask is not None else getattr(batch, "partial_mask", None)
    return None if mask is None else _plain(mask)


def _plain(tensor: Any) -> Tensor:  # noqa: ANN401  # torchvision's subclasses carry no types
    """Without torchvision's subclass, which would go through every operation."""
    return cast("Tensor", tensor.as_subclass(Tensor))
