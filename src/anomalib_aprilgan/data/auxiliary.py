"""Training data for adapters: the *test* images of many categories, or whatever a user has of good and bad parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset, Folder, MVTecAD, Visa
from anomalib.data.datamodules.image.visa import VISA_CATEGORIES
from anomalib.data.datasets.image.mvtecad import CATEGORIES as MVTEC_AD_CATEGORIES
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import LabelName, ValSplitMode, read_image
from anomalib.data.utils.split import random_split
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Image, Mask

from .class_batch import ClassImageBatch, ClassImageItem
from .mosaic import mosaic
from .synthetic import synthetic_defect

_DATASETS: dict[str, tuple[Callable[..., AnomalibDataModule], tuple[str, ...]]] = {
    "mvtec": (MVTecAD, MVTEC_AD_CATEGORIES),
    "visa": (Visa, VISA_CATEGORIES),
}


class AuxiliaryData(AnomalibDataModule):
    """Trains adapters on the test images of many categories at once, each image under its own class name.

    The paper's auxiliary training (arXiv:2305.17382, sec. 3.1): all test images of another data
    set, shuffled; for MVTec AD a fifth of them replaced by mosaics. The order and the mosaics of
    an epoch depend on ``seed`` and the epoch alone, so that a training resumed at the end of an
    epoch goes on as if it had never stopped.

    Other data than the paper's is taken as far as it goes. An anomalous image without a mask is
    trained on by its label (:func:`~anomalib_aprilgan.losses.multiple_instance_loss`). A datamodule
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
        super().__init__(train_batch_size, eval_batch_size, num_workers, train_augmentations=train_augmentations)
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
        self.datamodules = [*_expand(dataset, root, categories), *(datamodules or [])]
        if not self.datamodules:
            msg = f"`dataset` must be one of {tuple(_DATASETS)}, or `datamodules` a list of datamodules; got neither."
            raise ValueError(msg)
        self.mosaic_rate = mosaic_rate
        self.synthetic_rate = synthetic_rate
        self.held_out_ratio = val_split_ratio
        self.validation = validation
        self.seed = seed

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names that stand for the objects in the prompts, training and validation."""
        modules = [*self.datamodules, *([self.validation] if self.validation else [])]
        return tuple(dict.fromkeys(_class_name(module) for module in modules))

    @property
    def sources(self) -> dict[str, list[str]]:
        """Names of the data sets trained on and their categories: the provenance of the adapters."""
        sources: dict[str, list[str]] = {}
        for module in self.datamodules:
            sources.setdefault(module.name, []).extend([module.category] if module.category else [])
        return sources

    def prepare_data(self) -> None:
        """Let every datamodule fetch or write its files."""
        for module in [*self.datamodules, *([self.validation] if self.validation else [])]:
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Gather the test images of all datamodules, once."""
        if not self._is_setup:
            self._setup(stage)
            self._is_setup = True
        self._update_augmentations()

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

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Held-out or other images; nothing where none were asked for."""
        return cast("DataLoader[Any]", super().val_dataloader()) if hasattr(self, "val_data") else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The validation images: they alone were not trained on.

        Raises:
            RuntimeError: There are none.
        """
        if not hasattr(self, "val_data"):
            msg = "There is nothing to test on: set `val_split_ratio` or `validation`, or test on another datamodule."
            raise RuntimeError(msg)
        return cast("DataLoader[Any]", super().val_dataloader())


