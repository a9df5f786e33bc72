"""Random fields: clouds fixed to the picture, lattice noise and cells fixed to the product."""

from functools import lru_cache

import numpy as np

from .draws import Array, Draws

TABLE = 64  # side of the periodic tables below; a power of two, so that wrapping is a bit mask
_MASK = TABLE - 1


@lru_cache(maxsize=128)
def spline(size: int, cells: int) -> Array:
    """``(size, cells + 3)`` Catmull-Rom weights that spread lattice values over pixels."""
    position = (np.arange(size) + 0.5) / size * cells
    first = np.minimum(np.floor(position), cells - 1)
    t = position - first
    taps = (
        0.5 * t * (t * (2.0 - t) - 1.0),
        0.5 * (t * t * (3.0 * t - 5.0) + 2.0),
        0.5 * t * (t * (4.0 - 3.0 * t) + 1.0),
        0.5 * t * t * (t - 1.0),
    )
    weights = np.zeros((size, cells + 3))
    for offset, tap in enumerate(taps):
        weights[np.arange(size), first.astype(np.intp) + offset] = tap
    weights.setflags(write=False)
    return weights


def cloud(draws: Draws, shape: tuple[int, int], cells: int, octaves: int = 1) -> Array:
    """Smooth noise over a picture.

    Args:
        draws: Source of the lattice values; how many are taken does not depend on ``shape``.
        shape: ``(H, W)`` in pixels.
        cells: Lattice cells along each side in the first octave.
        octaves: Each further one has twice the cells and half the weight.

    Returns:
        ``(H, W)``, mean about 0, mostly in ``[-1, 1]``.
    """
    height, width = shape
    field = np.zeros(shape)
    for octave in range(octaves):
        count = cells << octave
        lattice = draws.array(count + 3, count + 3) * 2.0 - 1.0
        field += 0.5**octave * (spline(height, count) @ lattice @ spline(width, count).T)
    return field


def cell_index(u: Array, v: Array) -> tuple[Array, Array, np.ndarray[tuple[int, ...], np.dtype[np.intp]]]:
    """Integer cell of each point, and its index into a flat periodic table.

    Args:
        u: First coordinate in cells.
        v: Second coordinate in cells.

    Returns:
        The whole parts of ``u`` and ``v`` and the index in ``[0, TABLE ** 2)``.
    """
    iu, iv = np.floor(u), np.floor(v)
    index = ((iu.astype(np.intp) & _MASK) << 6) | (iv.astype(np.intp) & _MASK)
    return iu, iv, index


def table(draws: Draws) -> Array:
    """Flat periodic table of uniform numbers in ``[0, 1)`` for the functions of this module."""
    return draws.array(TABLE * TABLE)


def lattice(values: Array, u: Array, v: Array) -> Array:
    """Value noise at any coordinates, so that it turns and moves with the product.

    Args:
        values: From ``table``.
        u: First coordinate in lattice cells.
        v: Second coordinate in lattice cells.

    Returns:
        Noise in ``[-1, 1]`` of the shape of ``u``.
    """
    iu, iv = np.floor(u), np.floor(v)
    fu, fv = u - iu, v - iv
    fu *= fu * (3.0 - 2.0 * fu)
    fv *= fv * (3.0 - 2.0 * fv)
    column, row = iu.astype(np.intp), iv.astype(np.intp)
    left, right = (column & _MASK) << 6, ((column + 1) & _MASK) << 6
    top, bottom = row & _MASK, (row + 1) & _MASK
    upper = values.take(left | top)
    upper += (values.take(right | top) - upper) * fu
    lower = values.take(left | bottom)
    lower += (values.take(right | bottom) - lower) * fu
    upper += (lower - upper) * fv
    upper *= 2.0
    upper -= 1.0
    return upper


def cells(
    along: Array, across: Array, u: Array, v: Array
) -> tuple[Array, Array, np.ndarray[tuple[int, ...], np.dtype[np.intp]]]:
    """Distances to the two nearest of scattered points, one point in each unit cell.

    Args:
        along: From ``table``; where in its cell a point lies, first coordinate.
        across: The same, second coordinate.
        u: First coordinate in cells.
        v: Second coordinate in cells.

    Returns:
        Distance to the nearest point, to the second nearest, and the table index of the nearest.
    """
    iu, iv = np.floor(u), np.floor(v)
    fu, fv = u - iu, v - iv
    column, row = iu.astype(np.intp), iv.astype(np.intp)
    nearest = np.full(u.shape, 9.0)
    second = np.full(u.shape, 9.0)
    owner = np.zeros(u.shape, dtype=np.intp)
    for du in (-1, 0, 1):
        shifted = ((column + du) & _MASK) << 6
        for dv in (-1, 0, 1):
            index = shifted | ((row + dv) & _MASK)
            dx = along.take(index) + (du - fu)
            dy = across.take(index) + (dv - fv)
            squared = dx * dx + dy * dy
            second = np.minimum(second, np.maximum(nearest, squared))
            np.copyto(owner, index, where=squared < nearest)
            nearest = np.minimum(nearest, squared)
    return np.sqrt(nearest), np.sqrt(second), owner
