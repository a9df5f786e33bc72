"""Regions of defects: connected pixels of the map above its threshold, in the pixels of the image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from anomalib.data import ImageBatch
from numpy.typing import NDArray
from skimage.measure import label, regionprops_table
from torch import Tensor

from ..data.roi import image_size_of
from ..files import is_file


class Region(NamedTuple):
    """One region of an image.

    The box is ``left``, ``top``, ``width`` and ``height``, the area a number of pixels and the centroid a point, where
    the upper left corner of the image is 0, 0; all in pixels of the image file. ``peak`` and ``mean`` are of the map.
    """

    left: int
    top: int
    width: int
    height: int
    area: int
    centroid_x: float
    centroid_y: float
    peak: float
    mean: float


@dataclass(frozen=True)
class Regions:
    """The regions of one image, from its upper left corner on.

    ``labels`` ``(h, w)``, at the size of the map, are 0 outside and else numbers of regions from 1 on; ``size`` is
    height and width of the image file.
    """

    found: list[Region]
    labels: NDArray[np.int32]
    size: tuple[int, int]

    def __len__(self) -> int:
        """Number of regions."""
        return len(self.found)

    def __iter__(self) -> Iterator[Region]:
        """The regions."""
        return iter(self.found)

    def mask(self) -> NDArray[np.bool_]:
        """``(H, W)``, true within a region, in pixels of the image file."""
        inside = self._at_size() > 0
        for one in self.found:
            inside[one.top, one.left] |= one.area == 1  # too small for the centre of a pixel
        return inside

    def run_lengths(self, number: int) -> list[int]:
        """COCO's code of a region, counted from 1: lengths of runs, column by column, of pixels outside and inside."""
        inside = np.zeros(self.size, dtype=bool)
        one = self.found[number - 1]
        rows, columns = slice(one.top, one.top + one.height), slice(one.left, one.left + one.width)
        inside[rows, columns] = (self._at_size(rows, columns) == number) | (one.area == 1)
        flat = inside.ravel(order="F")
        changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        starts = [0, *([0] if flat[0] else []), *changes.tolist(), len(flat)]
        return [end - start for start, end in pairwise(starts)]

    def _at_size(self, rows: slice = slice(None), columns: slice = slice(None)) -> NDArray[np.int32]:
        """Labels of a part of the image file: every pixel has that of the map's pixel in which its centre lies."""
        places = [_places(length, of_map) for length, of_map in zip(self.size, self.labels.shape, strict=True)]
        found: NDArray[np.int32] = self.labels[np.ix_(places[0][rows], places[1][columns])]
        return found


def find_regions(
    mask: NDArray[np.bool_], anomaly_map: NDArray[np.float32], size: tuple[int, int], min_area: int = 0
) -> Regions:
    """The regions of a mask ``(h, w)`` of an image of height and width ``size``.

    Pixels that touch at a side or corner belong together (skimage.measure.label). Every pixel of the image belongs to
    the pixel of the map in which its centre lies. A region so small that no pixel's centre lies in it is the pixel
    that its highest value lies in.

    Args:
        mask: Which pixels of the map are anomalous; those whose value is not a number are left out.
        anomaly_map: ``(h, w)``, its values.
        size: Height and width of the image file.
        min_area: Regions of fewer pixels of the image file are left out.
    """
    labels: NDArray[np.int32] = label(mask & np.isfinite(anomaly_map), connectivity=2).astype(np.int32)
    values = np.nan_to_num(anomaly_map)
    rows, columns = (_places(length, of_map) for length, of_map in zip(size, labels.shape, strict=True))
    heights, widths = (
        np.bincount(places, minlength=of_map) for places, of_map in zip((rows, columns), labels.shape, strict=True)
    )
    wanted = ["label", "bbox", "intensity_max", "intensity_mean"]
    table = regionprops_table(labels, intensity_image=values, properties=wanted) if labels.any() else {"label": []}
    found, kept = [], np.zeros(int(labels.max(initial=0)) + 1, dtype=np.int32)
    for place, number in enumerate(table["label"]):
        top, left, bottom, right = (int(table[f"bbox-{side}"][place]) for side in range(4))
        part = labels[top:bottom, left:right] == number
        weights = part * np.outer(heights[top:bottom], widths[left:right])
        if weights.any():
            one = _measured(weights, (rows, columns), (top, left))
        else:
            peak = np.unravel_index(np.argmax(np.where(part, values[top:bottom, left:right], -np.inf)), part.shape)
            x = int((left + peak[1] + 0.5) * size[1] / labels.shape[1])
            y = int((top + peak[0] + 0.5) * size[0] / labels.shape[0])
            one = (x, y, 1, 1, 1, x + 0.5, y + 0.5)
        if one[4] >= min_area:
            found.append(Region(*one, float(table["intensity_max"][place]), float(table["intensity_mean"][place])))
            kept[number] = len(found)
    return Regions(found, kept[labels], size)


