"""Goods made of several parts: chip, cable, zipper, connector.

Every function takes the fixed draws of the product, the draws of one picture and the canvas,
and returns ``(4, H, W)``: colour before light and sensor noise, and cover.
"""

import numpy as np

from .canvas import Canvas, mix, planes, ramp, unit
from .draws import Array, Draws
from .noise import cloud, lattice, table

_INSULATION = (
    (0.3, 0.45, 0.3),
    (0.5, 0.34, 0.24),
    (0.55, 0.6, 0.66),
    (0.24, 0.34, 0.56),
    (0.7, 0.6, 0.3),
    (0.3, 0.3, 0.32),
)
_HOUSINGS = ((0.16, 0.16, 0.17), (0.84, 0.82, 0.76), (0.3, 0.38, 0.5), (0.6, 0.55, 0.42), (0.34, 0.46, 0.38))
_TAPES = ((0.22, 0.23, 0.26), (0.52, 0.47, 0.4), (0.28, 0.34, 0.46), (0.45, 0.22, 0.24), (0.36, 0.42, 0.34))


def _box(x: Array, y: Array, half_x: float, half_y: float, corner: float) -> Array:
    """Signed distance of a rectangle with round corners."""
    dx = np.abs(x) - (half_x - corner)
    dy = np.abs(y) - (half_y - corner)
    outside: Array = np.sqrt(np.maximum(dx, 0.0) ** 2 + np.maximum(dy, 0.0) ** 2)
    outside += np.minimum(np.maximum(dx, dy), 0.0) - corner
    return outside


