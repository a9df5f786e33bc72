"""Goods that do not exist: outlines, layers, prints and finishes combined at random, to learn from.

Who has seen enough of them takes what is regular on a product for part of it, on products never seen
as well. They are no category of the inspection data; no hexagons and no round-ended boxes among them, as
nuts and capsules are categories by which models are judged that never saw them.
"""

import numpy as np

from .canvas import Canvas, mix, planes, ramp, slopes, unit
from .draws import Array, Draws
from .noise import cloud, lattice, table

_FINISHES = (
    (0.86, 0.85, 0.82), (0.7, 0.71, 0.73), (0.45, 0.46, 0.48), (0.22, 0.22, 0.23), (0.74, 0.6, 0.34), (0.66, 0.42, 0.3),
    (0.72, 0.27, 0.24), (0.3, 0.42, 0.6), (0.32, 0.5, 0.38), (0.8, 0.68, 0.34), (0.5, 0.36, 0.5), (0.55, 0.4, 0.28),
)  # fmt: skip


def invented_object(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """One of endlessly many products.

    Args:
        style: Fixed draws of the product.
        own: Draws of one picture.
        canvas: Where it is drawn.

    Returns:
        ``(4, H, W)``: colour before light and sensor noise, and cover.
    """
    whole, size = _outline(style, canvas)
    opening = _openings(style, canvas, size)
    distance = np.maximum(whole, -opening)
    body, second = style.colour(_FINISHES, 0.06), style.colour(_FINISHES, 0.06)
    colour: Array = body + np.zeros((3, *canvas.shape))
    height = _profile(style, canvas, distance, size)
    for _ in range(style.integer(0, 3)):
        layer = _layer(style, canvas, distance, size)
        if style.chance(0.3):
            second = style.colour(_FINISHES, 0.06)
        colour = mix(colour, second, layer * style.pick((0.35, 0.7, 1.0)))
        height = height + style.pick((0.0, 0.0, -0.025, 0.025)) * layer
    colour = colour * _marks(style, canvas, size)
    grain = _grain(style, own, canvas)
    shade = canvas.relief(height + 0.004 * grain * style.uniform(0.0, 1.0), style.uniform(0.15, 0.45))
    colour = colour * (shade + style.uniform(0.0, 0.08) * grain)
    colour = colour + style.pick((0.0, 0.25, 0.5)) * np.maximum(shade - 1.1, 0.0)
    if style.chance(0.4):  # a lit streak along the product, as on gelatine and glass
        side = style.uniform(0.2, 0.6) * size * (1.0 if canvas.product_light[0] >= 0.0 else -1.0)
        wide, bright = style.uniform(0.03, 0.1), style.uniform(0.15, 0.5)
        streak = ramp(wide - np.abs(canvas.x - side), 0.0, wide) * ramp(-distance, 0.03, style.uniform(0.06, 0.16))
        colour = colour + bright * streak
    if style.chance(0.6):  # openings with a depth: their walls are seen, and what is left open, if anything
        colour = mix(colour, colour * _walls(style, canvas, opening), ramp(-opening, 0.0, 0.02))
        bottom = style.uniform(0.03, 0.12)
        distance = whole if style.chance(0.3) else np.maximum(whole, -opening - bottom)
    return planes(unit(colour), canvas.inside(distance))


def _outline(style: Draws, canvas: Canvas) -> tuple[Array, float]:
    """Signed distance of the body, and half its width."""
    x, y = canvas.x, canvas.y
    size = style.uniform(0.24, 0.66)
    reach = min(size * style.uniform(1.0, 2.4), 0.74)
    kind = style.integer(0, 4)
    if kind <= 1:  # a box with corners from sharp to round
        corner = size * style.pick((0.08, 0.3, 0.7))
        dx, dy = np.abs(x) - (size - corner), np.abs(y) - (reach - corner)
        outside = np.sqrt(np.maximum(dx, 0.0) ** 2 + np.maximum(dy, 0.0) ** 2)
        distance = outside + np.minimum(np.maximum(dx, dy), 0.0) - corner
    elif kind == 2:  # an ellipse
        stretched = y * (size / reach)
        distance = np.sqrt(x * x + stretched * stretched + 1e-12) - size
    else:  # a polygon, or a wheel with lobes or teeth
        size = max(size, 0.42)
        radius, angle = np.sqrt(x * x + y * y + 1e-12), np.arctan2(y, x)
        count = style.pick((3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14))
        if kind == 3 and count <= 8:
            sector = np.pi / count
            folded = np.abs((angle + sector) % (2.0 * sector) - sector)
            distance = np.maximum(radius * np.cos(folded) - 0.86 * size, radius - size)
        else:
            wave = np.cos(count * angle)
            distance = radius - size * (0.92 + style.uniform(0.02, 0.1) * np.clip(wave * style.pick((1.0, 4.0)), -1, 1))
    return distance, size


def _openings(style: Draws, canvas: Canvas, size: float) -> Array:
    """Signed distance of a bore in the middle, of a ring of holes, or of nothing."""
    x, y = canvas.x, canvas.y
    kind = style.integer(0, 4)
    opening: Array = np.ones(canvas.shape)
    if kind == 0:
        opening = np.sqrt(x * x + y * y) - size * style.uniform(0.25, 0.6)
    elif kind == 1:
        count, hole, away = style.integer(2, 8), size * style.uniform(0.08, 0.16), size * style.uniform(0.35, 0.6)
        turn = style.uniform(0.0, 6.283)
        for number in range(count):
            angle = turn + 2.0 * np.pi * number / count
            dx, dy = x - away * float(np.cos(angle)), y - away * float(np.sin(angle))
            opening = np.minimum(opening, np.sqrt(dx * dx + dy * dy) - hole)
    return opening


def _walls(style: Draws, canvas: Canvas, opening: Array) -> Array:
    """Brightness of the walls of openings: those away from the light are lit; smooth or ribbed."""
    across, down = slopes(opening, canvas.px)
    lit = -across * canvas.light[0] - down * canvas.light[1]
    ribs = np.sin(2.0 * np.pi * opening / style.uniform(0.02, 0.06))
    return style.uniform(0.15, 0.6) + style.uniform(0.0, 0.2) * lit + style.pick((0.0, 0.0, 0.12, 0.2)) * ribs


def _profile(style: Draws, canvas: Canvas, distance: Array, size: float) -> Array:
    """Height of the surface: bevelled, with a rim, fluted, or domed."""
    inward = np.maximum(-distance, 0.0)
    kind = style.integer(0, 4)
    # From the third kind on round all over.
    bevel, steepness = (size * style.uniform(0.12, 0.5), 0.6) if kind < 3 else (size, style.uniform(0.3, 0.9))
    rise = unit(inward / bevel)
    height: Array = bevel * steepness * np.sqrt(rise * (2.0 - rise) + 1e-6)
    if kind == 1:
        height = height - 0.06 * ramp(inward, bevel * 0.8, bevel * 1.3)
    elif kind == 2:
        pitch = style.uniform(0.06, 0.16)
        along = style.pick((canvas.x, canvas.y, np.sqrt(canvas.x * canvas.x + canvas.y * canvas.y)))
        height = height + 0.22 * pitch * np.cos(2.0 * np.pi * along / pitch) * ramp(inward, 0.0, 0.05)
    return height


def _layer(style: Draws, canvas: Canvas, distance: Array, size: float) -> Array:
    """Share of each pixel in a second colour: a half, bands, a rim, a disc, a grid, marks."""
    x, y = canvas.x, canvas.y
    along, across = style.pick(((x, y), (y, x)))
    kind = style.integer(0, 5)
    place = style.uniform(-0.4, 0.4) * size
    if kind == 0:
        return canvas.inside(along - place)
    if kind == 1:
        gap, width = style.uniform(0.05, 0.3), style.uniform(0.015, 0.07)
        return canvas.band(np.abs(np.abs(along - place) - gap), width)
    if kind == 2:
        return canvas.inside(-distance - size * style.uniform(0.1, 0.35))
    if kind == 3:
        return canvas.inside(np.sqrt(x * x + y * y) - size * style.uniform(0.15, 0.6))
    pitch, width = style.uniform(0.09, 0.25), style.uniform(0.015, 0.06)
    stripes = canvas.band(np.abs((along / pitch + 0.5) % 1.0 - 0.5) * pitch, width)
    if kind == 4:
        return stripes
    # Marks as of a print: pieces of the stripes, in a field.
    printed = lattice(table(style), along * 6.0 / pitch * 0.1, across * 14.0)
    field = canvas.inside(np.maximum(np.abs(x), np.abs(y)) - size * style.uniform(0.3, 0.6))
    return stripes * field * (printed > style.uniform(-0.2, 0.2))


def _marks(style: Draws, canvas: Canvas, size: float) -> Array:
    """Brightness of what is worked into the surface: facets, rings of a thread or a lathe, a seam."""
    x, y = canvas.x, canvas.y
    factor: Array = np.ones(canvas.shape)
    radius = np.sqrt(x * x + y * y + 1e-12)
    if style.chance(0.25):
        count, depth = style.integer(3, 12), style.uniform(0.05, 0.2)
        sector = 2.0 * np.pi / count
        facing = (np.floor(np.arctan2(y, x) / sector) + 0.5) * sector
        lit = np.cos(facing) * canvas.product_light[0] + np.sin(facing) * canvas.product_light[1]
        factor = factor * (1.0 + depth * lit * canvas.inside(size * style.uniform(0.2, 0.8) - radius))
    if style.chance(0.25):
        pitch, low = style.uniform(0.03, 0.08), size * style.uniform(0.1, 0.6)
        within = ramp(radius, low, low + 0.02) * ramp(low + style.uniform(0.06, 0.25) - radius, 0.0, 0.02)
        factor = factor * (1.0 + style.uniform(0.1, 0.35) * np.cos(2.0 * np.pi * radius / pitch) * within)
    if style.chance(0.3):
        place, wide = style.uniform(-0.3, 0.3) * size, style.uniform(0.015, 0.04)
        factor = factor * (1.0 - style.uniform(0.1, 0.4) * np.maximum(1.0 - np.abs(y - place) / wide, 0.0))
    return factor


def _grain(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Fine structure that differs from picture to picture: clouds, specks or brushing."""
    kind = style.integer(0, 3)
    if kind == 0:
        return cloud(own, canvas.shape, style.integer(16, 44), 2)
    cells = style.uniform(10.0, 40.0)
    stretch = style.pick((1.0, 1.0, 8.0))
    noise = lattice(table(own), canvas.x * cells, canvas.y * cells / stretch)
    return noise if kind < 3 else 2.0 * ramp(noise, 0.5, 0.8)
