"""Regions of interest as a user gives them: a mask image, a box, or polygons; checked, and as masks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from skimage.draw import polygon2mask
from torch import Tensor

from ..checks import check_list, check_number, check_text, shown
from ..files import is_file, sha256
from .reading import BROKEN, UnreadableImageError, load_image

# A mask image, a box (left, top, right, bottom) or polygons of points (x, y), in pixels of the images.
Shape = str | list[float] | list[list[list[float]]]
PlainRoi = dict[str, Shape] | Shape
_WHAT = (
    "a mask image, a box [left, top, right, bottom], or a list of polygons [[x, y], ...], in pixels; for several "
    "classes a mapping from their names to such"
)


def plain_roi(roi: object) -> PlainRoi | None:
    """A region of interest as plain data, of one class or by name; an error where it cannot be one."""
    if not isinstance(roi, Mapping):
        return None if roi is None else _shape_of(roi)
    if not roi:
        msg = "`roi` must have an entry for one class at least, got none."
        raise ValueError(msg)
    return {check_text("roi", name, "the name of a class"): _shape_of(shape) for name, shape in roi.items()}


def roi_of_class(roi: PlainRoi | None, class_name: str, class_names: Sequence[str]) -> Shape | None:
    """The region of interest of a class, ``None`` where the whole image counts; a ValueError for an unknown name."""
    if not isinstance(roi, dict):
        return roi
    unknown = sorted(set(roi) - set(class_names))
    if unknown:
        msg = f"`roi` is given for {unknown[0]!r}, which is none of the classes {', '.join(class_names)}."
        raise ValueError(msg)
    return roi.get(class_name)


def digest_of_shape(shape: Shape) -> str:
    """What a region of interest is: its mask image by content, or its numbers."""
    return sha256(_file_of(shape))[:32] if isinstance(shape, str) else json.dumps(shape)


def frame_of_shape(shape: Shape) -> tuple[int, int] | None:
    """Height and width of the images that a mask image is for; ``None`` for a box or polygons."""
    return image_size_of(_file_of(shape)) if isinstance(shape, str) else None


def image_size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file, as it is shown (EXIF), without decoding it; errors as ``load_image``."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except (*BROKEN, Image.DecompressionBombError, Image.DecompressionBombWarning):
        height, width = load_image(path).shape[-2:]  # with its own limits and errors
        return height, width


def mask_of_shape(shape: Shape, frame: tuple[int, int]) -> Tensor:
    """``(H, W)``, true inside the region of interest, for images of height and width ``frame``.

    A pixel of a mask image is inside where it is brighter than half of the brightest one. A pixel is inside a polygon
    where its centre is.

    Raises:
        FileNotFoundError: There is no such mask image.
        ValueError: It cannot be read, or is of another size; a shape reaches beyond the images; nothing is inside.
    """
    height, width = frame
    if isinstance(shape, str):
        mask = _mask_of_file(_file_of(shape))
        if mask.shape != frame:
            msg = (
                f"`roi`: {shape} has {mask.shape[1]} x {mask.shape[0]} pixels, and the images have {width} x {height}. "
                "Give a mask of their size."
            )
            raise ValueError(msg)
    else:
        polygons = _polygons(shape)
        points = [point for polygon in polygons for point in polygon]
        outside = [point for point in points if not (0 <= point[0] <= width and 0 <= point[1] <= height)]
        if outside:
            msg = f"`roi`: the point {outside[0]} lies outside the images, which have {width} x {height} pixels."
            raise ValueError(msg)
        mask = torch.zeros(frame, dtype=torch.bool)
        for polygon in polygons:
            # Rows and columns of centres; what lies on an edge is inside on the left and at the top alone.
            centres = [(y - 0.5 - 1e-9, x - 0.5 - 1e-9) for x, y in polygon]
            mask |= torch.from_numpy(polygon2mask(frame, centres))
    if not mask.any():
        msg = f"`roi`: no pixel of the images, which have {width} x {height} pixels, is inside {shown(shape)}."
        raise ValueError(msg)
    return mask


def _shape_of(given: object) -> Shape:
    if isinstance(given, (str, os.PathLike)):
        text = check_text("roi", given, _WHAT)
        if text.lstrip().startswith(("[", "{")):  # as a command line has it
            return _shape_of(_parsed(text))
        return text
    entries = check_list("roi", given, _WHAT)
    if len(entries) == 4 and all(not isinstance(entry, (str, Sequence)) for entry in entries):
        left, top, right, bottom = (check_number("roi", entry, _WHAT) for entry in entries)
        if not (left < right and top < bottom):
            msg = f"`roi`: a box is [left, top, right, bottom] with left < right and top < bottom, got {shown(given)}."
            raise ValueError(msg)
        return [left, top, right, bottom]
    if entries and all(_is_point(entry) for entry in entries):
        entries = [entries]  # one polygon
    if not entries:
        _refuse(given)
    return [_polygon(entry) for entry in entries]


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        _refuse(text)


def _refuse(given: object) -> NoReturn:
    msg = f"`roi` must be {_WHAT}, got {shown(given)}."
    raise ValueError(msg)


def _is_point(entry: object) -> bool:
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
        return False
    return not any(isinstance(number, (str, Sequence)) for number in entry)


def _polygon(entry: object) -> list[list[float]]:
    points = check_list("roi", entry, _WHAT)
    if len(points) < 3 or not all(_is_point(point) for point in points):
        msg = f"`roi`: a polygon is a list of three points [x, y] or more, got {shown(entry)}."
        raise ValueError(msg)
    return [[check_number("roi", number, _WHAT) for number in check_list("roi", point, _WHAT)] for point in points]


def _polygons(shape: list[Any]) -> list[list[list[float]]]:
    """The polygons of a shape; a box is one."""
    if isinstance(shape[0], list):
        return shape
    left, top, right, bottom = shape
    return [[[left, top], [right, top], [right, bottom], [left, bottom]]]


def _file_of(shape: str) -> Path:
    path = Path(shape).expanduser()
    if not is_file(path):
        msg = f"`roi`: no file {path}. Give {_WHAT}."
        raise FileNotFoundError(msg)
    return path


def _mask_of_file(path: Path) -> Tensor:
    try:
        mask = load_image(path).amax(dim=0)
    except UnreadableImageError as error:
        msg = f"`roi`: {error}"
        raise UnreadableImageError(msg, error.path) from error
    return mask > mask.max() / 2.0
