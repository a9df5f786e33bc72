"""Training data for adapters: the *test* images of many categories, or whatever a user has of good and bad parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pandas as pd
from anomalib.data import AnomalibDataModule, AnomalibDataset, Folder
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import ValSplitMode
from anomalib.data.utils.split import random_split
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform

from .gathering import GatheredData
from .multi_category import EpochSampler, MultiCategoryDataset


class AuxiliaryData(GatheredData):
    """Trains adapters on the test images of many categories at once, each image under its own class name.

    The paper's auxiliary training (arXiv:2305.17382, sec. 3.1): all test images of another data
    set, shuffled; for MVTec AD a fifth of them replaced by mosaics. The order and the mosaics of
    an epoch depend on ``seed`` and the epoch alone, so that a training resumed at the end of an
    epoch goes on as if it had never stopped.

    Other data than the paper's is taken as far as it goes. An anomalous image without a mask is
    trained on by its label (:func:`~anomalib_aprilgan.network.losses.multiple_instance_loss`). A datamodule
    without a single anomalous image gives its normal ones, training and test; with ``synthetic_rate``
    some of them get defects of noise, anew in every epoch. All of these can be mixed.

    Args:
        dataset: ``"mvtec"`` or ``"visa"``: all its categories, read by anomalib's datamodules.
        root: Folder of that data set; anomalib's default otherwise.
        categories: Some of its categories; all otherwise.
        datamodules: Any anomalib datamodules instead of, or added to, ``dataset``.
        mosaic_rate: Share of training images that are replaced by 2 x 2 mosaics of their category.
        synthetic_rate: Share of the images of datamodules without any anomalous image that get a synthetic
            defect, with its mask, after all other transforms.
        val_split_ratio: Share of the images that is held out for validation, normal and anomalous alike.
        validation: A datamodule whose test images are the validation set instead.
        train_batch_size: Images a training step.
        eval_batch_size: Images a validation step.
        num_workers: Worker processes of each loader.
        train_augmentations: Further transforms of training images and masks.
        seed: Seed of the held-out part, of the order, of mosaics and synthetic defects, and of the draws of
            ``datamodules`` that have none.

    Raises:
        ValueError: No data, or both ways of validation.
    """

    train_data: MultiCategoryDataset
    seed: int

    def __init__(
        self,
        dataset: str | None = None,
        root: str | Path | None = None,
        categories: list[str] | None = None,
        datamodules: list[AnomalibDataModule] | None = None,
        mosaic_rate: float = 0.0,
        synthetic_rate: float = 0.0,
        val_split_ratio: float = 0.0,
        validation: AnomalibDataModule | None = None,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            dataset,
            root,
            categories,
            datamodules,
            train_batch_size,
            eval_batch_size,
            num_workers,
            train_augmentations,
        )
        for name, rate in (("mosaic_rate", mosaic_rate), ("synthetic_rate", synthetic_rate)):
            if not 0.0 <= rate <= 1.0:
                msg = f"`{name}` must lie in [0, 1], got {rate}."
                raise ValueError(msg)
        if not 0.0 <= val_split_ratio < 1.0:
            msg = f"`val_split_ratio` must lie in [0, 1), got {val_split_ratio}."
            raise ValueError(msg)
        if val_split_ratio and validation is not None:
            msg = "`val_split_ratio` and `validation` are two ways to validate: give one of them."
            raise ValueError(msg)
        self.mosaic_rate = mosaic_rate
        self.synthetic_rate = synthetic_rate
        self.held_out_ratio = val_split_ratio
        self.validation = validation
        self.seed = seed

    @property
    def _modules_read(self) -> list[AnomalibDataModule]:
        return [*self.datamodules, *([self.validation] if self.validation else [])]

    def _setup(self, _stage: str | None = None) -> None:
        gathered = MultiCategoryDataset(
            [self._training_images(module) for module in self.datamodules], self.datamodules
        )
        self._check(gathered)
        gathered.synthetic_rate = self.synthetic_rate
        gathered.seed = self.seed
        images: AnomalibDataset = gathered
        if self.validation is not None:
            self.val_data = MultiCategoryDataset([_test_data(self.validation, self.seed)], [self.validation])
        elif self.held_out_ratio:
            images, self.val_data = random_split(images, self.held_out_ratio, label_aware=True, seed=self.seed)
        self.train_data = cast("MultiCategoryDataset", images)
        self.train_data.mosaic_rate = self.mosaic_rate

    def _training_images(self, module: AnomalibDataModule) -> AnomalibDataset:
        images = _test_data(module, self.seed)
        return images if images.has_anomalous else _normal_data(module)

    def _check(self, images: MultiCategoryDataset) -> None:
        """Refuse what would have no effect, or teach that everything is anomalous."""
        if self.synthetic_rate and not images.samples.good_only.any():
            msg = (
                f"`synthetic_rate={self.synthetic_rate}` puts defects into datamodules without any, and all of these "
                f"have real ones: {', '.join(self.sources)}. Leave it out, or add good parts as a datamodule."
            )
            raise ValueError(msg)
        if not images.samples.has_mask.any():
            msg = (
                f"The images of {', '.join(self.sources)} are all anomalous and without masks, which teaches nothing "
                "but that everything is anomalous. Add `datamodules` with normal images, or masks."
            )
            raise ValueError(msg)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training images; the order depends on the seed and the epoch alone."""
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        sampler = EpochSampler(self.train_data, num_replicas=replicas, rank=rank, seed=self.seed)
        return DataLoader(
            self.train_data,
            sampler=sampler,
            batch_size=self.train_batch_size,
            num_workers=self.num_workers,
            collate_fn=self.train_data.collate_fn,
        )

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Held-out or other images; nothing where none were asked for."""
        return super().val_dataloader() if hasattr(self, "val_data") else []

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """The validation images: they alone were not trained on.

        Raises:
            RuntimeError: There are none.
        """
        if not hasattr(self, "val_data"):
            msg = "There is nothing to test on: set `val_split_ratio` or `validation`, or test on another datamodule."
            raise RuntimeError(msg)
        return super().val_dataloader()


def _test_data(module: AnomalibDataModule, seed: int) -> AnomalibDataset:
    """All labelled images of a datamodule, those included that it would set aside for validation."""
    if module.seed is None:
        module.seed = seed  # what it draws, a resumed training must find again
    try:
        module.setup()
    except (MisMatchError, ValueError) as error:
        if not (isinstance(module, Folder) and module.mask_dir):
            raise
        msg = (
            f"`datamodules`: the masks of {module.name} do not fit its images. Every image in `abnormal_dir` needs one "
            f"of its name in `mask_dir`; put images without into a Folder without `mask_dir`. anomalib says: {error}"
        )
        raise ValueError(msg) from error
    from_test = module.val_split_mode == ValSplitMode.FROM_TEST
    return module.test_data + module.val_data if from_test else module.test_data


def _normal_data(module: AnomalibDataModule) -> AnomalibDataset:
    """All images of a datamodule that was set up and has no anomalous ones."""
    parts = [getattr(module, f"{part}_data", None) for part in ("train", "test", "val")]
    tables = [part.samples for part in parts if part is not None and not part.has_anomalous]
    images = module.train_data.subsample(range(len(module.train_data)))
    images.samples = pd.concat(tables).drop_duplicates("image_path")
    images.samples.attrs["task"] = module.train_data.samples.attrs["task"]
    return images
