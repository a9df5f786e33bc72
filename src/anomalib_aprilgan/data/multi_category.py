"""Images of several data sets as one, each under its class name, with mosaics and synthetic defects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageBatch, ImageItem
from anomalib.data.utils import LabelName
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchvision.tv_tensors import Image, Mask

from ..network.losses import UNKNOWN
from ..running import seeded
from .data_sets import read_image, reading_copy
from .listing import class_name_of
from .pre_processing import fitting_mask


@dataclass
class ClassImageItem(ImageItem):
    """An image item with its class name; of an anomalous one without ``gt_mask``, ``partial_mask`` is ``UNKNOWN``."""

    class_name: str | None = None
    partial_mask: Tensor | None = None

    def without_mask(self) -> ClassImageItem:
        """The same item, its mask unknown."""
        size = cast("Tensor", self.image).shape[-2:]
        return replace(self, gt_mask=None, partial_mask=Mask(torch.full(size, UNKNOWN, dtype=torch.uint8)))


@dataclass
class ClassImageBatch(ImageBatch):
    """A batch with a list of class names.

    Where an image has no mask, ``gt_mask`` is ``None``, so that no metric mistakes it for a normal one, and
    ``partial_mask`` ``(B, H, W)`` holds 0 and 1, and ``UNKNOWN`` in those images.
    """

    item_class: ClassVar[type[ClassImageItem]] = ClassImageItem
    class_name: list[str] | None = None
    partial_mask: Tensor | None = None

    @classmethod
    def collate(cls, items: Sequence[ClassImageItem]) -> ClassImageBatch:  # type: ignore[override]  # anomalib's is not typed
        """A batch of these items, with or without masks."""
        if any(item.gt_mask is None for item in items):
            masks = [item.partial_mask if item.gt_mask is None else item.gt_mask for item in items]
            masks = [Mask(mask, dtype=torch.uint8) for mask in masks]
            items = [replace(item, gt_mask=None, partial_mask=mask) for item, mask in zip(items, masks, strict=True)]
        return cast("ClassImageBatch", super().collate(list(items)))


def mosaic(images: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Four images ``(3, H_i, W_i)`` and masks ``(H_i, W_i)`` pasted into one canvas ``(2 H_0, 2 W_0)``.

    As the authors do it (dataset.py, combine_img): unscaled, a mask at the size of its image, at the corners of its
    four quarters, left to right and top to bottom; later ones overwrite, what sticks out is lost, gaps stay black.
    """
    if len(images) != 4 or len(masks) != 4:
        msg = f"`images` and `masks` must be four each, got {len(images)} and {len(masks)}."
        raise ValueError(msg)
    height, width = images[0].shape[-2:]
    image_canvas = images[0].new_zeros(3, 2 * height, 2 * width)
    mask_canvas = masks[0].new_zeros(2 * height, 2 * width)
    corners = ((0, 0), (0, width), (height, 0), (height, width))
    fitting = [fitting_mask(mask, image) for mask, image in zip(masks, images, strict=True)]
    for (top, left), image, mask in zip(corners, images, fitting, strict=True):
        bottom, right = top + image.shape[-2], left + image.shape[-1]
        image_canvas[:, top:bottom, left:right] = image[:, : 2 * height - top, : 2 * width - left]
        mask_canvas[top:bottom, left:right] = mask[: 2 * height - top, : 2 * width - left]
    return image_canvas, mask_canvas


def synthetic_defect(image: Tensor, seed: int) -> tuple[Image, Mask]:
    """An image ``(3, H, W)`` in ``[0, 1]`` with anomalib's Perlin noise on it, and its mask ``(H, W)``, 0 or 1.

    Both depend on the seed in ``[0, 2^63)`` alone; the state of torch's generator is left as it was.
    """
    with seeded(seed):
        changed, mask = PerlinAnomalyGenerator(probability=1.0)(image.as_subclass(Tensor))
    return Image(changed.clamp(0.0, 1.0)), Mask(mask[0].to(torch.uint8))


