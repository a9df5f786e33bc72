"""Images of several data sets as one, each under its class name, with mosaics and synthetic defects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchvision.tv_tensors import Image, Mask

from .class_batch import ClassImageBatch, ClassImageItem
from .gathering import class_name_of
from .mosaic import mosaic
from .reading_hooks import read_image, reading_copy
from .synthetic import synthetic_defect


class MultiCategoryDataset(AnomalibDataset):
    """Images of several data sets as one, each under its class name.

    Items are read by a copy of the data set they come from, so that whatever it does with masks is kept; images by
    :func:`~anomalib_aprilgan.data.reading.load_image`.

    Args:
        datasets: anomalib's data sets; their own augmentations are not applied.
        datamodules: Where they come from, for the class names.

    Raises:
        ValueError: An image is neither normal nor anomalous.
    """

    def __init__(self, datasets: Sequence[AnomalibDataset], datamodules: Sequence[AnomalibDataModule]) -> None:
        super().__init__()
        self.datasets = [reading_copy(dataset) for dataset in datasets]
        self.mosaic_rate = 0.0
        self.synthetic_rate = 0.0
        self.seed = 0
        self.epoch = 0
        tables = []
        for number, (dataset, module) in enumerate(zip(self.datasets, datamodules, strict=True)):
            dataset.augmentations = None
            table, name = dataset.samples.reset_index(drop=True), class_name_of(module)
            if not table.label_index.isin([LabelName.NORMAL, LabelName.ABNORMAL]).all():
                msg = f"`datamodules`: some images of {name} are labelled neither normal nor anomalous."
                raise ValueError(msg)
            tables.append(
                table.assign(
                    dataset=number,
                    item=table.index,
                    class_name=name,
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

    def _read(self, row: pd.Series) -> tuple[Image, Mask | None, bool]:
        """Image, mask where there is one, and whether it is anomalous."""
        is_anomalous = row.label_index != LabelName.NORMAL
        if is_anomalous and not row.has_mask:  # a data set with masks for others would look for its file
            return read_image(row.image_path, as_tensor=True), None, True
        item = self.datasets[row.dataset][row["item"]]
        if item.gt_mask is None and not is_anomalous:
            return item.image, _empty_mask(item.image), False
        return item.image, item.gt_mask, is_anomalous

    def _mosaic(self, row: pd.Series, generator: torch.Generator) -> tuple[Image, Mask | None, bool]:
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

    dataset: MultiCategoryDataset

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch."""
        super().set_epoch(epoch)
        self.dataset.epoch = epoch


def _has_mask(dataset: AnomalibDataset, table: pd.DataFrame) -> pd.Series:
    """By image, whether its mask is known: that of a normal one is empty."""
    with_files = dataset.task == TaskType.SEGMENTATION
    return (table.label_index == LabelName.NORMAL) | (with_files & (table.get("mask_path") != ""))


def _empty_mask(image: Tensor) -> Mask:
    return Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
