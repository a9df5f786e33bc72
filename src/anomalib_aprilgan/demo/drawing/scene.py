"""One picture before it is developed to 8 bits: product, background, light and sensor noise."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .canvas import Canvas, Pose, picture_axis
from .catalogue import INVENTED_OBJECT_DRAWERS, INVENTED_TEXTURE_DRAWERS, OBJECT_DRAWERS, TEXTURE_DRAWERS
from .draws import Array, Draws
from .noise import cloud, spline

Image = NDArray[np.uint8]
_BACKGROUNDS = (
    (0.86, 0.86, 0.85), (0.72, 0.72, 0.72), (0.55, 0.56, 0.57), (0.3, 0.3, 0.31), (0.12, 0.12, 0.13),
    (0.8, 0.76, 0.68), (0.44, 0.48, 0.54), (0.2, 0.23, 0.27), (0.62, 0.66, 0.64),
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One picture before it is developed to 8 bits."""

    planes: Array
    background: Array | None
    brightness: Array
    grain: Array
    light: tuple[float, float]

    def develop(self, planes: Array, rows: slice, columns: slice) -> Image:
        """``(h, w, 3)`` 8-bit pixels of a window from its planes."""
        colour = planes[:3]
        if self.background is not None:
            behind = self.background[:, rows, columns]
            colour = behind + (colour - behind) * planes[3]
        colour = colour * self.brightness[rows, columns] + self.grain[rows, columns]
        colour *= 255.0
        colour += 0.5
        np.clip(colour, 0.0, 255.0, out=colour)
        return np.ascontiguousarray(colour.astype(np.uint8).transpose(1, 2, 0))


def draw_scene(category: str, seed: int, index: int, image_size: int, *, random_style: bool) -> Scene:
    """Draws a flawless product in its surroundings.

    Args:
        category: One of ``CATEGORIES`` or ``INVENTIONS``.
        seed: Number of the product.
        index: Number of the picture.
        image_size: Side in pixels.
        random_style: A new product in each picture.
    """
    product: tuple[int | str, ...] = (seed, category, index) if random_style else (seed, category)
    style, station = Draws(*product, "style"), Draws(*product, "station")
    own, fresh = Draws(seed, category, index, "picture"), Draws(seed, category, index, "camera")
    textures, objects = TEXTURE_DRAWERS | INVENTED_TEXTURE_DRAWERS, OBJECT_DRAWERS | INVENTED_OBJECT_DRAWERS
    is_object = category in objects
    drawer, spread = (textures | objects)[category]
    azimuth = station.uniform(0.0, 2.0 * np.pi) + own.uniform(-0.15, 0.15)
    light = (float(np.cos(azimuth)), float(np.sin(azimuth)))
    turned = station.uniform(-1.57, 1.57) if category in ("brushed_metal", "wood") else 0.0
    reach = 0.07 if is_object else 20.0
    pose = Pose(
        angle=turned + own.uniform(-spread, spread),
        shift=(own.uniform(-reach, reach), own.uniform(-reach, reach)),
        scale=own.uniform(0.95, 1.03),
    )
    planes = drawer(style, own, Canvas(image_size, pose, light))
    background = _background(station, own, planes, light) if is_object else None
    axis = picture_axis(image_size)
    tilt_x, tilt_y = own.uniform(-0.07, 0.07), own.uniform(-0.07, 0.07)
    level = own.uniform(0.92, 1.06)
    brightness = level * (1.0 + tilt_x * axis + tilt_y * axis[:, None])
    noise = fresh.array(image_size, image_size) + fresh.array(image_size, image_size) - 1.0
    return Scene(planes, background, brightness, noise * station.uniform(0.012, 0.028), light)


def _background(station: Draws, own: Draws, planes: Array, light: tuple[float, float]) -> Array:
    """``(3, H, W)`` plain ground that the product stands out from, with its shadow."""
    shape = planes.shape[1], planes.shape[2]
    weight = planes[3]
    product = (planes[:3] * weight).sum(axis=(1, 2)) / max(float(weight.sum()), 1.0)
    options = [station.colour(_BACKGROUNDS, 0.03) for _ in range(3)]
    ground = max(options, key=lambda colour: min(float(np.abs(colour.reshape(3) - product).max()), 0.3))
    depth, offset = station.uniform(0.3, 0.6), station.uniform(0.05, 0.11)
    shadow = _shadow(weight, (light[0] * offset, light[1] * offset))
    return ground * ((1.0 - depth * shadow) * (1.0 + 0.02 * cloud(own, shape, 3) + 0.012 * cloud(own, shape, 48)))


_SHADOW_CELLS = 24


@lru_cache(maxsize=1)
def _shadow_nodes() -> Array:
    step = 2.0 / _SHADOW_CELLS
    nodes: Array = np.linspace(-1.0 - step, 1.0 + step, _SHADOW_CELLS + 3)
    return nodes


def _shadow(cover: Array, offset: tuple[float, float]) -> Array:
    """Cover moved away from the light and blurred, made on a coarse lattice."""
    size = cover.shape[0]
    axis = picture_axis(size)
    across, down = (
        np.exp(-0.5 * ((axis[None, :] - (_shadow_nodes()[:, None] + shift)) / 0.07) ** 2) for shift in offset
    )
    total = size * 0.5 * 0.07 * 2.5066282746310002
    coarse = down @ cover @ across.T / (total * total)
    spread = spline(size, _SHADOW_CELLS)
    shadow: Array = spread @ coarse @ spread.T
    return np.minimum(np.maximum(shadow, 0.0), 1.0)