class MultiCategoryDataset(AnomalibDataset):
    """Images of several data sets as one, each under the class name of its datamodule.

    Items are read by a copy of the data set they come from, so that whatever it does with masks is kept, but without
    its augmentations; images by ``anomalib_aprilgan.data.reading.load_image``.
    """

    def __init__(self, datasets: Sequence[AnomalibDataset], datamodules: Sequence[AnomalibDataModule]) -> None:
        super().__init__()
        self.datasets = [reading_copy(dataset) for dataset in datasets]
        self.mosaic_rate = self.synthetic_rate = 0.0
        self.seed = self.epoch = 0
        tables = []
        for number, (dataset, module) in enumerate(zip(self.datasets, datamodules, strict=True)):
            dataset.augmentations = None
            table, name = dataset.samples.reset_index(drop=True), class_name_of(module)
            is_normal = table.label_index == LabelName.NORMAL  # and so its mask is known: empty
            if not (is_normal | (table.label_index == LabelName.ABNORMAL)).all():
                msg = f"`datamodules`: some images of {name} are labelled neither normal nor anomalous."
                raise ValueError(msg)
            has_file = (dataset.task == TaskType.SEGMENTATION) & (table.get("mask_path") != "")
            places = {"dataset": number, "item": table.index, "class_name": name}
            tables.append(table.assign(**places, has_mask=is_normal | has_file, good_only=not dataset.has_anomalous))
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
            image, mask = self._mosaic(row, generator)
            is_anomalous = mask is None or bool(mask.any())
        else:
            image, mask = self._read(row)
            is_anomalous = row.label_index != LabelName.NORMAL
        has_mask = mask is not None
        if mask is None:
            mask = _empty_mask(image)
        if self.augmentations:
            image, mask = self.augmentations(image, mask)
        if row.good_only and torch.rand((), generator=generator) < self.synthetic_rate:
            image, mask = synthetic_defect(image, int(seeds[1]))
            is_anomalous = bool(mask.any())
        label = torch.tensor(int(is_anomalous))
        item = ClassImageItem(
            image=image, gt_mask=mask, gt_label=label, image_path=row.image_path, class_name=row.class_name
        )
        return item if has_mask else item.without_mask()

    @property
    def collate_fn(self) -> Callable[..., Any]:
        """Collates items with class names."""
        return ClassImageBatch.collate

    def _read(self, row: pd.Series) -> tuple[Image, Mask | None]:
        if not row.has_mask:  # a data set with masks for others would look for its file
            return read_image(row.image_path, as_tensor=True), None
        item = self.datasets[row.dataset][row["item"]]
        is_known = item.gt_mask is not None or row.label_index != LabelName.NORMAL
        return item.image, item.gt_mask if is_known else _empty_mask(item.image)

    def _mosaic(self, row: pd.Series, generator: torch.Generator) -> tuple[Image, Mask | None]:
        """Four of a category, each from a folder at random (of a defect, or good)."""
        table = self.samples[self.samples.dataset == row.dataset]
        folders = [group for _, group in table.groupby(table.image_path.map(lambda path: str(Path(path).parent)))]
        picks = []
        for _ in range(4):
            folder = folders[int(torch.randint(len(folders), (), generator=generator))]
            picks.append(self._read(folder.iloc[int(torch.randint(len(folder), (), generator=generator))]))
        masks = [_empty_mask(image) if mask is None else mask for image, mask in picks]
        image, mask = mosaic([image for image, _ in picks], masks)
        return Image(image), None if any(mask is None for _, mask in picks) else Mask(mask)


class EpochSampler(DistributedSampler[Any]):
    """Shuffles by seed and epoch, and tells the data set which epoch it is."""

    dataset: MultiCategoryDataset

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of every epoch."""
        super().set_epoch(epoch)
        self.dataset.epoch = epoch


def _empty_mask(image: Tensor) -> Mask:
    return Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
