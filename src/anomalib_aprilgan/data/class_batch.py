"""Items and batches that know the class name of every image, and which images have no mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from anomalib.data import ImageBatch, ImageItem
from torchvision.tv_tensors import Mask

from ..network.losses import UNKNOWN


@dataclass
class ClassImageItem(ImageItem):
    """An image item with the words that stand for its object in the prompts.

    ``gt_mask`` is ``None`` for an anomalous image of which nobody drew the defect; ``partial_mask``
    ``(H, W)`` is then :data:`~anomalib_aprilgan.network.losses.UNKNOWN` everywhere.
    """

    class_name: str | None = None
    class_index: torch.Tensor | None = None
    partial_mask: torch.Tensor | None = None

    @classmethod
    def without_mask(cls, item: ClassImageItem) -> ClassImageItem:
        """The same item, its mask unknown."""
        height, width = cast("torch.Tensor", item.image).shape[-2:]
        unknown = Mask(torch.full((height, width), UNKNOWN, dtype=torch.uint8))
        return replace(item, gt_mask=None, partial_mask=unknown)


@dataclass
class ClassImageBatch(ImageBatch):
    """A batch with a class name per image; collating keeps them as a list.

    Where an image has no mask, ``gt_mask`` is ``None``, so that no metric mistakes it for a normal
    one, and ``partial_mask`` ``(B, H, W)`` holds 0 and 1, and ``UNKNOWN`` in those images. ``class_index``
    ``(B,)``, the place of each name among a model's classes, is filled in by a model of several.
    """

    item_class: ClassVar[type[ClassImageItem]] = ClassImageItem
    class_name: list[str] | None = None
    class_index: torch.Tensor | None = None
    partial_mask: torch.Tensor | None = None

    @classmethod
    def collate(cls, items: Sequence[ClassImageItem]) -> ClassImageBatch:  # type: ignore[override]  # anomalib's is not typed
        """A batch of these items, with or without masks."""
        if any(item.gt_mask is None for item in items):
            items = [_with_partial_mask(item) for item in items]
        return cast("ClassImageBatch", super().collate(list(items)))


def _with_partial_mask(item: ClassImageItem) -> ClassImageItem:
    mask = item.partial_mask if item.gt_mask is None else item.gt_mask
    return replace(item, gt_mask=None, partial_mask=Mask(cast("torch.Tensor", mask), dtype=torch.uint8))
