"""The picture plane: coordinates of a product in its pose, soft edges, light on a relief."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .draws import Array


@lru_cache(maxsize=8)
def picture_axis(size: int) -> Array:
    """``(size,)`` pixel centres in ``(-1, 1)``."""
    axis: Array = np.linspace(1.0 / size - 1.0, 1.0 - 1.0 / size, size)
    axis.setflags(write=False)
    return axis


@dataclass(frozen=True)
class Pose:
    """How a product lies in one picture.

    Attributes:
        angle: Rotation in radians.
        shift: Offset of the product in picture units (the picture is 2 wide).
        scale: Size of the product, 1 as designed.
    """

    angle: float
    shift: tuple[float, float]
    scale: float


class Canvas:
    """Coordinates of every pixel in the frame of a product.

    Args:
        size: Side of the picture in pixels.
        pose: Where the product lies.
        light: Direction towards the light in the picture, a unit vector.

    Attributes:
        size: Side of the picture in pixels.
        shape: ``(size, size)``.
        px: Side of a pixel in product units.
        x: ``(size, size)`` first product coordinate of the pixel centres.
        y: ``(size, size)`` second product coordinate.
        light: Direction towards the light in the picture.
        product_light: The same direction in the frame of the product.
    """

    def __init__(self, size: int, pose: Pose, light: tuple[float, float]) -> None:
        axis = picture_axis(size)
        cos, sin = float(np.cos(pose.angle)) / pose.scale, float(np.sin(pose.angle)) / pose.scale
        across, down = axis - pose.shift[0], (axis - pose.shift[1])[:, None]
        self.size = size
        self.shape = (size, size)
        self.px = 2.0 / (size * pose.scale)
        self.x = cos * across + sin * down
        self.y = cos * down - sin * across
        self.light = light
        unit = pose.scale
        self.product_light = (
            unit * (cos * light[0] + sin * light[1]),
            unit * (cos * light[1] - sin * light[0]),
        )

    def inside(self, distance: Array) -> Array:
        """Share of each pixel inside a shape given by its signed distance (negative inside)."""
        return unit(0.5 - distance / self.px)

    def inside_implicit(self, field: Array) -> Array:
        """As ``inside`` for any field that is negative inside; its slope is measured."""
        across, down = slopes(field, self.px)
        return unit(0.5 - field / (np.sqrt(across * across + down * down) * self.px + 1e-9))

    def band(self, distance: Array, width: float) -> Array:
        """Share of each pixel on a line, also for lines thinner than a pixel.

        Args:
            distance: Distance from the middle of the line.
            width: Width of the line.
        """
        half, reach = 0.5 * self.px, 0.5 * width
        overlap = np.minimum(distance + half, reach) - np.maximum(distance - half, -reach)
        share: Array = np.maximum(overlap, 0.0) / self.px
        return share

    def relief(self, height: Array, strength: float) -> Array:
        """Light on a surface: 1 where it is flat, more where it faces the light.

        Args:
            height: ``(H, W)`` in product units.
            strength: Largest change of brightness.

        Returns:
            ``(H, W)`` factor in ``(1 - strength, 1 + strength)``.
        """
        across, down = slopes(height, self.px)
        across *= -self.light[0]
        across -= self.light[1] * down
        across *= strength / np.sqrt(1.0 + across * across)
        across += 1.0
        return across


def unit(values: Array) -> Array:
    """Values limited to ``[0, 1]``."""
    return np.minimum(np.maximum(values, 0.0), 1.0)


def ramp(values: Array, low: float, high: float) -> Array:
    """Smooth step from 0 at ``low`` to 1 at ``high``."""
    t = unit((values - low) / (high - low))
    return t * t * (3.0 - 2.0 * t)


def mix(first: Array, second: Array, share: Array) -> Array:
    """``first`` where ``share`` is 0, ``second`` where it is 1, colours broadcast over planes."""
    return first + (second - first) * share


def slopes(height: Array, px: float) -> tuple[Array, Array]:
    """Central differences along the two axes of the picture, edge values repeated.

    Args:
        height: ``(H, W)``.
        px: Side of a pixel.

    Returns:
        Slope to the right and slope downwards, ``(H, W)`` each.
    """
    across = np.empty_like(height)
    down = np.empty_like(height)
    np.subtract(height[:, 2:], height[:, :-2], out=across[:, 1:-1])
    np.subtract(height[2:], height[:-2], out=down[1:-1])
    across[:, 0], across[:, -1] = across[:, 1], across[:, -2]
    down[0], down[-1] = down[1], down[-2]
    across *= 0.5 / px
    down *= 0.5 / px
    return across, down


def planes(colour: Array, cover: Array) -> Array:
    """One array of the colour planes of an object and of its cover.

    Args:
        colour: ``(3, H, W)`` in ``[0, 1]``.
        cover: ``(H, W)``, the share of each pixel that the object fills.

    Returns:
        ``(4, H, W)``.
    """
    stacked = np.empty((4, *cover.shape))
    stacked[:3] = colour
    stacked[3] = cover
    return stacked
