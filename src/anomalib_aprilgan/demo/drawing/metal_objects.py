"""Metal parts: washer, nut, gear, screw, bottle cap, ball bearing.

Every function takes the fixed draws of the product, the draws of one picture and the canvas,
and returns ``(4, H, W)``: colour before light and sensor noise, and cover.
"""

import numpy as np

from .canvas import Canvas, mix, planes, ramp, unit
from .draws import Array, Draws
from .noise import cloud, lattice, table

_METALS = ((0.66, 0.67, 0.69), (0.55, 0.57, 0.6), (0.78, 0.64, 0.36), (0.7, 0.5, 0.38), (0.4, 0.41, 0.43))
_PAINTS = (
    (0.7, 0.2, 0.18),
    (0.2, 0.34, 0.56),
    (0.24, 0.46, 0.32),
    (0.8, 0.66, 0.3),
    (0.3, 0.3, 0.33),
    (0.8, 0.78, 0.74),
)


def _turned(canvas: Canvas, radius: Array, amount: float) -> Array:
    """Bow-tie highlight of a face turned on a lathe, a factor around 1."""
    toward = canvas.x * canvas.product_light[0] + canvas.y * canvas.product_light[1]
    cosine = toward / (radius + 1e-6)
    return 1.0 + amount * (cosine * cosine - 0.5)


def _grooves(style: Draws, radius: Array, count: float) -> Array:
    """Concentric tool marks in ``[-1, 1]``."""
    values = table(style)
    return lattice(values, radius * count, np.zeros(1))


