"""Datamodules over other datamodules: auxiliary training data, and many categories in one evaluation or prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pandas as pd
from anomalib.data import AnomalibDataModule, AnomalibDataset, Folder, MVTecAD, Visa
from anomalib.data.datamodules.image.visa import VISA_CATEGORIES
from anomalib.data.datasets.image.mvtecad import CATEGORIES as MVTEC_AD_CATEGORIES
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import ValSplitMode
from anomalib.data.utils.split import random_split
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform

from ..checks import (
    SEED_LIMIT,
    check_int,
    check_list,
    check_loaders,
    check_number,
    check_optional,
    check_share,
    check_text,
    shown,
)  # fmt: skip
from .listing import class_name_of
from .multi_category import EpochSampler, MultiCategoryDataset

_DATASETS: dict[str, tuple[Callable[..., AnomalibDataModule], tuple[str, ...]]] = {
    "mvtec": (MVTecAD, MVTEC_AD_CATEGORIES),
    "visa": (Visa, VISA_CATEGORIES),
}


class GatheredData(AnomalibDataModule):
    """Several datamodules as one; what is done with their data sets is up to the subclass's ``_setup``."""

    datamodules: list[AnomalibDataModule]
    validation: AnomalibDataModule | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of all images, each once."""
        return tuple(dict.fromkeys(class_name_of(module) for module in self._modules_read))

    @property
    def sources(self) -> dict[str, list[str]]:
        """Names of the data sets and their categories: the provenance of adapters, and what is compared with it."""
        sources: dict[str, list[str]] = {}
        for module in self.datamodules:
            sources.setdefault(module.name, []).extend([module.category] if module.category else [])
        return sources

    @property
    def _modules_read(self) -> list[AnomalibDataModule]:
        return [*self.datamodules, *([self.validation] if self.validation else [])]

    def prepare_data(self) -> None:
        """Let every datamodule fetch or write its files."""
        for module in self._modules_read:
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Gather the images of all datamodules, once."""
        if not self._is_setup:
            self._setup(stage)
            self._is_setup = True
        self._update_augmentations()