def _places(length: int, of_map: int) -> NDArray[np.int64]:
    """For every pixel along a side of the image, the pixel of the map in which its centre lies."""
    return ((2 * np.arange(length) + 1) * of_map) // (2 * length)


def _measured(
    weights: NDArray[np.int64], places: tuple[NDArray[np.int64], NDArray[np.int64]], corner: tuple[int, int]
) -> tuple[int, int, int, int, int, float, float]:
    """Box, area and centroid of a region, from the number of pixels of the image in each of the map, from a corner."""
    area = int(weights.sum())
    starts, lengths, centres = [], [], []
    for axis in (0, 1):
        along = weights.sum(axis=1 - axis)
        first, last = (corner[axis] + int(np.flatnonzero(along)[end]) for end in (0, -1))
        start, end = np.searchsorted(places[axis], [first, last + 1])
        of_pixel = along[places[axis][start:end] - corner[axis]] / np.maximum(
            1, np.bincount(places[axis][start:end] - first)[places[axis][start:end] - first]
        )
        starts.append(int(start))
        lengths.append(int(end - start))
        centres.append(float(((np.arange(start, end) + 0.5) * of_pixel).sum() / area))
    return starts[1], starts[0], lengths[1], lengths[0], area, centres[1], centres[0]


def regions_of(batch: ImageBatch, min_area: int = 0) -> Sequence[Regions]:
    """The regions of every image of a batch, which keeps them as ``regions``.

    Raises:
        ValueError: The batch has no masks, since there are no thresholds.
    """
    known: Sequence[Regions] | None = getattr(batch, "regions", None)
    if known is not None:
        return known
    if batch.anomaly_map is None or batch.pred_mask is None:
        msg = "Regions are cut out of the map at its threshold: leave the post-processor's `enable_thresholding` on."
        raise ValueError(msg)
    maps, masks = (_array(values) for values in (batch.anomaly_map, batch.pred_mask))
    sizes = sizes_of(batch)
    found = [find_regions(*one, min_area) for one in zip(masks.astype(bool), maps, sizes, strict=True)]
    vars(batch)["regions"] = found
    return found


def sizes_of(batch: ImageBatch) -> list[tuple[int, int]]:
    """Height and width of the image files of a batch: as it knows them, else as they are; of the map without a file."""
    known: list[tuple[int, int]] | None = getattr(batch, "image_sizes", None)
    if known is not None:
        return known
    if batch.anomaly_map is None:
        msg = "The batch has no maps, which regions are cut out of."
        raise ValueError(msg)
    of_map = (batch.anomaly_map.shape[-2], batch.anomaly_map.shape[-1])
    paths = batch.image_path or [""] * batch.batch_size
    return [_size_of(path) or of_map for path in paths]


def _size_of(path: str) -> tuple[int, int] | None:
    if path and is_file(Path(path)):
        with suppress(ValueError):  # what is no image has no result either
            return image_size_of(Path(path))
    return None


def _array(values: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = values.detach().as_subclass(Tensor).cpu().numpy()
    return found
