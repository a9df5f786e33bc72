"""Normal images that a compressed model is compared with its original on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from anomalib.data import AnomalibDataModule
from torch import Tensor

from ..classes import classes_of_files
from ..data.listing import class_name_of
from ..data.references import list_references, read_reference, references_of_class
from ..decision.calibration import light_variant
from .graphs import Exported, Model

_MOST_OF_CLASS = 32  # normal images that a class is compared on
_LEAST = 16  # else variants of references make up for what is missing


@dataclass(frozen=True)
class NormalImages:
    """Normal images ``(1, 3, H, W)`` of every class, by row, and where they come from."""

    source: str
    of_rows: Mapping[int, Sequence[Tensor]]

    @property
    def number(self) -> int:
        """How many there are."""
        return sum(map(len, self.of_rows.values()))


def normal_images(model: Model, source: Exported, datamodule: AnomalibDataModule | None) -> NormalImages:
    """Normal images to compare with: of a datamodule, the export options, the calibration, or the references."""
    settings, names = model.settings, source.classes
    given, origin = model.export_options.images, "the export option `images`"
    if datamodule is None and given is None:
        given, origin = settings.calibration, "the calibration"
    if datamodule is not None:
        files, origin = _files_of(datamodule, source), "the datamodule"
    elif given is not None and given != "references":
        of_class = {
            row: references_of_class(given, name, model.made.classes.names, "export_options.images")
            for row, name in enumerate(names)
        }
        files = {row: list_references(one, "export_options.images") for row, one in of_class.items()}
    else:
        remembered = [[Path(path) for path in recipes.references] for recipes in source.model.made.rows]
        files = {row: [file for file in paths if file.is_file()] for row, paths in enumerate(remembered)}
        return NormalImages("the references", {row: _variants(model, row, some) for row, some in files.items()})
    return NormalImages(origin, {row: [read_reference(file) for file in _some(own)] for row, own in files.items()})


def _files_of(datamodule: AnomalibDataModule, source: Exported) -> dict[int, list[Path]]:
    """Normal training images of a datamodule by row; a ValueError where there are none."""
    datamodule.prepare_data()
    datamodule.setup("fit")
    samples = getattr(getattr(datamodule, "train_data", None), "samples", None)
    paths = [] if samples is None else sorted(map(str, samples.image_path[samples.label_index == 0]))
    if not paths:
        msg = f"`datamodule`: {getattr(datamodule, 'name', 'it')} has no normal training images to quantise with."
        raise ValueError(msg)
    if len(source.classes) == 1:
        return {0: [Path(path) for path in paths]}
    classes = source.model.made.classes
    rows = classes.rows(classes_of_files(classes, paths, class_name_of(datamodule), None))
    return {
        row: [Path(path) for path, own in zip(paths, rows, strict=True) if own == row] for row in range(len(classes))
    }


def _some(files: Sequence[Path], most: int = _MOST_OF_CLASS) -> list[Path]:
    """Of many files some that are evenly spread."""
    chosen = sorted({round(place) for place in np.linspace(0, len(files) - 1, min(len(files), most))})
    return [files[place] for place in chosen] if files else []


def _variants(model: Model, row: int, files: Sequence[Path]) -> list[Tensor]:
    """References, and light variants of few."""
    images, roi = [read_reference(file) for file in _some(files)], model.model.roi
    of_each = -(-_LEAST // len(images)) - 1 if images else 0
    seeds = [(model.settings.seed, place, number) for place in range(len(images)) for number in range(of_each)]
    in_place = roi is not None and roi.inside(row) is not None
    return [*images, *(light_variant(images[seed[1]], seed, in_place=in_place) for seed in seeds)]
