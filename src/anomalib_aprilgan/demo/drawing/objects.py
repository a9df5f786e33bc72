"""Small goods: pill, capsule, button, cookie.

Every function takes the fixed draws of the product, the draws of one picture and the canvas,
and returns ``(4, H, W)``: colour before light and sensor noise, and cover.
"""

import numpy as np

from .canvas import Canvas, mix, planes, ramp, unit
from .draws import Array, Draws
from .noise import cloud, lattice, table

_TABLETS = ((0.88, 0.86, 0.82), (0.84, 0.74, 0.7), (0.8, 0.78, 0.6), (0.66, 0.74, 0.8), (0.72, 0.8, 0.72))
_SHELLS = (
    (0.72, 0.28, 0.24),
    (0.84, 0.8, 0.74),
    (0.28, 0.42, 0.6),
    (0.82, 0.66, 0.32),
    (0.36, 0.52, 0.42),
    (0.5, 0.34, 0.28),
)
_PLASTICS = (
    (0.3, 0.38, 0.52),
    (0.62, 0.26, 0.26),
    (0.85, 0.82, 0.76),
    (0.28, 0.27, 0.28),
    (0.5, 0.4, 0.3),
    (0.42, 0.52, 0.44),
)
_DOUGHS = ((0.78, 0.6, 0.38), (0.68, 0.48, 0.28), (0.5, 0.34, 0.22), (0.84, 0.7, 0.48))


