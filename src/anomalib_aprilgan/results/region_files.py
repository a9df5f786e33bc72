"""Regions of defects as files: a table, COCO's JSON, masks, maps."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from anomalib.data import ImageBatch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..checks import check_int, check_text
from ..csv_text import as_csv, safe_name, safe_path
from ..data.listing import augmentations_of, listed_files
from ..files import check_writable, write_atomically
from ..running import all_gather_object
from .callback import ResultWriter
from .file_names import FileNames, marked
from .regions import Region, Regions, regions_of, sizes_of
from .table import class_names_of, in_order

MAP_LEVELS = 65535  # of 16 bits, for values from 0 to 1


class OfImage(NamedTuple):
    """What the files of a run say of one image; ``size`` is height and width of its file."""

    image_path: str
    class_name: str
    size: tuple[int, int]
    found: Any


class RegionResults(ResultWriter, ABC):
    """Base of callbacks that write one file about all images when a run ends, the first of several processes alone.

    Args:
        folder: Where to write; else the trainer's ``default_root_dir``.
        min_area: Regions of fewer pixels of the image file are left out.
    """

    in_pixels_of_files = True

    def __init__(self, folder: str | Path | None = None, min_area: int = 0) -> None:
        super().__init__()
        self.folder = None if folder is None else Path(check_text("folder", folder, "a folder to write to"))
        self.min_area = check_int("min_area", min_area, 0, hint=" pixels")
        self._images: list[OfImage] = []
        self._names: FileNames | None = None

    def start(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Begin; an OSError where the folder cannot be written, a ValueError where the data change their files."""
        check_writable(self._folder(trainer))
        if self.in_pixels_of_files and augmentations_of(loaders, getattr(pl_module, "pre_processor", None)) is not None:
            msg = (
                "Regions are told in pixels of the image files, which the augmentations of the data change: leave out "
                "the augmentations, or regions, coco, masks and report from `outputs`."
            )
            raise ValueError(msg)
        self._images, self._names = [], FileNames(trainer, loaders)

    def write_batch(self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch) -> None:
        """Collect what is told of the images of a batch."""
        paths = batch.image_path or [""] * batch.batch_size
        names, sizes = class_names_of(batch, pl_module), sizes_of(batch)
        found = self.of_batch(batch, self._folder(trainer))
        self._images += map(OfImage, paths, names, sizes, found)

    def finish(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Write the file about the images of all processes, in the order of the data."""
        del pl_module
        images = in_order([one for rank in all_gather_object(self._images) for one in rank], listed_files(loaders))
        if trainer.is_global_zero:
            self.write(images, self._folder(trainer))
        self._images = []

    @abstractmethod
    def of_batch(self, batch: ImageBatch, folder: Path) -> list[Any]:
        """What is kept of each image of a batch until the run ends; files of single images are written here."""

    @abstractmethod
    def write(self, images: list[OfImage], folder: Path) -> None:
        """Write the file about all images."""

    def _folder(self, trainer: Trainer) -> Path:
        return self.folder or Path(trainer.default_root_dir)

    def _next_file(self, batch: ImageBatch, place: int) -> Path:
        if self._names is None:
            msg = "`start` must be called before a batch comes."
            raise RuntimeError(msg)
        return self._names.next(batch.image_path[place] if batch.image_path else "")


REGION_COLUMNS = ("image_path", "class_name", "region", *Region._fields)


def region_rows(image_path: str, class_name: str, regions: list[Region]) -> list[list[object]]:
    """Rows of ``regions.csv``, numbers with the digits that tell them apart."""
    return [
        [safe_path(image_path), safe_name(class_name), number, *map(_shown, one)]
        for number, one in enumerate(regions, start=1)
    ]


def _shown(field: float) -> str:
    return f"{field:.6g}" if isinstance(field, float) else str(field)


class RegionsWriter(RegionResults):
    """Writes ``regions.csv``: a row for each region of an image; see ``anomalib_aprilgan.results.regions.Region``.

    Columns are ``image_path``, ``class_name``, ``region`` (a number from 1 on in every image), and the region's fields.
    """

    def of_batch(self, batch: ImageBatch, folder: Path) -> list[Any]:
        """The regions."""
        del folder
        return [one.found for one in regions_of(batch, self.min_area)]

    def write(self, images: list[OfImage], folder: Path) -> None:
        """Write the table."""
        rows = [row for one in images for row in region_rows(one.image_path, one.class_name, one.found)]
        path = folder / "regions.csv"
        write_atomically(path, lambda file: file.write(as_csv([REGION_COLUMNS, *rows])))
        rank_zero_info(f"{len(rows)} regions: {path}")


class CocoWriter(RegionResults):
    """Writes ``regions.json`` in COCO's format for detections and segmentations, with one category, "anomaly".

    ``file_name`` is the path of the image, ``segmentation`` a run-length code in pixels of the image file, ``score``
    the highest value of the map in the region. Images have a ``class_name`` beside COCO's own entries.
    """

    def of_batch(self, batch: ImageBatch, folder: Path) -> list[Any]:
        """The annotations of each image."""
        del folder
        return [self._annotations(one) for one in regions_of(batch, self.min_area)]

    @staticmethod
    def _annotations(regions: Regions) -> list[dict[str, Any]]:
        found = []
        for number, one in enumerate(regions, start=1):
            code = {"size": list(regions.size), "counts": regions.run_lengths(number)}
            box = [one.left, one.top, one.width, one.height]
            found.append({"bbox": box, "area": one.area, "segmentation": code, "iscrowd": 0, "score": one.peak})
        return found

    def write(self, images: list[OfImage], folder: Path) -> None:
        """Write the JSON."""
        annotations: list[dict[str, Any]] = []
        for number, one in enumerate(images, start=1):
            for annotation in one.found:
                annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1, **annotation})
        content = {
            "images": [_coco_image(number, one) for number, one in enumerate(images, start=1)],
            "categories": [{"id": 1, "name": "anomaly"}],
            "annotations": annotations,
        }
        # Bytes of file names that are no UTF-8 become \udcxx, which JSON can hold.
        write_atomically(folder / "regions.json", lambda file: file.write(json.dumps(content).encode()))
        rank_zero_info(f"{len(annotations)} regions for COCO: {folder / 'regions.json'}")


def _coco_image(number: int, one: OfImage) -> dict[str, Any]:
    height, width = one.size
    named = {"file_name": one.image_path, "class_name": one.class_name}
    return {"id": number, **named, "width": width, "height": height}


class MaskWriter(RegionResults):
    """Writes the folder ``masks``: for every image a PNG of its size, white within a region."""

    def of_batch(self, batch: ImageBatch, folder: Path) -> list[Any]:
        """Write the masks of a batch."""
        for place, one in enumerate(regions_of(batch, self.min_area)):
            image = Image.fromarray(one.mask())
            path = folder / "masks" / self._next_file(batch, place)
            write_atomically(path, partial(image.save, format="PNG", pnginfo=marked()))
        return [None] * batch.batch_size

    def write(self, images: list[OfImage], folder: Path) -> None:
        """Say where the masks are."""
        rank_zero_info(f"{len(images)} masks: {folder / 'masks'}")


class MapWriter(RegionResults):
    """Writes the folder ``maps``: for every image its map as a gray PNG of 16 bits, 0 to 65535 for 0 to 1.

    Larger maps are made smaller by their maxima, to ``max_side`` pixels at most. ``maps.csv`` tells which is whose. A
    map that is not a number all over has no file.

    Args:
        folder: Where to write; else the trainer's ``default_root_dir``.
        min_area: Not used: maps are whole.
        max_side: Longest side of a map in pixels, at least 16.
    """

    in_pixels_of_files = False

    def __init__(self, folder: str | Path | None = None, min_area: int = 0, max_side: int = 1024) -> None:
        super().__init__(folder, min_area)
        self.max_side = check_int("max_side", max_side, 16, hint=" pixels")

    def of_batch(self, batch: ImageBatch, folder: Path) -> list[Any]:
        """Write the maps of a batch; a ValueError where it has none."""
        if batch.anomaly_map is None:
            msg = "`outputs` has maps, and the model gives none."
            raise ValueError(msg)
        found: list[str] = []
        for place, anomaly_map in enumerate(batch.anomaly_map.as_subclass(Tensor)):
            file = Path("maps") / self._next_file(batch, place)
            known = bool(anomaly_map.isfinite().all())
            if known:
                write_map(folder / file, anomaly_map, self.max_side)
            found.append(file.as_posix() if known else "")
        return found

    def write(self, images: list[OfImage], folder: Path) -> None:
        """Write the table of maps."""
        rows = [[safe_path(one.image_path), safe_path(one.found)] for one in images if one.found]
        write_atomically(folder / "maps.csv", lambda file: file.write(as_csv([("image_path", "map"), *rows])))


def write_map(path: Path, anomaly_map: Tensor, max_side: int) -> None:
    """Write a map ``(h, w)`` in ``[0, 1]`` as a gray PNG of 16 bits, made smaller by its maxima."""
    values = anomaly_map.detach().float().cpu()[None, None].clamp(0.0, 1.0)
    scale = min(1.0, max_side / max(values.shape[-2:]))
    if scale < 1.0:
        values = F.adaptive_max_pool2d(values, [max(1, round(side * scale)) for side in values.shape[-2:]])
    levels: NDArray[np.uint16] = (values[0, 0] * MAP_LEVELS).round().to(torch.int32).numpy().astype(np.uint16)
    write_atomically(path, partial(Image.fromarray(levels).save, format="PNG", pnginfo=marked()))
