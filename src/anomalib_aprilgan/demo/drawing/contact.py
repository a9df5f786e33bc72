"""A contact sheet of the drawn categories and defects."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from .catalogue import CATEGORIES, DEFECTS
from .product import draw_good, draw_twins


def contact_sheet(
    seed: int = 0,
    image_size: int = 96,
    *,
    categories: Sequence[str] = CATEGORIES,
    defects: Sequence[str] = DEFECTS,
    goods: int = 2,
    random_style: bool = False,
) -> PillowImage.Image:
    """One row per category: good pictures, then one of each defect with its mask outlined in red.

    Args:
        seed: Number of the product.
        image_size: Side of each picture in pixels.
        categories: The rows.
        defects: The defective columns.
        goods: Number of good pictures.
        random_style: A new product in each picture.

    Returns:
        RGB image of ``len(categories)`` rows and ``goods + len(defects)`` columns.
    """
    rows = []
    for category in categories:
        row = [draw_good(category, seed, index, image_size, random_style=random_style) for index in range(goods)]
        for number, kind in enumerate(defects):
            twins = draw_twins(category, seed, goods + number, kind, image_size, random_style=random_style)
            row.append(_outlined(twins.bad, twins.mask))
        rows.append(np.concatenate(row, axis=1))
    return PillowImage.fromarray(np.concatenate(rows))


def _outlined(picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The picture with a red line two pixels outside the mask."""
    near, far = _grown(mask, 2), _grown(mask, 3)
    outlined = picture.copy()
    outlined[far & ~near] = (230, 30, 30)
    return outlined


def _grown(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """The mask grown by a diamond of the given radius."""
    grown = mask.copy()
    for _ in range(radius):
        wider = grown.copy()
        wider[1:] |= grown[:-1]
        wider[:-1] |= grown[1:]
        wider[:, 1:] |= grown[:, :-1]
        wider[:, :-1] |= grown[:, 1:]
        grown = wider
    return grown
