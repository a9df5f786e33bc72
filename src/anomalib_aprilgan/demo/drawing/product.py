"""Pictures of drawn products: the good one, and its twin with one defect and an exact mask."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .catalogue import CATEGORIES, DEFECTS, INVENTIONS, KINDS
from .draws import Draws
from .scene import Image, draw_scene
from .spot import place

MIN_SIZE, MAX_SIZE = 32, 1024
_VISIBLE = 3  # levels of 255: a change smaller than this is not kept
_FAINT = 6.0  # mean change in levels below which a defect is drawn again
_ATTEMPTS = 24


@dataclass(frozen=True)
class Twins:
    """The same picture without and with a defect.

    Attributes:
        good: ``(H, W, 3)`` 8-bit RGB.
        bad: ``(H, W, 3)``, equal to ``good`` outside the mask.
        mask: ``(H, W)`` boolean, true exactly where any channel differs.
    """

    good: Image
    bad: Image
    mask: NDArray[np.bool_]


def draw_good(category: str, seed: int, index: int, image_size: int, *, random_style: bool = False) -> Image:
    """A picture of a flawless product.

    Args:
        category: One of ``CATEGORIES`` or ``INVENTIONS``.
        seed: Number of the product: fixes colours and style.
        index: Number of the picture: fixes pose, light and fine structure.
        image_size: Side in pixels, in [32, 1024].
        random_style: A new product in each picture.

    Returns:
        ``(image_size, image_size, 3)`` 8-bit RGB, the same bytes for the same arguments.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_drawing(category, seed, index, image_size)
    scene = draw_scene(category, seed, index, image_size, random_style=random_style)
    everything = slice(0, image_size)
    return scene.develop(scene.planes, everything, everything)


def draw_twins(
    category: str, seed: int, index: int, kind: str, image_size: int, *, random_style: bool = False
) -> Twins:
    """The picture of ``draw_good`` and the same one with a defect.

    Changes of fewer than 3 levels are undone, so that the mask holds nothing invisible. A
    defect that came out too small, too large or too faint is drawn again, larger, smaller or stronger.

    Args:
        category: One of ``CATEGORIES`` or ``INVENTIONS``.
        seed: Number of the product.
        index: Number of the picture.
        kind: One of ``DEFECTS``.
        image_size: Side in pixels, in [32, 1024].
        random_style: A new product in each picture.

    Returns:
        Both pictures and the mask, which covers at least 8 pixels and 0.1 % and at most a third.

    Raises:
        ValueError: An argument is out of its range.
        RuntimeError: No attempt gave such a mask.
    """
    if kind not in KINDS:
        msg = f"`kind` must be one of {', '.join(DEFECTS)}, got {kind!r}."
        raise ValueError(msg)
    check_drawing(category, seed, index, image_size)
    scene = draw_scene(category, seed, index, image_size, random_style=random_style)
    everything = slice(0, image_size)
    good = scene.develop(scene.planes, everything, everything)
    made = KINDS[kind]
    least, most = max(8.0, 0.001 * image_size * image_size), image_size * image_size / 3.0
    size = contrast = 1.0
    for attempt in range(_ATTEMPTS):
        draws = Draws(seed, category, index, kind, attempt)
        spot = place(
            draws, scene.planes, scene.light, at_edge=made.at_edge, reach=made.reach, size=size, contrast=contrast
        )
        after = scene.develop(made.damage(spot, draws), spot.rows, spot.columns)
        before = good[spot.rows, spot.columns]
        change = np.maximum(after, before) - np.minimum(after, before)
        strongest = change.max(axis=2)
        changed = strongest >= _VISIBLE
        area = int(np.count_nonzero(changed))
        if area > most:
            size *= 0.85
        elif area < least:
            size, contrast = min(size * 1.1, 1.5), contrast * 1.25
        elif float(strongest[changed].mean()) < _FAINT:
            contrast *= 1.25
        else:
            bad, mask = good.copy(), np.zeros(good.shape[:2], dtype=np.bool_)
            bad[spot.rows, spot.columns] = np.where(changed[..., None], after, before)
            mask[spot.rows, spot.columns] = changed
            return Twins(good, bad, mask)
    msg = (
        f"No {kind} of a fitting size came out on {category} (seed {seed}, index {index}, {image_size} px) in "
        f"{_ATTEMPTS} attempts; use another index."
    )
    raise RuntimeError(msg)


def check_drawing(category: str, seed: int, index: int, image_size: int) -> None:
    """Checks the arguments that all drawing functions share.

    Raises:
        ValueError: One of them is out of its range.
    """
    if not isinstance(category, str) or category not in CATEGORIES + INVENTIONS:
        msg = f"`category` must be one of {', '.join(CATEGORIES)}, got {category!r}."
        raise ValueError(msg)
    if isinstance(image_size, bool) or not isinstance(image_size, int) or not MIN_SIZE <= image_size <= MAX_SIZE:
        msg = (
            f"`image_size` must be an int in [{MIN_SIZE}, {MAX_SIZE}] (the side of a square picture), "
            f"got {image_size!r}."
        )
        raise ValueError(msg)
    for name, number in (("seed", seed), ("index", index)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            msg = f"`{name}` must be an int of at least 0, got {number!r}."
            raise ValueError(msg)
