"""What a test's images are and where they are anomalous: the same for every model, at one size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.transforms.utils import extract_transforms_by_type
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import CenterCrop, Resize
from torchvision.transforms.v2.functional import resize

from ..data.data_sets import read_rightly
from ..data.listing import common_folder, entries, listed_files
from ..data.pre_processing import resize_mask

Size = tuple[int, int]


@dataclass(frozen=True)
class GroundTruth:
    """The test images of a datamodule, in their order.

    Attributes:
        paths: ``N`` files.
        labels: ``(N,)``, whether an image is anomalous.
        masks: ``N`` arrays ``(H_i, W_i)``, whether a pixel is; none where an anomalous image has no mask.
        root: The folder of all files.
    """

    paths: list[str]
    labels: NDArray[np.bool_]
    masks: list[NDArray[np.bool_]] | None
    root: Path | None

    @classmethod
    def of(cls, datamodule: AnomalibDataModule, size: Size | None) -> GroundTruth:
        """Read from a datamodule that was set up.

        Args:
            datamodule: As it is before a model has resized its images.
            size: Height and width of all masks, cut at half as the paper does; otherwise as they are.

        Raises:
            ValueError: An image has no label.
        """
        paths, labels, masks = [], [], []
        loaders = list(entries(datamodule.test_dataloader()))
        with read_rightly(datamodule):
            for item in (loader.dataset[index] for loader in loaders for index in range(len(loader.dataset))):  # type: ignore[attr-defined]
                if item.gt_label is None:
                    msg = f"{item.image_path} has no label: a test needs images that are known to be good or bad."
                    raise ValueError(msg)
                paths.append(str(item.image_path))
                labels.append(bool(item.gt_label))
                masks.append(_mask_of(item, size))
        known = [mask for mask in masks if mask is not None]
        return cls(
            paths,
            np.array(labels, dtype=bool),
            known if len(known) == len(masks) and any(labels) else None,
            common_folder(loaders),
        )

    @property
    def digest(self) -> str:
        """SHA-256, its first 16 digits, of the list of files and labels, wherever their folder is."""
        names = [Path(path).absolute().relative_to(self.root).as_posix() if self.root else path for path in self.paths]
        listed = json.dumps([names, self.labels.tolist()])
        return hashlib.sha256(listed.encode()).hexdigest()[:16]

    def is_of(self, datamodule: AnomalibDataModule) -> bool:
        """Whether a datamodule that was set up has these test images."""
        return listed_files(datamodule.test_dataloader()) == self.paths

    def first_defects(self, number: int) -> list[int]:
        """Indices of the first anomalous images with a mask of so many folders."""
        firsts: dict[Path, int] = {}
        for index in np.flatnonzero(self.labels) if self.masks else ():
            firsts.setdefault(Path(self.paths[index]).parent, int(index))
        return [*firsts.values()][:number]


def _mask_of(item: Any, size: Size | None) -> NDArray[np.bool_] | None:  # noqa: ANN401  # an item of any kind of data
    mask: Tensor | None = item.gt_mask
    if mask is None and bool(item.gt_label):
        return None
    if mask is None or not bool(mask.any()):  # all of it one value, which takes no memory
        shape = item.image.shape if mask is None else mask.shape
        return np.broadcast_to(np.False_, size or tuple(shape[-2:]))
    plain = mask.as_subclass(Tensor).reshape(mask.shape[-2:]).to(torch.uint8)
    if size is not None and tuple(plain.shape) != size:
        plain = resize_mask(plain[None], size)[0]
    truth: NDArray[np.bool_] = plain.bool().numpy()
    return truth


@dataclass(frozen=True)
class Frame:
    """What part of an image a model's map shows: all of it, or the centre that its pre-processing leaves.

    Args:
        whole: Height and width of the image before the crop, in pixels of the model; none without a crop.
        crop: Height and width of the crop.
    """

    whole: Size | None = None
    crop: Size | None = None

    @classmethod
    def of(cls, pre_processor: nn.Module | None) -> Frame:
        """That of a model."""
        transform = getattr(pre_processor, "transform", None)
        crops = extract_transforms_by_type(transform, CenterCrop)
        resizes = extract_transforms_by_type(transform, Resize)
        if not (crops and resizes):
            return cls()
        return cls(_pair(resizes[0].size), _pair(crops[0].size))

    def fitted(self, anomaly_map: NDArray[np.float32], size: Sequence[int]) -> NDArray[np.float32]:
        """A map at another size, bilinear; what was cropped away is as normal as the most normal pixel."""
        pixels = torch.from_numpy(anomaly_map)[None]
        if self.whole and self.crop:
            height, width = self.crop
            top, left = (self.whole[0] - height) // 2, (self.whole[1] - width) // 2
            pads = (left, self.whole[1] - width - left, top, self.whole[0] - height - top)
            pixels = functional.pad(_resized(pixels, self.crop), pads, value=float(pixels.min()))
        fitted: NDArray[np.float32] = _resized(pixels, size)[0].numpy()
        return fitted


def _resized(pixels: Tensor, size: Sequence[int]) -> Tensor:
    return pixels if list(pixels.shape[-2:]) == list(size) else resize(pixels, list(size), antialias=True)


def _pair(size: Any) -> Size:  # noqa: ANN401  # as torchvision has it
    values = [size] if isinstance(size, int) else list(size)
    return (values[0], values[-1])
