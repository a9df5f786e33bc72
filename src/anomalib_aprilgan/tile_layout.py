"""Where the overlapping tiles of a large image lie, and how much each counts at a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import ceil

import numpy as np
from numpy.typing import NDArray

from .checks import shown

Weights = NDArray[np.float32]


def tile_positions(height: int, width: int, tile_size: int, tile_overlap: float) -> list[tuple[int, int]]:
    """Top and left, in pixels, of every tile of an image, row by row.

    The tiles are as few as give the overlap, evenly spread, flush with every border. Their side is ``tile_size``; a
    neighbour covers at least ``tile_overlap`` of it. A smaller image is one tile, cut to it. Errors are as in
    ``check_tiles``, also for the sides of the image.
    """
    check_tiles(tile_size, tile_overlap)
    for name, length in (("height", height), ("width", width)):
        check_positive(name, length)
    return list(product(_starts(height, tile_size, tile_overlap), _starts(width, tile_size, tile_overlap)))


def blend_window(length: int) -> Weights:
    """Weights ``(length,)`` along a side of a tile, in ``(0, 1]``: a symmetric triangle, nowhere zero."""
    centres = np.arange(length, dtype=np.float32) + np.float32(0.5)
    window: Weights = np.minimum(centres, length - centres) * np.float32(2.0) / np.float32(length)
    return window


def axis_weights(length: int, tile: int, starts: Sequence[int]) -> dict[int, Weights]:
    """Weights ``(tile,)`` by start, which sum to one at every place of an axis; the product of two axes is a tile's."""
    window, total = blend_window(tile), np.zeros(length, dtype=np.float32)
    for start in starts:
        total[start : start + tile] += window
    return {start: window / total[start : start + tile] for start in starts}


def check_tiles(tile_size: int, tile_overlap: float) -> None:
    """Raise a TypeError or ValueError if `tile_size` is no int from 1 up, or `tile_overlap` not in ``[0, 1)``."""
    check_positive("tile_size", tile_size)
    if isinstance(tile_overlap, bool) or not isinstance(tile_overlap, (int, float)):
        msg = f"`tile_overlap` must be a number, got {shown(tile_overlap)}."
        raise TypeError(msg)
    if not 0.0 <= tile_overlap < 1.0:
        msg = f"`tile_overlap` must be a share of the tile in [0, 1), such as 0.25, got {tile_overlap}."
        raise ValueError(msg)


def check_positive(name: str, value: int) -> None:
    """Raise a TypeError or ValueError unless it is an int from 1 up."""
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"`{name}` must be an int, got {shown(value)}."
        raise TypeError(msg)
    if value < 1:
        msg = f"`{name}` must be at least 1, got {value}."
        raise ValueError(msg)


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    room = length - tile
    if room <= 0:
        return [0]
    step = max(1, int(tile * (1.0 - overlap) + 1e-6))
    steps = ceil(room / step)
    return [index * room // steps for index in range(steps + 1)]
