"""What the model makes of its arguments: plain data, and refusals before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import cast

from .clip.architecture import ClipArchitecture
from .data.pre_processing import aspect_size
from .data.references import References
from .network.scoring import smoothing_radius


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels, of a square or as they are.

    Raises:
        ValueError: There are not two sides.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2:
        msg = f"`image_size` must be one side, or height and width, got {sides}."
        raise ValueError(msg)
    return sides[0], sides[1]


def size_of_shape(
    image_size: int | Sequence[int], aspect_ratio: float, tile_size: int | None, backbone: str
) -> tuple[int, int]:
    """Height and width in the shape of the pictures, at the cost of the square.

    Raises:
        ValueError: The shape does not go with the other arguments, or is none.
    """
    if not isinstance(image_size, int):
        msg = f"`aspect_ratio` needs an `image_size` of one number, got {tuple(image_size)}. Give one or the other."
        raise ValueError(msg)
    if tile_size is not None:
        msg = "`aspect_ratio` is the shape of whole pictures, and tiles are squares: give it or `tile_size`."
        raise ValueError(msg)
    if not 0.0 < aspect_ratio < math.inf:
        msg = f"`aspect_ratio` must be the pictures' width / height, above 0, got {aspect_ratio}."
        raise ValueError(msg)
    square = ClipArchitecture.load(backbone, (image_size, image_size), None)  # refuses a side that patches do not tile
    return aspect_size((1.0, aspect_ratio), image_size, image_size // square.grid[0])


def check_maps(smoothing_sigma: float, neighbourhood: int, size: tuple[int, int]) -> None:
    """Refuse what maps cannot be made with.

    Raises:
        TypeError: ``neighbourhood`` is not an int.
        ValueError: An argument is out of its range.
    """
    if not 0.0 <= smoothing_sigma < math.inf:
        msg = f"`smoothing_sigma` must be 0 (no smoothing) or more pixels, got {smoothing_sigma}."
        raise ValueError(msg)
    if smoothing_sigma and smoothing_radius(smoothing_sigma) >= min(size):
        msg = (
            f"`smoothing_sigma` reaches four times as far, which must be within the map of {size[0]} x {size[1]} "
            f"pixels: it must be below {(min(size) - 0.5) / 4.0:g}, got {smoothing_sigma}."
        )
        raise ValueError(msg)
    if isinstance(neighbourhood, bool) or not isinstance(neighbourhood, int):
        msg = f"`neighbourhood` must be an int, got {neighbourhood!r}."
        raise TypeError(msg)
    if neighbourhood < 1 or neighbourhood % 2 == 0:
        msg = f"`neighbourhood` must be an odd number of patches, 1 for each patch alone, got {neighbourhood}."
        raise ValueError(msg)


def plain_references(references: References | None) -> dict[str, str | list[str]] | list[str] | str | None:
    """References as a checkpoint can hold them: text for paths."""
    if references is None or isinstance(references, (str, os.PathLike)):
        return None if references is None else str(references)
    if isinstance(references, Mapping):
        plain = {str(name): plain_references(given) for name, given in references.items()}
        return cast("dict[str, str | list[str]]", plain)
    return [str(reference) for reference in references]


def check_few_shot(k_shot: int, references: References | None) -> None:
    """Refuse references that cannot be.

    Raises:
        ValueError: The two do not go together.
    """
    if k_shot < 0:
        msg = f"`k_shot` must be 0 (zero-shot) or more, got {k_shot}."
        raise ValueError(msg)
    if references is not None and not k_shot:
        msg = "`references` are given but `k_shot` is 0. Set `k_shot` to the number of them to use."
        raise ValueError(msg)