class MultiCategoryData(GatheredData):
    """Test images of many categories, each with its category, and their training images as references.

    Validation is on the test images, as in anomalib's own datamodules of the same data.

    Args:
        dataset: ``"mvtec"`` or ``"visa"``, read by anomalib's datamodules.
        root: Folder of that data set; anomalib's default otherwise.
        categories: Some of its categories; all otherwise.
        datamodules: Any anomalib datamodules instead of, or added to, ``dataset``; no two of one category.
        eval_batch_size: Images a step.
        num_workers: Worker processes of each loader.
    """

    def __init__(
        self,
        dataset: str | None = None,
        root: str | Path | None = None,
        categories: list[str] | None = None,
        datamodules: list[AnomalibDataModule] | None = None,
        eval_batch_size: int = 8,
        num_workers: int = 8,
    ) -> None:
        check_loaders(eval_batch_size=eval_batch_size, num_workers=num_workers)
        super().__init__(eval_batch_size, eval_batch_size, num_workers)
        self.datamodules = _gather(dataset, root, categories, datamodules)
        names = [class_name_of(module) for module in self.datamodules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            msg = f"`datamodules` must be of different categories, got {', '.join(twice)} more than once."
            raise ValueError(msg)

    def _setup(self, _stage: str | None = None) -> None:
        for module in self.datamodules:
            module.setup()
        self.train_data = MultiCategoryDataset([module.train_data for module in self.datamodules], self.datamodules)
        self.test_data = MultiCategoryDataset([module.test_data for module in self.datamodules], self.datamodules)
        self.val_data = self.test_data

    def train_dataloader(self) -> DataLoader[Any]:
        """Always a RuntimeError, which says what trains adapters."""
        msg = "`MultiCategoryData` is for evaluation and prediction. Adapters are trained on `AuxiliaryData`."
        raise RuntimeError(msg)


class AuxiliaryData(GatheredData):
    """Trains adapters on the test images of many categories at once, each image under its own class name.

    The paper's auxiliary training (arXiv:2305.17382, sec. 3.1): all test images of another data set, shuffled; for
    MVTec AD a fifth of them replaced by mosaics. All draws depend on ``seed`` and the epoch alone, so that a training
    resumed at the end of an epoch goes on as if it had never stopped. An anomalous image without a mask is trained on
    by its label. A datamodule without a single anomalous image gives its normal ones, training and test.

    Args:
        dataset: ``"mvtec"`` or ``"visa"``, read by anomalib's datamodules.
        root: Folder of that data set; anomalib's default otherwise.
        categories: Some of its categories; all otherwise.
        datamodules: Any anomalib datamodules instead of, or added to, ``dataset``.
        mosaic_rate: Share of training images that are replaced by 2 x 2 mosaics of their category.
        synthetic_rate: Share of the images of datamodules without anomalous ones that get a defect of noise.
        val_split_ratio: Share of the images that is held out for validation, normal and anomalous alike.
        validation: A datamodule whose test images are the validation set instead.
        train_batch_size: Images a training step.
        eval_batch_size: Images a validation step.
        num_workers: Worker processes of each loader.
        train_augmentations: Further transforms of training images and masks.
        seed: Seed of the held-out part, order, mosaics and defects, and of the draws of ``datamodules`` without one.
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
        check_loaders(train_batch_size=train_batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers)
        check_optional("train_augmentations", train_augmentations, Transform, "a transform of torchvision")
        check_optional("validation", validation, AnomalibDataModule, "a datamodule of anomalib")
        check_int("seed", seed, 0, SEED_LIMIT - 1)
        for name, rate in (("mosaic_rate", mosaic_rate), ("synthetic_rate", synthetic_rate)):
            check_share(name, rate)
        super().__init__(train_batch_size, eval_batch_size, num_workers, train_augmentations)
        self.datamodules = _gather(dataset, root, categories, datamodules)
        if not 0.0 <= check_number("val_split_ratio", val_split_ratio, "a share in [0, 1)") < 1.0:
            msg = f"`val_split_ratio` must lie in [0, 1), got {val_split_ratio}."
            raise ValueError(msg)
        if val_split_ratio and validation is not None:
            msg = "`val_split_ratio` and `validation` are two ways to validate: give one of them."
            raise ValueError(msg)
        self.mosaic_rate, self.synthetic_rate = mosaic_rate, synthetic_rate
        self.held_out_ratio, self.validation = val_split_ratio, validation
        self.seed = seed

    def _setup(self, _stage: str | None = None) -> None:
        parts = [(module, _test_data(module, self.seed)) for module in self.datamodules]
        gathered = MultiCategoryDataset(
            [data if data.has_anomalous else _normal_data(module) for module, data in parts], self.datamodules
        )
        if self.synthetic_rate and not gathered.samples.good_only.any():
            msg = (
                f"`synthetic_rate={self.synthetic_rate}` puts defects into datamodules without any, and all of these "
                f"have real ones: {', '.join(self.sources)}. Leave it out, or add good parts as a datamodule."
            )
            raise ValueError(msg)
        if not gathered.samples.has_mask.any():
            msg = (
                f"The images of {', '.join(self.sources)} are all anomalous and without masks, which teaches nothing "
                "but that everything is anomalous. Add `datamodules` with normal images, or masks."
            )
            raise ValueError(msg)
        gathered.synthetic_rate, gathered.seed = self.synthetic_rate, self.seed
        images: AnomalibDataset = gathered
        if self.validation is not None:
            self.val_data = MultiCategoryDataset([_test_data(self.validation, self.seed)], [self.validation])
        elif self.held_out_ratio:
            images, self.val_data = random_split(images, self.held_out_ratio, label_aware=True, seed=self.seed)
        self.train_data = cast("MultiCategoryDataset", images)
        self.train_data.mosaic_rate = self.mosaic_rate

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training images."""
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        sampler = EpochSampler(self.train_data, num_replicas=replicas, rank=rank, seed=self.seed)
        images, workers = self.train_data, self.num_workers
        return DataLoader(
            images, self.train_batch_size, sampler=sampler, num_workers=workers, collate_fn=images.collate_fn
        )

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Held-out images or those of ``validation``; else nothing."""
        return super().val_dataloader() if hasattr(self, "val_data") else []

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """The validation images, which alone were not trained on; a RuntimeError where there are none."""
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


def _gather(
    dataset: str | None,
    root: str | Path | None,
    categories: list[str] | None,
    datamodules: list[AnomalibDataModule] | None,
) -> list[AnomalibDataModule]:
    if categories is not None:
        check_list("categories", categories, "a list of names")
    for given in [] if datamodules is None else check_list("datamodules", datamodules, "a list of datamodules"):
        check_optional("datamodules", given or 0, AnomalibDataModule, "a list of datamodules")
    if dataset is None:
        if categories is not None:
            msg = "`categories` belong to `dataset`, which is not given; `datamodules` carry their own."
            raise ValueError(msg)
        if not datamodules:
            msg = f"`dataset` must be one of {tuple(_DATASETS)}, or `datamodules` a list of datamodules; got neither."
            raise ValueError(msg)
        return [*datamodules]
    if not isinstance(dataset, str) or dataset not in _DATASETS:
        msg = f"`dataset` must be one of {tuple(_DATASETS)}, got {shown(dataset)}. Give others as `datamodules`."
        raise ValueError(msg)
    module, known = _DATASETS[dataset]
    unknown = [category for category in categories or [] if not isinstance(category, str) or category not in known]
    if unknown:
        msg = f"`categories` must be out of {known}, got {shown(unknown)}."
        raise ValueError(msg)
    options = {} if root is None else {"root": check_text("root", root, "a folder")}
    return [*(module(category=category, **options) for category in categories or known), *(datamodules or [])]
