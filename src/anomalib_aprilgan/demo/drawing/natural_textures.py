"""Textures without a lattice: wood, leather, marble, brushed metal, terrazzo.

Every function takes the fixed draws of the product, the draws of one picture and the canvas,
and returns ``(3, H, W)`` colour planes before light and sensor noise.
"""

import numpy as np

from .canvas import Canvas, mix, ramp, unit
from .draws import Array, Draws
from .noise import cells, cloud, lattice, table

_WOODS = ((0.76, 0.6, 0.4), (0.66, 0.46, 0.28), (0.5, 0.34, 0.22), (0.6, 0.36, 0.26), (0.8, 0.7, 0.54))
_HIDES = ((0.45, 0.27, 0.16), (0.22, 0.2, 0.2), (0.6, 0.41, 0.26), (0.36, 0.18, 0.16), (0.5, 0.46, 0.4))
_STONES = ((0.88, 0.87, 0.84), (0.82, 0.76, 0.7), (0.24, 0.32, 0.29), (0.2, 0.2, 0.22), (0.68, 0.56, 0.5))
_METALS = ((0.64, 0.65, 0.67), (0.56, 0.58, 0.62), (0.7, 0.6, 0.44), (0.66, 0.5, 0.42), (0.42, 0.43, 0.45))
_CHIPS = ((0.75, 0.72, 0.68), (0.35, 0.34, 0.34), (0.6, 0.42, 0.34), (0.5, 0.55, 0.52), (0.68, 0.6, 0.44))


def wood(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Planed board: growth rings, fibres along the grain and dark pores."""
    rings, waviness = style.uniform(5.0, 10.0), style.uniform(0.7, 1.6)
    light = style.colour(_WOODS, 0.05)
    dark = light * np.array([0.62, 0.55, 0.48]).reshape(3, 1, 1) * style.uniform(0.9, 1.1)
    contrast, pores = style.uniform(0.25, 0.6), style.uniform(0.15, 0.35)
    u, v = canvas.x, canvas.y
    bend = lattice(table(own), u * 1.1, v * 0.4)
    ring = u * rings + waviness * bend + 0.2 * lattice(table(own), u * 9.0, v * 1.5)
    phase = ring - np.floor(ring)
    year = 0.6 + 0.4 * lattice(table(own), np.floor(ring) + 0.5, v * 0.3)
    late = phase * phase * ramp(1.0 - phase, 0.0, 0.2) * year
    fibre = lattice(table(own), u * 64.0, v * 1.6)
    pore = ramp(lattice(table(own), u * 40.0, v * 2.4), 0.45, 0.95)
    share = unit(contrast * late * 1.4 + 0.13 * fibre + pores * pore + 0.12)
    return mix(light, dark, share) * (1.0 + 0.05 * lattice(table(own), u * 2.2, v * 0.8))


def leather(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Pebbled hide with soft folds."""
    pebbles = style.uniform(12.0, 18.0)
    hide = style.colour(_HIDES, 0.05)
    depth, sheen = style.uniform(0.35, 0.55), style.uniform(0.1, 0.3)
    along, across = table(own), table(own)
    warp = 0.35 * cloud(own, canvas.shape, 12, 3)
    near, second, owner = cells(along, across, canvas.x * pebbles + warp, canvas.y * pebbles - warp)
    gap = second - near
    crease = ramp(gap, 0.0, 0.45)
    height = (0.45 * crease + 0.3 * gap - 0.25 * near * near) / pebbles + 0.022 * cloud(own, canvas.shape, 4, 3)
    shade = canvas.relief(height * 1.2, depth)
    shade *= (0.72 + 0.28 * crease) * (0.95 + 0.1 * along.take(owner ^ 21))
    shade += 0.05 * cloud(own, canvas.shape, 64, 2)
    return hide * shade + sheen * np.maximum(shade - 1.1, 0.0)


def marble(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Polished stone with a few strong veins and many faint ones."""
    stone = style.colour(_STONES, 0.04)
    vein = np.clip(0.95 - stone, 0.25, 0.75) + 0.08 * (style.array(3).reshape(3, 1, 1) - 0.5)
    strength, turn = style.uniform(0.45, 0.8), style.uniform(0.0, np.pi)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    warp = cloud(own, canvas.shape, 2, 5)
    u, v = cos * canvas.x + sin * canvas.y, cos * canvas.y - sin * canvas.x
    flow = 2.6 * u + 1.1 * warp
    bold = ramp(1.0 - np.abs(np.sin(flow)), 0.86, 1.0) * unit(0.65 + 0.6 * cloud(own, canvas.shape, 4))
    thin = lattice(table(own), 2.6 * u + 0.5 * warp, 0.8 * v) + 0.25 * lattice(table(own), 7.0 * u, 3.0 * v)
    faint = ramp(0.09 - np.abs(thin), 0.0, 0.09) * unit(0.6 + 0.8 * warp)
    share = unit(strength * bold + 0.35 * strength * faint + 0.05 * warp)
    return mix(stone * (1.0 + 0.07 * cloud(own, canvas.shape, 6, 2)), vein, share)


def brushed_metal(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Ground sheet metal: long fine streaks under a broad highlight."""
    metal = style.colour(_METALS, 0.05)
    streaks = style.uniform(0.1, 0.2)
    coarse, fine = style.uniform(30.0, 45.0), style.uniform(90.0, 130.0)
    u, v = canvas.x, canvas.y
    level = lattice(table(own), u * coarse, v * 0.8) + lattice(table(own), u * fine, v * 1.6)
    scratches = ramp(lattice(table(own), u * fine * 0.7, v * 2.2), 0.7, 1.0)
    glow = lattice(table(own), u * 0.9, v * 0.2)
    return metal * (1.0 + streaks * 0.55 * level + 0.1 * glow + 0.12 * scratches)


def terrazzo(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Stone chips of a few colours cast in cement and ground flat."""
    pitch = style.uniform(5.0, 8.0)
    cement = style.colour(((0.78, 0.76, 0.72), (0.55, 0.54, 0.53), (0.32, 0.32, 0.34)), 0.04)
    colours = np.stack([style.colour(_CHIPS, 0.08).reshape(3) for _ in range(3)], axis=1)
    fill = style.uniform(0.3, 0.6)
    along, across, sizes = table(own), table(own), table(own)
    warp = 0.12 * cloud(own, canvas.shape, 24)
    near, second, owner = cells(along, across, canvas.x * pitch + warp, canvas.y * pitch - warp)
    size = sizes.take(owner)
    present = np.where(sizes.take(owner ^ 85) < 0.8, 1.0, 0.0)
    distance = np.maximum(near - 0.28 - 0.4 * size, fill * 0.3 + 0.02 - 0.5 * (second - near)) / pitch
    kind = (along.take(owner ^ 341) * 3.0).astype(np.intp)
    grain = 1.0 + 0.06 * cloud(own, canvas.shape, 40)
    chip = colours[:, kind] * ((0.85 + 0.3 * across.take(owner ^ 85)) * grain)
    sand = cement * (1.0 + 0.08 * cloud(own, canvas.shape, 90) + 0.04 * cloud(own, canvas.shape, 4))
    return mix(sand, chip, canvas.inside(distance) * present)
