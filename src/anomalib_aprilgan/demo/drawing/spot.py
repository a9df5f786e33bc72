"""The place of a defect: a window of the picture, and the shapes drawn in it."""

from dataclasses import dataclass

import numpy as np

from .canvas import picture_axis, unit
from .draws import Array, Draws


@dataclass(frozen=True)
class Spot:
    """A window around the place of a defect.

    Attributes:
        planes: ``(C, H, W)`` of the undamaged product, C is 3 for a texture, 4 (with cover) for an object.
        rows: Rows of the window.
        columns: Columns of the window.
        x: ``(1, w)`` distance from the centre to the right, in picture units (the picture is 2 wide).
        y: ``(h, 1)`` distance from the centre downwards.
        centre: Centre in picture units.
        light: Direction towards the light.
        size: Factor on the size of the defect.
        contrast: Factor on its contrast.
    """

    planes: Array
    rows: slice
    columns: slice
    x: Array
    y: Array
    centre: tuple[float, float]
    light: tuple[float, float]
    size: float
    contrast: float

    @property
    def px(self) -> float:
        """Side of a pixel in picture units."""
        return 2.0 / int(self.planes.shape[-1])

    @property
    def before(self) -> Array:
        """``(C, h, w)`` undamaged planes in the window."""
        return self.planes[:, self.rows, self.columns]

    @property
    def is_object(self) -> bool:
        """Whether the product has an outline."""
        return int(self.planes.shape[0]) == 4

    @property
    def shape(self) -> tuple[int, int]:
        """``(h, w)`` of the window."""
        return self.y.shape[0], self.x.shape[1]

    def inside(self, distance: Array) -> Array:
        """Share of each pixel inside a shape given by its signed distance."""
        return unit(0.5 - distance / self.px)

    def brightness(self) -> float:
        """Mean brightness of the product in the window, in ``[0, 1]``."""
        colour = self.before[:3].mean(axis=0)
        weight = self.before[3] if self.is_object else np.ones(self.shape)
        return float((colour * weight).sum() / max(float(weight.sum()), 1e-6))

    def step(self, draws: Draws, low: float, high: float) -> float:
        """A signed change of brightness with room for it on this product."""
        amount = min(self.contrast * draws.uniform(low, high), 0.6)
        level, darker = self.brightness(), draws.chance(0.5)
        if level - amount < 0.06:
            return amount
        if level + amount > 0.9 or darker:
            return -amount
        return amount

    def blob(self, draws: Draws, radius: float, roughness: float = 0.5) -> Array:
        """Signed distance of an irregular patch in the middle of the window.

        Args:
            draws: Source of the outline.
            radius: Mean radius in picture units.
            roughness: 0 is an ellipse; the outline is moved by up to about half of this share of the radius.
        """
        turn, flat = draws.uniform(0.0, np.pi), draws.uniform(0.7, 1.0)
        cos, sin = float(np.cos(turn)), float(np.sin(turn))
        along, across = cos * self.x + sin * self.y, (cos * self.y - sin * self.x) / flat
        wobble = _local_cloud(self, draws, radius)
        return np.sqrt(along * along + across * across) - radius * (1.0 + 0.5 * roughness * wobble)

    def line(self, path: Array, width: Array) -> Array:
        """Signed distance of a stroke with changing width.

        Args:
            path: ``(N, 2)`` corner points relative to the centre.
            width: ``(N,)`` width of the stroke at each of them.
        """
        distance = np.full(self.shape, 9.0)
        for (x0, y0), (x1, y1), w0, w1 in zip(path[:-1], path[1:], width[:-1], width[1:], strict=True):
            dx, dy = x1 - x0, y1 - y0
            px, py = self.x - x0, self.y - y0
            t = unit((px * dx + py * dy) / (dx * dx + dy * dy + 1e-12))
            rx, ry = px - t * dx, py - t * dy
            distance = np.minimum(distance, np.sqrt(rx * rx + ry * ry) - 0.5 * (w0 + (w1 - w0) * t))
        return distance


def _local_cloud(spot: Spot, draws: Draws, radius: float) -> Array:
    """Cloud with a fixed number of cells over the whole patch, cut to the window."""
    span = 3.2 * radius
    cellular = draws.array(8, 8) * 2.0 - 1.0
    u = unit((spot.x + 0.5 * span) / span)[0] * 6.999
    v = unit((spot.y + 0.5 * span) / span)[:, 0] * 6.999
    return _hat(v) @ cellular @ _hat(u).T


def _hat(position: Array) -> Array:
    """``(n, 8)`` smooth interpolation weights at positions in ``[0, 7)``."""
    first = np.floor(position)
    t = position - first
    t = t * t * (3.0 - 2.0 * t)
    weights = np.zeros((position.size, 8))
    rows, column = np.arange(position.size), first.astype(np.intp)
    weights[rows, column] = 1.0 - t
    weights[rows, column + 1] = t
    return weights


def walk(draws: Draws, length: float, bend: float, points: int) -> Array:
    """A wandering path centred at the origin.

    Args:
        draws: Source of the turns.
        length: Length of the path in picture units.
        bend: Largest turn at a corner in radians.
        points: Number of corners.

    Returns:
        ``(points, 2)`` of x and y.
    """
    turns = draws.uniform(0.0, 2.0 * np.pi) + np.cumsum((draws.array(points - 1) * 2.0 - 1.0) * bend)
    steps = (0.6 + 0.8 * draws.array(points - 1)) * length / (points - 1)
    moves = np.stack([np.cos(turns) * steps, np.sin(turns) * steps], axis=1)
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(moves, axis=0)])
    middle: Array = 0.5 * (path.max(axis=0) + path.min(axis=0))
    return path - middle


def place(
    draws: Draws,
    planes: Array,
    light: tuple[float, float],
    *,
    at_edge: bool,
    reach: float,
    size: float,
    contrast: float,
) -> Spot:
    """Chooses where on the product a defect lies.

    Args:
        draws: Source of the place.
        planes: ``(C, H, W)`` of the undamaged product.
        light: Direction towards the light.
        at_edge: On the outline of an object; no difference for a texture.
        reach: Half the side of the window in picture units.
        size: Factor on the size of the defect.
        contrast: Factor on its contrast.
    """
    side = planes.shape[-1]
    axis = picture_axis(side)
    share = draws.uniform(0.0, 1.0)
    if planes.shape[0] == 4:
        solid = planes[3] > 0.7
        solid[0] = solid[-1] = solid[:, 0] = solid[:, -1] = False
        if at_edge:
            inner = solid[1:-1, 1:-1] & solid[:-2, 1:-1] & solid[2:, 1:-1] & solid[1:-1, :-2] & solid[1:-1, 2:]
            solid[1:-1, 1:-1] &= ~inner
        spots = np.flatnonzero(solid)
        row, column = divmod(int(spots[int(share * spots.size)]), side)
        centre = (float(axis[column]), float(axis[row]))
    else:
        centre = (1.7 * share - 0.85, draws.uniform(-0.85, 0.85))
    rows, columns = _slice(centre[1], reach, side), _slice(centre[0], reach, side)
    x, y = (axis[columns] - centre[0])[None, :], (axis[rows] - centre[1])[:, None]
    return Spot(planes, rows, columns, x, y, centre, light, size, contrast)


def _slice(middle: float, reach: float, side: int) -> slice:
    low = int(np.floor((middle - reach + 1.0) * 0.5 * side))
    high = int(np.ceil((middle + reach + 1.0) * 0.5 * side))
    return slice(max(low, 0), min(high, side))