def washer(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Flat ring with rounded edges."""
    outer = style.uniform(0.62, 0.76)
    inner = outer * style.uniform(0.4, 0.58)
    metal = style.colour(_METALS, 0.05)
    gloss = style.uniform(0.2, 0.45)
    radius = np.sqrt(canvas.x * canvas.x + canvas.y * canvas.y)
    distance = np.abs(radius - 0.5 * (outer + inner)) - 0.5 * (outer - inner)
    height = np.minimum(-distance, 0.05)
    shade = _turned(canvas, radius, gloss) * canvas.relief(height * 1.2, 0.4)
    shade += 0.05 * _grooves(style, radius, 60.0) + 0.03 * cloud(own, canvas.shape, 50)
    return planes(metal * shade, canvas.inside(distance))


def nut(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Hexagon nut with chamfered corners and a threaded hole."""
    flat = style.uniform(0.52, 0.6)
    bore = flat * style.uniform(0.48, 0.58)
    metal = style.colour(_METALS, 0.05)
    threads = style.uniform(3.0, 5.0)
    x, y = canvas.x, canvas.y
    radius = np.sqrt(x * x + y * y)
    hexagon = np.maximum(np.abs(y), np.maximum(np.abs(0.8660254 * x + 0.5 * y), np.abs(0.8660254 * x - 0.5 * y))) - flat
    chamfer = np.minimum(1.02 * flat - radius, 0.0) * 0.7
    collar = np.minimum(radius - bore - 0.03, 0.0) * 1.2
    height = np.minimum(-hexagon, 0.02) + chamfer + np.maximum(collar, -0.1)
    shade = _turned(canvas, radius, 0.16) * canvas.relief(height * 1.3, 0.5)
    shade += 0.03 * _grooves(style, radius, 50.0) + 0.04 * cloud(own, canvas.shape, 40)
    wall = ramp(bore - radius, 0.0, 0.03)
    toward = (x * canvas.product_light[0] + y * canvas.product_light[1]) / (radius + 1e-6)
    helix = np.sin((bore - radius) * 2.0 * np.pi * threads / (0.25 * bore))
    shade = mix(shade, 0.42 - 0.22 * toward + 0.14 * helix, wall)
    return planes(metal * shade, canvas.inside(np.maximum(hexagon, 0.74 * bore - radius)))


def gear(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Spur gear with a hub, a bore with keyway and lightening holes."""
    teeth = style.integer(14, 22)
    root = style.uniform(0.58, 0.64)
    tooth = style.uniform(0.09, 0.12)
    metal = style.colour(_METALS, 0.05)
    spokes = style.pick((0, 4, 5, 6))
    bore = style.uniform(0.1, 0.15)
    web = style.uniform(0.2, 0.24)
    x, y = canvas.x, canvas.y
    radius = np.sqrt(x * x + y * y)
    angle = np.arctan2(y, x)
    profile = np.minimum(np.maximum(2.0 * np.cos(teeth * angle), -1.0), 1.0)
    rim = radius - root - tooth * 0.5 * (1.0 + profile)
    hole = np.minimum(bore - radius, 1.0)
    hole = np.maximum(hole, np.minimum(0.045 - np.abs(y), np.minimum(x, bore + 0.05 - x)))
    if spokes:
        sector = 2.0 * np.pi / spokes
        folded = angle - sector * np.floor(angle / sector + 0.5)
        hole = np.maximum(hole, 0.1 - np.sqrt((radius - 0.37) ** 2 + (0.9 * radius * folded) ** 2))
    field = np.maximum(rim, hole)
    groove = np.maximum(np.abs(radius - 0.37) - 0.15, -0.04)
    height = (
        np.minimum(np.maximum(-rim, 0.0), 0.03)
        + np.maximum(groove, -0.03)
        - np.minimum(np.maximum(hole + 0.03, 0.0), 0.03)
    )
    shade = _turned(canvas, radius, web) * canvas.relief(height * 1.3, 0.45)
    shade += 0.04 * _grooves(style, radius, 55.0) + 0.04 * cloud(own, canvas.shape, 36)
    return planes(metal * shade, canvas.inside_implicit(field))


def screw(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Wood screw from the side: head, shank, thread and point."""
    metal = style.colour(_METALS, 0.05)
    shank = style.uniform(0.1, 0.13)
    pitch = style.uniform(0.1, 0.13)
    head_width, head_height = style.uniform(0.24, 0.3), style.uniform(0.16, 0.22)
    flat_head, smooth = style.chance(0.5), style.uniform(0.05, 0.25)
    x, y = canvas.x, canvas.y + 0.74
    down = (y - head_height) / 1.25
    taper = unit((1.0 - down) / 0.22)
    wave = (y + 0.3 * pitch * x / shank) / pitch
    saw = np.abs(wave - np.floor(wave) - 0.5) * 2.0
    threaded = ramp(down, smooth, smooth + 0.04)
    core = shank * (0.35 + 0.65 * taper) * taper
    width = core + 0.045 * saw * threaded * np.minimum(taper * 1.5, 1.0)
    body = np.maximum(np.abs(x) - width, np.maximum(head_height - 0.02 - y, y - head_height - 1.25))
    part = unit(y / head_height)
    if flat_head:
        reach = head_width + (shank - head_width) * part
        cap = np.maximum(np.abs(x) - np.minimum(reach, head_width - 0.015), np.maximum(-y, y - head_height))
    else:
        reach = head_width * np.sqrt(np.maximum(1.0 - (1.0 - part) ** 2, 0.0)) + 1e-3
        cap = np.maximum(np.abs(x) - reach, np.maximum(-y, y - head_height))
    on_head = y < head_height
    half = np.where(on_head, head_width, width + 1e-3)
    across = np.minimum(np.maximum(x / half, -1.0), 1.0)
    side = canvas.product_light[0]
    glint = np.maximum(1.0 - 3.0 * np.abs(across - 0.35 * side - 0.05), 0.0)
    shade = 0.5 + 0.38 * np.sqrt(np.maximum(1.0 - across * across, 0.0)) + 0.18 * across * side + 0.4 * glint
    flank = (wave - np.floor(wave) - 0.5) * 0.45 + 0.3 * (saw - 0.5)
    shade += np.where(on_head, 0.0, flank * threaded) - 0.15 * ramp(part, 0.75, 1.0) * on_head
    shade += 0.05 * cloud(own, canvas.shape, 40)
    return planes(metal * shade, canvas.inside_implicit(np.minimum(body, cap)))


def bottle_cap(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Crown cap from above with crimped rim and a printed emblem."""
    paint, print_ = style.colour(_PAINTS, 0.06), style.colour(_PAINTS, 0.06)
    print_ = np.where(np.abs(print_ - paint).sum() < 0.5, 0.92 - 0.85 * paint, print_)
    points, ring = style.integer(3, 8), style.uniform(0.36, 0.42)
    star = style.uniform(0.3, 0.75)
    x, y = canvas.x, canvas.y
    radius = np.sqrt(x * x + y * y)
    angle = np.arctan2(y, x)
    crimp = np.cos(21.0 * angle)
    field = radius - 0.7 - 0.035 * crimp
    skirt = ramp(radius, 0.5, 0.62)
    height = -0.35 * radius * radius - 0.5 * np.maximum(radius - 0.52, 0.0) + 0.05 * skirt * crimp
    shade = canvas.relief(height, 0.45) + 0.03 * cloud(own, canvas.shape, 40)
    emblem = radius - 0.14 * (1.0 + 0.5 * star * np.cos(points * (angle + 0.4)))
    marks = np.maximum(canvas.inside_implicit(emblem), canvas.band(radius - ring, 0.05))
    colour = mix(paint, print_, marks) * shade
    spot_x, spot_y = x - 0.26 * canvas.product_light[0], y - 0.26 * canvas.product_light[1]
    shine = np.maximum(1.0 - (spot_x * spot_x + spot_y * spot_y) * 9.0, 0.0)
    colour += 0.28 * shine * shine + 0.18 * np.maximum(shade - 1.1, 0.0)
    return planes(colour, canvas.inside_implicit(field))


def bearing(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Ball bearing: two rings, a cage and balls between them."""
    outer, metal = style.uniform(0.7, 0.78), style.colour(_METALS[:2], 0.05)
    cage = style.colour(((0.72, 0.56, 0.3), (0.3, 0.3, 0.32), (0.5, 0.5, 0.5)), 0.05)
    count, ball = style.integer(8, 11), style.uniform(0.095, 0.115)
    bore = style.uniform(0.24, 0.28)
    x, y = canvas.x, canvas.y
    radius = np.sqrt(x * x + y * y)
    track = 0.5 * (outer + bore)
    sector = 2.0 * np.pi / count
    angle = np.arctan2(y, x) + own.uniform(0.0, 6.28)
    centre = sector * np.floor(angle / sector + 0.5)
    along, across = radius * np.sin(angle - centre), radius * np.cos(angle - centre) - track
    distance = np.sqrt(along * along + across * across) - ball
    gutter = np.abs(radius - track) - 0.95 * ball
    rings = np.minimum(gutter, np.minimum(outer - radius, radius - bore))
    shade = _turned(canvas, radius, 0.4) * canvas.relief(np.minimum(rings, 0.03) * 1.2, 0.45)
    shade += 0.04 * _grooves(style, radius, 60.0)
    dome = np.sqrt(np.maximum(1.0 - (along * along + across * across) / (ball * ball), 0.0))
    sphere = canvas.relief(0.7 * ball * dome, 0.3) * (0.35 + 0.75 * dome)
    colour = metal * shade
    well = (
        cage
        * (0.75 + 0.3 * ramp(np.abs(across), 0.0, ball))
        * (1.0 - 0.5 * ramp(-gutter, 0.0, 0.03) * ramp(-distance, -0.05, 0.0))
    )
    colour = mix(colour, well, canvas.inside(gutter))
    colour = mix(colour, metal * sphere + 1.6 * np.maximum(sphere - 1.04, 0.0), canvas.inside(distance))
    colour *= 1.0 + 0.03 * cloud(own, canvas.shape, 40)
    return planes(colour, canvas.inside(np.maximum(radius - outer, bore - radius)))
