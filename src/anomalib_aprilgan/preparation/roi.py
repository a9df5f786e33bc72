"""Regions of interest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..classes import classes_of_files
from ..data.listing import class_name_of, listed_files
from ..data.pre_processing import unmixed
from ..data.references import list_references, references_of_class
from ..data.roi import Shape, digest_of_shape, frame_of_shape, image_size_of, mask_of_shape, roi_of_class
from ..inspection import check_frame
from ..network.model import AprilGANModel
from ..network.roi import RegionsOfInterest
from ..recipe import Recipe, RowRecipes
from ..settings import Settings
from .workplace import Made, Workplace


def has_roi(settings: Settings, made: Made) -> bool:
    """Whether every class has the region of interest that was asked for."""
    return settings.roi is None or all(recipes.asked_roi for recipes in made.rows)


def set_roi(place: Workplace, row: int) -> None:
    """Set the region of interest of a class, unless it is that already.

    Raises:
        FileNotFoundError: The mask image is missing.
        ValueError: It does not fit the images, or nothing tells their size.
    """
    if place.settings.roi is None:
        return
    made, recipes, network = place.made, place.made.rows[row], place.network
    if place.data.augmentations is not None:
        msg = "`roi` is in pixels of the image files, which the augmentations of the data change: leave one of them."
        raise ValueError(msg)
    if network.roi is None:
        network.roi = RegionsOfInterest(len(made.classes)).to(place.device)
    shape = roi_of_class(place.settings.roi, made.classes.names[row], made.classes.names)
    if shape is None:
        network.roi.set(row, None)
        _note(recipes, None, "none")
        return
    asked = str(shape)
    if recipes.roi is not None and recipes.asked_roi == asked and _is_kept(place, row, shape, recipes.roi):
        return
    frame = frame_of_shape(shape) or _frame_of_images(place, row)
    inside = mask_of_shape(shape, frame)
    if place.settings.tile_size is None:
        inside = unmixed(inside, place.settings.architecture.image_size)
        if not inside.any():
            msg = (
                "`roi` is too narrow: at `image_size` "
                f"{place.settings.architecture.image_size} no pixel shows what is inside alone. Make it wider."
            )
            raise ValueError(msg)
    network.roi.set(row, inside, frame)
    _note(recipes, _recipe(place, shape, frame), asked)


def roi_for_image(settings: Settings, made: Made, network: AprilGANModel, image: Path, name: str | None) -> Tensor:
    """Mask ``(h, w)`` of what is looked at of an image of a class; needs no CLIP.

    Raises:
        FileNotFoundError: The mask image is missing.
        ValueError: The class is unknown or has no region, or the image does not fit it.
    """
    names = made.classes.names or tuple(settings.words or ())
    if name is None and len(names) > 1:
        msg = f"`class_name` is needed to choose among the classes {', '.join(names)}, got None."
        raise ValueError(msg)
    if name is not None and names and name not in names:
        msg = f"`class_name` must be one of {', '.join(names)}, got {name!r}."
        raise ValueError(msg)
    row = 0 if name is None or name not in made.classes.names else made.classes.names.index(name)
    frame, known = image_size_of(image), network.roi
    if known is not None and len(known.of_class) > row and (inside := known.inside(row)) is not None:
        check_frame(known, row, frame, str(image))
        return inside
    shape = roi_of_class(settings.roi, name or (names[0] if names else ""), names)
    if shape is None:
        msg = f"There is no `roi` of {name or 'the class'}: all of its images is looked at."
        raise ValueError(msg)
    mask = mask_of_shape(shape, frame)
    return unmixed(mask, settings.architecture.image_size) if settings.tile_size is None else mask


def _note(recipes: RowRecipes, recipe: Recipe | None, asked: str) -> None:
    """Write down what a region is; what was made of images within another one is made anew."""
    if recipe != recipes.roi:
        recipes.bank = recipes.bounds = recipes.calibration = None
    recipes.roi, recipes.asked_roi = recipe, asked


def _is_kept(place: Workplace, row: int, shape: Shape, known: Recipe) -> bool:
    """Whether the region of a class is the one that is wanted; one of a checkpoint, whose mask may be gone, is."""
    roi = place.network.roi
    frame = None if roi is None else roi.frame(row)
    if frame is None:
        return False
    if isinstance(shape, str) and not Path(shape).expanduser().exists():
        return True
    if not isinstance(shape, str):
        with suppress(ValueError):  # no images are at hand
            frame = _frame_of_images(place, row)
    return known.agrees(_recipe(place, shape, frame_of_shape(shape) or frame))


def _recipe(place: Workplace, shape: Shape, frame: tuple[int, int]) -> Recipe:
    size = place.settings.architecture.image_size if place.settings.tile_size is None else "tiles"
    return Recipe.of(shape=digest_of_shape(shape), frame=frame, size=size)


def _frame_of_images(place: Workplace, row: int) -> tuple[int, int]:
    """Height and width of the images of a class; a ValueError where none are at hand."""
    if place.frame is not None:
        return place.frame
    for file in _files_of_class(place, row):
        with suppress(ValueError, OSError):  # one that cannot be read is reported elsewhere
            return image_size_of(file)
    msg = "`roi` is a box or polygons, and nothing tells the size of the images: inspect one first, or give a mask."
    raise ValueError(msg)


def _files_of_class(place: Workplace, row: int) -> Iterator[Path]:
    """Image files of a class: those of the run, the references, those for calibration, those of the datamodule."""
    classes, settings = place.made.classes, place.settings
    name = None if place.datamodule is None else class_name_of(place.datamodule)
    files = place.data.files
    found = classes_of_files(classes, [file.path for file in files], name, place.data.root)
    for file, told in zip(files, found, strict=True):
        if len(classes) == 1 or (file.class_name or told) == classes.names[row]:
            yield Path(file.path)
    for argument, given in (("references", settings.references), ("calibration", settings.calibration)):
        if given is not None and given != "references":
            with suppress(ValueError, FileNotFoundError):  # reported where it is read
                yield from list_references(references_of_class(given, classes.names[row], classes.names, argument))
    train: Any = getattr(place.datamodule, "train_data", None)
    if train is not None and len(classes) == 1:
        yield from map(Path, listed_files(train))
