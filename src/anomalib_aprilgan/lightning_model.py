"""APRIL-GAN as an anomalib model: its arguments, hooks, steps and exports."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from . import checkpoint as checkpoints
from . import training
from .building import build_network, build_post_processor, build_pre_processor, build_results
from .classes import Classes, Names, rows_of_batch, words_by_name
from .clip.backbone import VisionOutput
from .clip.prompts import PromptEnsemble
from .components import Components
from .data.listing import DataAtHand, class_name_of, tells_classes
from .data.reading_hooks import ReadingHooks
from .data.roi import plain_roi
from .decision.fusion import ScoreFusion
from .decision.post_processing import AprilGANPostProcessor
from .deployment.options import ExportOptions
from .exporting import Exporting
from .growing import Growing
from .inspection import look_within, predict_images
from .network.losses import partial_adapter_loss
from .network.model import AprilGANModel, RawPredictions
from .preparation import SETTING_UP, Made, Workplace, attach_clip, is_ready, note_learned, prepare
from .remembering import Remembering
from .reporting import Reporting
from .results.metric_inputs import MetricInputs
from .results.outputs import Outputs
from .results.table import DecisionsWriter
from .results.trainer import prepare_trainer
from .running import datamodule_of, is_fitting, is_running, plain_images, precision_of, running_loaders
from .settings import (
    Settings,
    adapters_of,
    architecture_of,
    height_and_width,
    memory_of,
    numbers_of,
    optional_source,
    plain_paths,
    source_of,
)
from .sharing import Sharing
from .training import Training


class AprilGAN(Components, Reporting, Training, Growing, Sharing, Exporting, AnomalibModule):  # type: ignore[misc]  # its visualizer
    """APRIL-GAN: zero-/few-shot anomaly detection with CLIP, linear adapters and memory banks.

    A frozen CLIP compares an image and its patches with sentences about good and bad objects. A linear adapter per
    tapped stage, trained on *another* data set, brings patches into the joint space. With ``k_shot`` normal reference
    images, every patch is also compared with theirs (arXiv:2305.17382).

    Args:
        backbone: open_clip architecture name, or path of an open_clip model-config JSON.
        pretrained: open_clip tag, or path of a weight file (safetensors, .pt, OpenAI's archive).
        quick_gelu: Whether CLIP runs QuickGELU; unset, what its config says: GELU, as published, for ViT-L-14-336.
        image_size: Side of the square that images are resized to, or height and width, in pixels.
        stages: Tapped stages of the vision tower, counted from 1; ``"auto"`` for evenly spaced quarters.
        adapters: ``"mvtec"`` or ``"visa"`` (the authors', by the data set they were trained on), ``"auto"`` (the one
            of them not trained on the target), a file, ``"hf://owner/name[@revision]"`` (on the Hugging Face hub), or
            ``None``: fresh ones that ``fit`` trains.
        class_name: Words for the object in the sentences; else the datamodule's class, else "object". For several
            products a list of names, or a mapping from names to words; every image then goes to the class that its
            datamodule tells, or that the nearest folder within the data is named after.
        prompts: YAML file with own ``normal``, ``anomalous`` and ``templates`` lists, or its content; else the paper's.
        k_shot: Number of normal reference images; 0 for zero-shot.
        references: Folder or list of reference images; for several classes a mapping from their names to such, or a
            folder with a folder of each name; else drawn from the datamodule's training images.
        memory_stages: Tapped stages of the memory bank; else those of ``stages``.
        seed: Seed of the draw of references and of fresh adapters.
        default_class: Class of images that tell none of several, and of an export; else such images are an error.
        class_aliases: Whether MVTec AD's and VisA's names that are no words (``pcb1``) are replaced by some.
        tile_size: Side in pixels of the overlapping tiles that large images are inspected in, each at ``image_size``;
            maps are then as large as the images. Unset, images are resized as a whole.
        tile_overlap: Share of a tile's side that its neighbour covers too, at least.
        smoothing_sigma: Standard deviation in pixels of the Gaussian that smooths maps; 0, as published, for none.
        neighbourhood: Odd side in patches of the square whose tokens are averaged before patches are compared with
            those of the references (as PatchCore does); 1, as published, for each patch alone.
        top_share: Share of the map's pixels in [0, 1], the highest ones, whose mean stands for the map in the score
            with references; 0, as published, for its maximum.
        aspect_ratio: Width over height of the images: ``image_size`` must then be one number and is the side of the
            square that is given this shape at about the same cost. Not for tiles.
        calibration: Normal images that set the thresholds, no defect needed: ``"references"`` (each held out in turn,
            with light variants), or others, given like ``references``. Unset, labelled validation images set them.
        false_positive_rate: Share of good parts that a calibrated threshold may flag, in (0, 0.5].
        few_shot: Few-shot scorer, by its name in ``anomalib_aprilgan.network.SCORERS``.
        score_fusion: How text and map become the few-shot score, by its name in ``decision.fusion.FUSIONS``.
        temperature: What cosine similarities with the texts are multiplied with before the softmax; 100, as published,
            or ``"model"`` for the logit scale that CLIP was trained with.
        memory_backbone: Vision tower of timm (``"vit_base_patch14_dinov2.lvd142m"``) in whose features the memory bank
            compares, ``memory_stages`` being its stages (by default the last); unset, as published, in CLIP's.
        memory_pretrained: File of its weights; else those that timm publishes.
        memory_image_size: Its ``image_size``; else the size nearest to that of CLIP.
        memory_size: Patches of every stage that the memory bank keeps of a class, a coreset; unset, all of them.
        memory_dtype: Number type that they are stored in; ``"float16"`` halves memory, checkpoints and exports.
        references_unlabelled: Whether references may be defective, at least three; a patch is then compared with each
            of them, and the mean of the lowest distances counts (MuSc, arXiv:2401.16753).
        batch_zero_shot: Whether the images of a test or prediction serve each other as such references: ``k_shot`` of
            every class, drawn where there are more, 64 where ``k_shot`` is 0.
        lowest_share: Share of unlabelled references whose distances, the lowest, count, in (0, 1].
        contamination: Share of unlabelled references that may be defective, in [0, 0.5], which thresholds allow for.
        kept_features: Folder in which CLIP's output of the images of a training is kept, so that each goes through CLIP
            once and not in every epoch. The room that it takes is said and checked at the start. In vain where
            augmentations are random.
        roi: Region of interest, in pixels of the images: a mask image (bright is inside), a box ``[left, top, right,
            bottom]`` or a list of polygons ``[[x, y], ...]``; for several classes a mapping from their names to such.
            What lies outside, and about two pixels of ``image_size`` along the border, changes nothing. Not for
            training.
        outputs: What a run writes beside decisions and drawings: some of ``regions``, ``coco``, ``masks``, ``maps``,
            ``report``.
        min_area: Regions of fewer pixels of the image file are left out.
        export_options: What exports do: ``class_index``, ``images``, ``max_flips``; see ``deployment.ExportOptions``.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one; ``"anomalib"`` for the metrics of its other models.
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
        stages: Sequence[int] | Literal["auto"] = "auto",
        adapters: str | None = "auto",
        class_name: dict[str, str] | list[str] | str | None = None,
        prompts: str | dict[str, Any] | None = None,
        k_shot: int = 0,
        references: dict[str, str | list[str]] | list[str] | str | None = None,
        memory_stages: Sequence[int] | Literal["auto"] | None = None,
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
        few_shot: str = "memory_bank",
        score_fusion: str = "mean",
        temperature: float | Literal["model"] = 100.0,
        memory_backbone: str | None = None,
        memory_pretrained: str | None = None,
        memory_image_size: int | tuple[int, int] | None = None,
        memory_size: int | None = None,
        memory_dtype: Literal["float32", "float16"] = "float32",
        references_unlabelled: bool = False,
        batch_zero_shot: bool = False,
        lowest_share: float = 0.3,
        contamination: float = 0.3,
        kept_features: str | None = None,
        roi: dict[str, Any] | list[Any] | str | None = None,
        outputs: list[str] | None = None,
        min_area: int = 0,
        export_options: dict[str, Any] | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool | Literal["anomalib"] = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Lightning saves these very names as hyperparameters: plain data, whatever config library they came from.
        backbone, pretrained = source_of("backbone", backbone), source_of("pretrained", pretrained)
        adapters = adapters_of(adapters)
        memory_backbone = optional_source("memory_backbone", memory_backbone)
        memory_pretrained = optional_source("memory_pretrained", memory_pretrained)
        kept_features = optional_source("kept_features", kept_features)
        if memory_image_size is not None:
            memory_image_size = height_and_width(memory_image_size, "memory_image_size")
        if aspect_ratio is None or not isinstance(image_size, int):
            image_size = height_and_width(image_size)
        stages = numbers_of("stages", stages)
        memory_stages = None if memory_stages is None else numbers_of("memory_stages", memory_stages)
        references, calibration = plain_paths(references), plain_paths(calibration, "calibration")
        roi, self.outputs = plain_roi(roi), Outputs(outputs, min_area)
        self.export_options = ExportOptions.of(export_options)
        architecture = architecture_of(backbone, quick_gelu, image_size, aspect_ratio, tile_size)
        tapped = architecture.check_stages(stages)
        tower, remembered = memory_of(memory_backbone, memory_image_size, memory_stages, architecture, tapped)
        memory = Remembering(
            memory_size, memory_dtype, references_unlabelled, batch_zero_shot, lowest_share, contamination
        )
        settings = Settings(
            architecture, pretrained, adapters, tapped, remembered,
            words_by_name(class_name), default_class, class_aliases, PromptEnsemble.of(prompts), memory.shots(k_shot),
            references, seed, few_shot, score_fusion, tile_size, tile_overlap, smoothing_sigma, neighbourhood,
            top_share, calibration, false_positive_rate, temperature, tower, memory_pretrained, memory, roi,
            kept_features,
        )  # fmt: skip
        super().__init__(
            build_pre_processor(settings, pre_processor),
            build_post_processor(settings, post_processor),
            *build_results(evaluator, visualizer),
        )
        self.settings, self.made = settings, Made()
        self.model = build_network(settings, self.pre_processor)
        self.own_fusion = ScoreFusion(score_fusion, top_share)  # where the post-processor is another's
        self.reading_hooks, self.table, self.metric_inputs = ReadingHooks(), DecisionsWriter(), MetricInputs()
        self.saw_defect, self._data = False, DataAtHand()

    def setup(self, stage: str) -> None:
        """Load CLIP; without a trainer, ``setup("predict")`` makes the model ready to be called.

        With a trainer the rest waits for the start hooks, since a checkpoint is restored between this and them. Files
        that are missing raise a FileNotFoundError, those that do not fit a ValueError.
        """
        if self._trainer is None:
            self.make_ready(stage)
            return
        with SETTING_UP:
            attach_clip(self.settings, self.made, self.model, self.device)
        prepare_trainer(self.trainer)
        # Before Lightning starts the loaders' workers.
        self.reading_hooks.install(self.trainer, stage, self.own_callbacks)

    def on_validation_start(self) -> None:
        """Complete the set-up, with what a checkpoint may have brought; so at the start of tests and predictions."""
        if not is_fitting(self):
            self.make_ready(TrainerFn(self.trainer.state.fn).value)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_epoch_end(self) -> None:
        """Note what the bounds and thresholds rest on that validation has learned."""
        note_learned(Workplace.of(self, self._data))

    def make_ready(self, stage: str, *, is_named: bool = False, frame: tuple[int, int] | None = None) -> None:
        """Make whatever is missing for a stage, or for ``"export"``; see ``anomalib_aprilgan.preparation.prepare``.

        ``frame`` is height and width of images that come without a run.
        """
        with SETTING_UP, precision_of(self)[1]:
            loaders = running_loaders(self.trainer) if is_running(self) else None
            self._data = DataAtHand.of(loaders, self.pre_processor)
            single = stage == "export" or (stage == "predict" and not is_named and not tells_classes(loaders))
            renewed = prepare(Workplace.of(self, self._data, frame), stage, single=single)
            self.to(self.device)
        if renewed and stage in {"test", "predict"} and is_running(self) and self.settings.adapters is None:
            training.validate(self, self.post_processor, datamodule_of(self))

    def predict(
        self,
        images: Tensor,
        rows: Tensor | None = None,
        without: Collection[int] = (),
        output: VisionOutput | None = None,
        *,
        is_prepared: bool = False,
    ) -> RawPredictions:
        """Raw predictions of images, whole or in tiles; see ``anomalib_aprilgan.inspection.predict_images``."""
        parts, few_shot = (self.settings, self.model, self.pre_processor), not is_fitting(self)
        return predict_images(*parts, images, rows, without, output, is_prepared=is_prepared, few_shot=few_shot)

    def forward(self, batch: Tensor, class_name: Names = None, class_index: Tensor | None = None) -> InferenceBatch:
        """Scores and labels ``(B,)``, maps and masks at the model's image size, of images as a camera gives them.

        Args:
            batch: ``(B, 3, H, W)``, float in ``[0, 1]``, any size.
            class_name: The class of all images, or of each; not needed for a model of one class.
            class_index: Instead of it ``(B,)`` the row of each image's class in ``classes``.
        """
        rows = None
        if not torch.compiler.is_compiling():
            if not is_ready(self.settings, self.made, self.model):
                named = class_name is not None or class_index is not None
                self.make_ready("predict", is_named=named, frame=(batch.shape[-2], batch.shape[-1]))
            rows = self.made.classes.rows_for(class_name, len(batch), batch.device, class_index)
        return self.decide(self.predict(batch, rows), rows)

    def decide(self, raw: RawPredictions, rows: Tensor | None) -> InferenceBatch:
        """Raw predictions as they leave the model: fused, scaled and cut by the post-processor, if there is one."""
        predictions = self._fused(raw, rows)
        if isinstance(self.post_processor, AprilGANPostProcessor):
            predictions = self.post_processor(predictions, rows)
        elif self.post_processor:
            predictions = self.post_processor(predictions)
        return predictions

    def _fused(self, raw: RawPredictions, rows: Tensor | None) -> InferenceBatch:
        """Raw predictions as anomalib has them; with fused scores where the post-processor is another's."""
        score = raw.text_probability
        ours = isinstance(self.post_processor, AprilGANPostProcessor)
        if not ours and self.model.few_shot is not None and not is_fitting(self):
            score = self.own_fusion(score, self.own_fusion.statistic(raw.anomaly_map), rows)
        return InferenceBatch(pred_score=score, anomaly_map=raw.anomaly_map)

    @property
    def classes(self) -> Classes:
        """The classes of the model: names, words, and by their order the rows of everything that is per class."""
        return self.made.classes

    def rows_of(self, batch: ImageBatch) -> Tensor:
        """``(B,)`` the row of each image's class: told by the batch, by the datamodule, or by a folder of its path."""
        # While predicting, the trainer's datamodule may be the one of an earlier test.
        datamodule = None if self._trainer is None or self.trainer.predicting else datamodule_of(self)
        name = None if datamodule is None else class_name_of(datamodule)
        return rows_of_batch(self.made.classes, batch, name, self._data.root)

    def validation_step(self, batch: ImageBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Predictions, from which the post-processor learns; while fitting also the loss, to be monitored."""
        del batch_idx, dataloader_idx  # Lightning asks for them where there are several loaders
        rows = self.rows_of(batch)
        if self.model.roi is not None and not is_fitting(self):
            look_within(self.model.roi, batch, rows, check_files=self.settings.tile_size is None)
        raw = self.predict(plain_images(batch), rows, output=self.kept_output(batch), is_prepared=True)
        mask = training.known_mask(batch) if is_fitting(self) else None
        if mask is not None:
            loss = partial_adapter_loss(raw.stage_probabilities, mask)
            self.log("val_loss", loss, prog_bar=True, batch_size=batch.batch_size, sync_dist=True)
        predictions = self._fused(raw, rows)
        vars(batch)["appearance"] = raw.appearance  # for whoever watches for drift
        outputs: STEP_OUTPUT = batch.update(pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map)
        return outputs

    test_step = predict_step = validation_step  # type: ignore[assignment]  # anomalib's differ from each other

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was learned and leave the frozen CLIP out: megabytes, not gigabytes."""
        super().on_save_checkpoint(checkpoint)
        checkpoints.write(checkpoint, self.settings, self.made, self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for what was learned, and complete it with the CLIP that is already here."""
        checkpoints.check(checkpoint, self.settings, self.model)  # before anything is changed
        super().on_load_checkpoint(checkpoint)
        parts = self.settings, self.model, self.own_fusion, self.post_processor, self.pre_processor
        self.settings, self.made = checkpoints.restore(checkpoint, *parts)