def pill(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Domed tablet with a score line, some with specks."""
    width = style.uniform(0.42, 0.62)
    length = width * style.pick((1.0, 1.25, 1.45))
    body = style.colour(_TABLETS, 0.05)
    specks = style.pick((0.0, 0.0, 0.3))
    speck = style.colour(((0.6, 0.3, 0.26), (0.3, 0.4, 0.55), (0.45, 0.4, 0.35)), 0.05)
    crossed = style.chance(0.3)
    u, v = canvas.x / width, canvas.y / length
    field = np.sqrt(u * u + v * v + 1e-12) - 1.0
    dome = np.sqrt(np.maximum(1.12 - (field + 1.0) ** 2, 0.02)) * 0.34 * width
    edge = ramp(-field, 0.05, 0.25)
    score = np.maximum(1.0 - np.abs(canvas.y) / 0.045, 0.0)
    if crossed:
        score = np.maximum(score, np.maximum(1.0 - np.abs(canvas.x) / 0.045, 0.0))
    chalk = cloud(own, canvas.shape, 44)
    height = dome - 0.03 * score * edge + 0.0015 * chalk
    shade = canvas.relief(height, 0.32) * (1.0 - 0.12 * score * edge) + 0.02 * chalk
    dots = specks * ramp(lattice(table(own), canvas.x * 22.0, canvas.y * 22.0), 0.6, 0.85)
    colour = mix(body, speck, dots) * shade + 0.3 * np.maximum(shade - 1.12, 0.0)
    return planes(colour, canvas.inside_implicit(field))


def capsule(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Two-part capsule with a glossy skin and a printed band."""
    radius, reach = style.uniform(0.26, 0.32), style.uniform(0.4, 0.5)
    first, second = style.colour(_SHELLS, 0.05), style.colour(_SHELLS, 0.05)
    seam, ink = style.uniform(-0.08, 0.08), style.uniform(0.3, 0.6)
    x, y = canvas.x, canvas.y
    beyond = np.maximum(np.abs(y) - reach, 0.0)
    on_cap = canvas.inside(seam - y)
    wide = radius + 0.012 * on_cap
    distance = np.sqrt(x * x + beyond * beyond) - wide
    dome = np.sqrt(np.maximum(wide * wide - x * x - beyond * beyond, 0.0025))
    shade = canvas.relief(dome * 0.9, 0.42)
    side = 0.45 * radius * (1.0 if canvas.product_light[0] >= 0.0 else -1.0)
    gloss = ramp(0.07 - np.abs(x - side), 0.0, 0.07) * ramp(reach + 0.06 - np.abs(y), 0.0, 0.1)
    bar = canvas.band(np.abs(np.abs(y) - 0.5 * reach) - 0.035, 0.022) * canvas.inside(
        np.abs(x + 0.3 * side) - 0.55 * radius
    )
    colour = mix(first, second, on_cap)
    colour = mix(colour, colour * (1.0 - ink), bar) * shade
    colour *= 1.0 - 0.3 * np.maximum(1.0 - np.abs(y - seam) / 0.02, 0.0) + 0.015 * cloud(own, canvas.shape, 30)
    return planes(colour + 0.42 * gloss, canvas.inside(distance))


def button(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Sewing button: raised rim, dished middle, two or four holes."""
    plastic = style.colour(_PLASTICS, 0.06)
    size, rim = style.uniform(0.6, 0.72), style.uniform(0.1, 0.15)
    four, spread = style.chance(0.6), style.uniform(0.12, 0.16)
    hole, swirl = style.uniform(0.05, 0.065), style.uniform(0.0, 0.16)
    x, y = canvas.x, canvas.y
    radius = np.sqrt(x * x + y * y)
    distance = radius - size
    dx = np.abs(x) - spread
    dy = np.abs(y) - spread if four else y
    bores = np.sqrt(dx * dx + dy * dy) - hole
    crest = radius - (size - rim)
    height = 0.06 * ramp(-distance, 0.0, 0.1) - 0.075 * ramp(-crest, -0.03, 0.09)
    height -= 0.04 * ramp(-bores, -0.03, 0.01) + 0.08 * np.maximum(0.12 - radius * radius, 0.0)
    shade = canvas.relief(height * 1.6, 0.42) + 0.02 * cloud(own, canvas.shape, 40)
    pearl = lattice(table(own), x * 3.0 + 0.8 * cloud(own, canvas.shape, 3), y * 9.0)
    colour = plastic * (shade + swirl * pearl) + 0.35 * np.maximum(shade - 1.1, 0.0)
    return planes(colour, canvas.inside(np.maximum(distance, -bores)))


def cookie(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Round biscuit with a crumbly top and chocolate chips, differently placed each time."""
    dough = style.colour(_DOUGHS, 0.04)
    chocolate = style.colour(((0.26, 0.16, 0.11), (0.36, 0.22, 0.14)), 0.03)
    size, chips = style.uniform(0.62, 0.72), style.integer(6, 10)
    x, y = canvas.x, canvas.y
    radius = np.sqrt(x * x + y * y)
    lumps = cloud(own, canvas.shape, 7, 3)
    field = radius - size - 0.025 * lumps
    crumbs = cloud(own, canvas.shape, 34, 2)
    height = 0.25 * np.sqrt(np.maximum(1.1 - (radius / size) ** 2, 0.02)) + 0.025 * lumps + 0.011 * crumbs
    chip = np.full(canvas.shape, 1.0)
    turn = own.uniform(0.0, 6.283)
    for number in range(chips):
        away = size * 0.82 * float(np.sqrt((number + own.uniform(0.2, 0.8)) / chips))
        angle = turn + 2.4 * number
        dx = x - away * float(np.cos(angle))
        dy = y - away * float(np.sin(angle))
        chip = np.minimum(chip, np.sqrt(dx * dx + dy * dy) - own.uniform(0.05, 0.085))
    chip += 0.015 * lumps
    height += 0.04 * ramp(-chip, -0.015, 0.05)
    shade = canvas.relief(height, 0.4) + 0.03 * crumbs
    baked = dough * (1.0 - 0.28 * ramp(radius, 0.55 * size, size) + 0.08 * lumps)
    colour = mix(baked, chocolate, canvas.inside(chip)) * shade
    return planes(colour, canvas.inside(field) * unit(2.0 - radius))