class MultiCategoryDataset(AnomalibDataset):
    """Images of several data sets as one, each under its class name.

    Items are read by the data set they come from, so that whatever it does with masks is kept.

    Args:
        datasets: anomalib's data sets; their own augmentations are not applied.
        datamodules: Where they come from, for the class names.

    Raises:
        ValueError: An image is neither normal nor anomalous.
    """

    def __init__(self, datasets: Sequence[AnomalibDataset], datamodules: Sequence[AnomalibDataModule]) -> None:
        super().__init__()
        self.datasets = list(datasets)
        self.mosaic_rate = 0.0
        self.synthetic_rate = 0.0
        self.seed = 0
        self.epoch = 0
        tables = []
        for number, (dataset, module) in enumerate(zip(self.datasets, datamodules, strict=True)):
            dataset.augmentations = None
            table = dataset.samples.reset_index(drop=True)
            if not table.label_index.isin([LabelName.NORMAL, LabelName.ABNORMAL]).all():
                msg = f"`datamodules`: some images of {_class_name(module)} are labelled neither normal nor anomalous."
                raise ValueError(msg)
            tables.append(
                table.assign(
                    dataset=number,
                    item=table.index,
                    class_name=_class_name(module),
                    has_mask=_has_mask(dataset, table),
                    good_only=not dataset.has_anomalous,
                )
            )
        self.samples = pd.concat(tables, ignore_index=True)
        self.samples.attrs["task"] = TaskType.SEGMENTATION

    @property
    def has_anomalous(self) -> bool:
        """Whether there are defects, real or synthetic."""
        return bool(super().has_anomalous or (self.synthetic_rate and self.samples.good_only.any()))

    def __getitem__(self, index: int) -> ClassImageItem:
        """One image, or with probability ``mosaic_rate`` four of its category, with mask and class name."""
        row = self.samples.iloc[index]
        seeds = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(2, np.uint64) >> 1
        generator = torch.Generator().manual_seed(int(seeds[0]))
        if self.mosaic_rate and torch.rand((), generator=generator) < self.mosaic_rate:
            image, mask, is_anomalous = self._mosaic(row, generator)
        else:
            image, mask, is_anomalous = self._read(row)
        has_mask = mask is not None
        if mask is None:
            mask = _empty_mask(image)
        if self.augmentations:
            image, mask = self.augmentations(image, mask)
        if row.good_only and torch.rand((), generator=generator) < self.synthetic_rate:
            image, mask = synthetic_defect(image, int(seeds[1]))
            is_anomalous = bool(mask.any())
        item = ClassImageItem(
            image=image,
            gt_mask=mask,
            gt_label=torch.tensor(int(is_anomalous)),
            image_path=row.image_path,
            class_name=row.class_name,
        )
        return item if has_mask else ClassImageItem.without_mask(item)

    @property
    def collate_fn(self) -> Callable[..., Any]:
        """Collates items with class names."""
        return ClassImageBatch.collate

    def _read(self, row: Any) -> tuple[Image, Mask | None, bool]:  # noqa: ANN401  # a row of a pandas table
        """Image, mask where there is one, and whether it is anomalous."""
        is_anomalous = row.label_index != LabelName.NORMAL
        if is_anomalous and not row.has_mask:  # a data set with masks for others would look for its file
            return read_image(row.image_path, as_tensor=True), None, True
        item = self.datasets[row.dataset][row["item"]]
        if item.gt_mask is None and not is_anomalous:
            return item.image, _empty_mask(item.image), False
        return item.image, item.gt_mask, is_anomalous

    def _mosaic(self, row: Any, generator: torch.Generator) -> tuple[Image, Mask | None, bool]:  # noqa: ANN401
        """Four images of a category: a defect folder at random (good included), then one of its files, four times."""
        table = self.samples[self.samples.dataset == row.dataset]
        folders = [group for _, group in table.groupby(table.image_path.map(lambda path: str(Path(path).parent)))]
        picks = []
        for _ in range(4):
            folder = folders[int(torch.randint(len(folders), (), generator=generator))]
            picks.append(self._read(folder.iloc[int(torch.randint(len(folder), (), generator=generator))]))
        masks = [_empty_mask(image) if mask is None else mask for image, mask, _ in picks]
        image, mask = mosaic([image for image, _, _ in picks], masks)
        if any(mask is None for _, mask, _ in picks):
            return Image(image), None, True
        return Image(image), Mask(mask), bool(mask.any())


class EpochSampler(DistributedSampler[Any]):
    """Shuffles by seed and epoch, and tells the data set which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch."""
        super().set_epoch(epoch)
        cast("MultiCategoryDataset", self.dataset).epoch = epoch


def _expand(dataset: str | None, root: str | Path | None, categories: list[str] | None) -> list[AnomalibDataModule]:
    if dataset is None:
        if categories is not None:
            msg = "`categories` belong to `dataset`, which is not given; `datamodules` carry their own."
            raise ValueError(msg)
        return []
    if dataset not in _DATASETS:
        msg = f"`dataset` must be one of {tuple(_DATASETS)}, got {dataset!r}. Give others as `datamodules`."
        raise ValueError(msg)
    module, known = _DATASETS[dataset]
    unknown = sorted(set(categories or []) - set(known))
    if unknown:
        msg = f"`categories` must be out of {known}, got {unknown}."
        raise ValueError(msg)
    options = {} if root is None else {"root": root}
    return [module(category=category, **options) for category in categories or known]


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


def _has_mask(dataset: AnomalibDataset, table: Any) -> Any:  # noqa: ANN401  # pandas carries no types
    """By image, whether its mask is known: that of a normal one is empty."""
    with_files = dataset.task == TaskType.SEGMENTATION
    return (table.label_index == LabelName.NORMAL) | (with_files & (table.get("mask_path") != ""))


def _empty_mask(image: Tensor) -> Mask:
    return Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))


def _class_name(module: AnomalibDataModule) -> str:
    return module.category or module.name