def chip(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Integrated circuit: black body with a printed code, pin mark and metal legs."""
    half_x, half_y = style.uniform(0.36, 0.5), style.uniform(0.44, 0.56)
    body = style.colour(((0.13, 0.13, 0.14), (0.2, 0.2, 0.21), (0.17, 0.18, 0.2)), 0.02)
    legs, leg = style.integer(4, 7), style.uniform(0.38, 0.52)
    metal = style.colour(((0.72, 0.72, 0.72), (0.78, 0.72, 0.58)), 0.04)
    ink, lines = style.uniform(0.3, 0.55), style.integer(2, 3)
    code = np.where(style.array(64, 64) < 0.62, 1.0, 0.0)
    code[3::4] = 0.0  # the gap after each letter
    x, y = canvas.x, canvas.y
    pitch = 2.0 * half_y * 0.92 / legs
    slot = y / pitch + 0.5 * legs
    offset = (slot - np.floor(slot) - 0.5) * pitch
    pins = np.maximum(np.abs(offset) - 0.5 * leg * pitch, np.abs(x) - half_x - 0.17)
    pins = np.maximum(pins, np.abs(y) - 0.5 * legs * pitch)
    case = _box(x, y, half_x, half_y, 0.03)
    height = np.minimum(-case, 0.04) - 0.03 * ramp(
        0.07 - np.sqrt((x + half_x - 0.14) ** 2 + (y + half_y - 0.14) ** 2), 0.0, 0.02
    )
    shade = canvas.relief(height * 1.2, 0.4) + 0.08 * cloud(own, canvas.shape, 70)
    glyph = lattice(
        code.reshape(-1), x * 34.0, np.floor(y / 0.2) * 9.0 + np.minimum((y / 0.2 - np.floor(y / 0.2)) * 7.0, 5.0)
    )
    row = y / 0.2 - np.floor(y / 0.2)
    printed = unit(glyph * 1.4 + 0.5) * ramp(np.minimum(row - 0.1, 0.74 - row), 0.0, 0.06)
    printed *= canvas.inside(np.maximum(np.abs(x) - 0.62 * half_x, np.abs(y - 0.1 * (lines - 2)) - 0.1 * lines))
    colour = body * shade + ink * printed
    bend = (
        0.72
        + 0.35 * ramp(half_x + 0.09 - np.abs(x), -0.02, 0.02)
        + 0.25 * offset / (0.5 * leg * pitch) * canvas.product_light[1]
    )
    on_body = canvas.inside(case)
    colour = mix(metal * (bend + 0.03 * cloud(own, canvas.shape, 40)), colour, on_body)
    return planes(colour, np.maximum(on_body, canvas.inside(pins)))


def cable(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Cut cable: a sheath around three insulated wires of seven strands each."""
    sheath = style.colour(((0.24, 0.24, 0.26), (0.6, 0.6, 0.58), (0.4, 0.3, 0.28), (0.72, 0.72, 0.7)), 0.04)
    first = style.integer(0, 5)
    colours = [style.colour((_INSULATION[(first + step) % 6],), 0.04) for step in (0, 1, 3)]
    filler, copper = (
        style.colour(((0.62, 0.6, 0.55), (0.3, 0.3, 0.3)), 0.03),
        style.colour(((0.78, 0.5, 0.34), (0.74, 0.7, 0.64)), 0.04),
    )
    size, wire, strand = style.uniform(0.68, 0.76), 0.285, style.uniform(0.05, 0.056)
    x, y = canvas.x, canvas.y
    radius = np.sqrt(x * x + y * y)
    distance = radius - size
    hollow = radius - 0.87 * size
    shade = canvas.relief(np.minimum(-distance, 0.04) - 0.05 * ramp(-hollow, -0.02, 0.02), 0.4)
    colour = mix(sheath * shade, filler * (0.5 + 0.08 * cloud(own, canvas.shape, 20, 2)), canvas.inside(hollow))
    near, local_x, local_y = np.full(canvas.shape, 9.0), np.zeros(canvas.shape), np.zeros(canvas.shape)
    for number, insulation in enumerate(colours):
        angle = 2.0944 * number + own.uniform(-0.05, 0.05)
        dx, dy = x - 0.335 * float(np.cos(angle)), y - 0.335 * float(np.sin(angle))
        away = np.sqrt(dx * dx + dy * dy)
        coat = insulation * canvas.relief(0.5 * np.sqrt(np.maximum(0.1 - away * away, 0.01)), 0.35)
        colour = mix(colour, coat, canvas.inside(away - wire))
        closer = away < near
        near = np.minimum(near, away)
        np.copyto(local_x, dx, where=closer)
        np.copyto(local_y, dy, where=closer)
    turn, core = own.uniform(0.0, 1.05), np.full(canvas.shape, 9.0)
    for step in range(7):
        reach = 0.0 if step == 6 else 2.02 * strand
        dx = local_x - reach * float(np.cos(turn + 1.0472 * step))
        dy = local_y - reach * float(np.sin(turn + 1.0472 * step))
        core = np.minimum(core, dx * dx + dy * dy)
    colour = mix(colour, colour * 0.35, canvas.inside(near - 3.15 * strand))
    dome = np.sqrt(np.maximum(strand * strand - core, 0.0001))
    strands = copper * (canvas.relief(dome * 0.8, 0.45) + 0.06 * cloud(own, canvas.shape, 60))
    colour = mix(colour, strands, canvas.inside(np.sqrt(core) - strand))
    return planes(colour, canvas.inside(distance))


def zipper(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Closed zipper from edge to edge: interlocked teeth between two woven tapes."""
    tape = style.colour(_TAPES, 0.05)
    metal = style.colour(((0.68, 0.68, 0.69), (0.74, 0.6, 0.34), (0.36, 0.36, 0.38), (0.8, 0.78, 0.74)), 0.04)
    pitch, reach = style.uniform(0.13, 0.17), style.uniform(0.13, 0.17)
    half, weave = style.uniform(0.5, 0.62), style.uniform(45.0, 60.0)
    x, y = canvas.x, canvas.y
    rib = lattice(table(own), x * 1.2 * weave, y * 6.0)
    twill = (x + y) * weave * 0.45
    twill = np.abs(twill - np.floor(twill) - 0.5) * 2.0
    seam = np.maximum(1.0 - np.abs(np.abs(x) - 0.34) / 0.025, 0.0)
    fold = canvas.relief(0.05 * ramp(np.abs(x), 0.16, 0.3), 0.5)
    cloth = tape * (fold * (0.82 + 0.22 * twill + 0.1 * rib - 0.22 * seam) + 0.05 * cloud(own, canvas.shape, 60))
    colour = cloth * (1.0 - 0.5 * ramp(reach + 0.06 - np.abs(x), 0.0, 0.08))
    for side in (-1.0, 1.0):
        slot = y / pitch + 0.25 * side
        offset = (slot - np.floor(slot) - 0.5) * pitch
        tooth = _box(x - side * 0.4 * reach, offset, 0.75 * reach, 0.27 * pitch, 0.2 * pitch)
        shade = canvas.relief(np.minimum(np.maximum(-tooth, -0.005), 0.03) * 1.6, 0.5)
        shade += 0.18 * ramp(0.03 - np.abs(x - side * 0.55 * reach), 0.0, 0.03) + 0.03 * cloud(own, canvas.shape, 40)
        colour = mix(colour, metal * shade, canvas.inside(tooth))
    return planes(colour, canvas.inside(np.abs(x) - half))


def connector(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Plug from the front: a plastic housing, a lug and rows of metal contacts."""
    plastic = style.colour(_HOUSINGS, 0.04)
    metal = style.colour(((0.76, 0.74, 0.7), (0.8, 0.66, 0.38)), 0.04)
    columns, rows = style.integer(4, 6), style.integer(2, 3)
    pitch = 1.25 / columns
    half_x, half_y = 0.5 * columns * pitch + 0.06, 0.5 * rows * pitch + 0.06
    round_pin, lug = style.chance(0.5), style.uniform(0.12, 0.22)
    x, y = canvas.x, canvas.y
    case = _box(x, y, half_x, half_y, 0.06)
    tab = _box(x, y + half_y, lug, 0.1, 0.03)
    shell = np.minimum(case, tab)
    sink = _box(x, y, half_x - 0.06, half_y - 0.06, 0.04)
    column, row = x / pitch + 0.5 * columns, y / pitch + 0.5 * rows
    dx, dy = (column - np.floor(column) - 0.5) * pitch, (row - np.floor(row) - 0.5) * pitch
    pocket = _box(dx, dy, 0.37 * pitch, 0.37 * pitch, 0.08 * pitch)
    pin = (
        np.sqrt(dx * dx + dy * dy) - 0.2 * pitch
        if round_pin
        else _box(dx, dy, 0.22 * pitch, 0.14 * pitch, 0.03 * pitch)
    )
    inside = canvas.inside(sink)
    height = (
        np.minimum(-shell, 0.03) - 0.05 * ramp(-sink, -0.01, 0.03) - 0.03 * ramp(-np.maximum(pocket, sink), -0.01, 0.02)
    )
    shade = canvas.relief(height * 1.3, 0.42) + 0.05 * cloud(own, canvas.shape, 60)
    colour = plastic * shade * (1.0 - 0.15 * inside)
    holes = canvas.inside(pocket) * inside
    colour = mix(colour, plastic * 0.35, holes)
    glint = canvas.relief(np.minimum(-pin, 0.3 * pitch) * 0.9, 0.45)
    colour = mix(colour, metal * (glint + 0.04 * cloud(own, canvas.shape, 40)), canvas.inside(pin) * inside)
    return planes(colour, canvas.inside(shell))
