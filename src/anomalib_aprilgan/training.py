"""The training of fresh adapters: its steps, what it needs of its data, and what it leaves written down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam

from .clip.backbone import VisionOutput
from .data.listing import entries
from .decision.post_processing import AprilGANPostProcessor
from .kept_features import KeptFeatures
from .network.losses import partial_adapter_loss
from .network.model import AprilGANModel
from .preparation.workplace import Made
from .provenance import Provenance
from .recipe import Recipe
from .running import all_gather_object, datamodule_of, plain_images, precision_of
from .settings import Settings


class Training:
    """Mix-in with the steps that train a model's adapters."""

    settings: Settings
    made: Made
    model: AprilGANModel
    saw_defect: bool
    kept: KeptFeatures | None = None

    @property
    def learning_type(self) -> LearningType:
        """ONE_CLASS for fresh adapters, which ``fit`` trains, and trains on; else ZERO_SHOT or FEW_SHOT."""
        if self.settings.adapters is None:
            return LearningType.ONE_CLASS
        has_references = self.settings.k_shot and not self.settings.remembering.batch_zero_shot
        return LearningType.FEW_SHOT if has_references else LearningType.ZERO_SHOT

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The paper's optimizer: Adam, learning rate 1e-3, betas 0.5 and 0.999, no schedule."""
        return Adam(self.model.adapters.parameters(), lr=1e-3, betas=(0.5, 0.999))

    def on_fit_start(self) -> None:
        """Raise if there is nothing to train or nothing to learn from; note what the adapters will have seen."""
        module: Any = self
        check(self.settings, datamodule_of(module))
        module.make_ready("fit")
        self.saw_defect = bool(has_defects(datamodule_of(module)))  # else the first epoch will tell
        note(self.made, self.model, datamodule_of(module))

    def on_train_start(self) -> None:
        """Make room for what CLIP makes of the images, where that is to be kept; an OSError where there is none."""
        module: Any = self
        if self.settings.kept_features is not None:
            trainer = module.trainer
            loaders = entries([trainer.train_dataloader, trainer.val_dataloaders])
            images = sum(len(data) for loader in loaders if (data := getattr(loader, "dataset", None)) is not None)
            module.reading_hooks.at_end(trainer, self._let_go)
            ranks = [trainer.global_rank, trainer.world_size]
            self.kept = keep_features(
                Path(self.settings.kept_features), self.model, precision_of(module)[0], ranks, images
            )

    def _let_go(self) -> None:
        kept, self.kept = self.kept, None
        if kept is not None:
            kept.close()

    def kept_output(self, batch: ImageBatch) -> VisionOutput | None:
        """What CLIP makes of the images of a batch, where that is kept while adapters are trained."""
        return None if self.kept is None else self.kept.output_of(plain_images(batch), self.model.encode)

    def training_step(self, batch: ImageBatch) -> Tensor:
        """Focal and dice loss of the adapters on a batch with masks; where there are none, that of the labels."""
        module: Any = self
        mask = mask_of(batch)
        self.saw_defect, self.made.has_trained = self.saw_defect or bool(mask.any()), True
        output = self.kept_output(batch)
        probabilities = self.model.stage_probabilities(plain_images(batch), module.rows_of(batch), output)
        loss = partial_adapter_loss(probabilities, mask)
        module.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=batch.batch_size)
        return loss

    def on_train_epoch_end(self) -> None:
        """Raise if the loader has no defect, which only shows in passing."""
        module: Any = self
        self.saw_defect = any(all_gather_object(self.saw_defect))
        if not self.saw_defect:
            raise_without_defects(datamodule_of(module))


def keep_features(
    folder: Path, network: AprilGANModel, precision: str, ranks: Sequence[int], images: int
) -> KeptFeatures:
    """Room for what CLIP makes of so many images, in files of each process."""
    architecture, stages = network.backbone.architecture, network.tapped
    shapes = architecture.shapes_of(stages)
    recipe = Recipe.of(
        clip=network.backbone.digest,
        quick_gelu=architecture.quick_gelu,
        image_size=architecture.image_size,
        stages=stages,
        precision=precision,
        ranks=ranks,
    )
    widths = [(shape.grid[0] * shape.grid[1], shape.width) for shape in shapes]
    return KeptFeatures(folder, recipe, widths, stages, architecture.embed_dim, images)


def check(settings: Settings, datamodule: AnomalibDataModule | None) -> None:
    """Raise a RuntimeError if there is nothing to train, a ValueError if the data are known to hold no defect."""
    if settings.tile_size is not None:
        msg = "`tile_size` is for inspection. Train the adapters without it, then pass them as `adapters`."
        raise RuntimeError(msg)
    if settings.adapters is not None:
        msg = f"`adapters={settings.adapters!r}` are given and not trained. Pass `adapters=None` to train fresh ones."
        raise RuntimeError(msg)
    if has_defects(datamodule) is False:
        raise_without_defects(datamodule)


def has_defects(datamodule: AnomalibDataModule | None) -> bool | None:
    """Whether the training data hold anomalous images; ``None`` where that is not known beforehand."""
    told: bool | None = getattr(getattr(datamodule, "train_data", None), "has_anomalous", None)
    return told


def raise_without_defects(datamodule: AnomalibDataModule | None) -> None:
    """Raise the error for training data without a defect."""
    msg = (
        "`adapters=None` trains fresh adapters, which takes images of defects; the training data of "
        f"{getattr(datamodule, 'name', 'the loader')} has not a single anomalous image. Wrap datamodules with defects, "
        "with masks or labels alone, in `anomalib_aprilgan.data.AuxiliaryData`; for good parts alone give it "
        "`synthetic_rate=0.5`; or pass trained `adapters`."
    )
    raise ValueError(msg)


def note(made: Made, network: AprilGANModel, datamodule: AnomalibDataModule | None) -> None:
    """Write down what the adapters will have seen, beside what they have seen before."""
    now = Provenance.of_training(datamodule, network.backbone, network.stages)
    made.provenance = now.with_earlier(made.provenance.trained_on)


def known_mask(batch: ImageBatch) -> Tensor | None:
    """``(B, H, W)`` masks of a batch, ``UNKNOWN`` where only the label is known; ``None`` where it tells neither."""
    mask = batch.gt_mask if batch.gt_mask is not None else getattr(batch, "partial_mask", None)
    return None if mask is None else mask.as_subclass(Tensor)


def mask_of(batch: ImageBatch) -> Tensor:
    """What ``known_mask`` returns; a ValueError where the batch tells neither masks nor labels."""
    mask = known_mask(batch)
    if mask is None:
        msg = (
            "Training adapters needs masks (`gt_mask`), and this batch has none. To train on images with labels "
            "alone, wrap their datamodule: `anomalib_aprilgan.data.AuxiliaryData(datamodules=[...])`."
        )
        raise ValueError(msg)
    return mask


def validate(module: AnomalibModule, post_processor: nn.Module | None, datamodule: AnomalibDataModule | None) -> None:
    """Learn bounds and thresholds from a datamodule's validation images before a test or prediction.

    anomalib's Engine does so for given adapters. For a model that it may train it trusts the thresholds of the
    training, which are for other data.
    """
    if datamodule is None or not isinstance(post_processor, AprilGANPostProcessor):
        return
    data = getattr(datamodule, "val_data", None)
    for batch in datamodule.val_dataloader() if data is not None and len(data) else ():
        on_device = module.trainer.strategy.batch_to_device(batch)
        if isinstance(module.pre_processor, PreProcessor):
            module.pre_processor.on_validation_batch_start(module.trainer, module, on_device, 0)
        with torch.inference_mode(), precision_of(module)[1]:
            outputs = module.validation_step(on_device, 0)
        post_processor.on_validation_batch_end(module.trainer, module, outputs)
    post_processor.on_validation_epoch_end(module.trainer, module)
    module.on_validation_epoch_end()
