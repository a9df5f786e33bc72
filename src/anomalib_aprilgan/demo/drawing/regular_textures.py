"""Textures built on a lattice: tile, brick, grid, fabric, carpet.

Every function takes the fixed draws of the product, the draws of one picture and the canvas,
and returns ``(3, H, W)`` colour planes before light and sensor noise.
"""

import numpy as np

from .canvas import Canvas, mix, ramp, unit
from .draws import Array, Draws
from .noise import cell_index, cloud, lattice, table

_GLAZES = ((0.82, 0.8, 0.74), (0.62, 0.38, 0.28), (0.4, 0.54, 0.62), (0.74, 0.68, 0.52), (0.45, 0.56, 0.5))
_JOINTS = ((0.72, 0.7, 0.66), (0.45, 0.44, 0.42), (0.28, 0.27, 0.26))
_BRICKS = ((0.62, 0.31, 0.24), (0.7, 0.42, 0.3), (0.52, 0.28, 0.24), (0.72, 0.6, 0.46), (0.45, 0.36, 0.34))
_WIRES = ((0.72, 0.72, 0.7), (0.6, 0.62, 0.66), (0.7, 0.62, 0.45), (0.5, 0.5, 0.48))
_CLOTHS = ((0.28, 0.38, 0.56), (0.6, 0.56, 0.48), (0.52, 0.26, 0.26), (0.33, 0.45, 0.36), (0.42, 0.4, 0.44))
_PILES = ((0.5, 0.5, 0.5), (0.32, 0.37, 0.5), (0.5, 0.32, 0.3), (0.4, 0.44, 0.34), (0.58, 0.5, 0.4))


def tile(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Glazed tiles with sunk joints, each tile a little lighter or darker."""
    pitch = style.uniform(0.4, 0.66)
    joint = pitch * style.uniform(0.05, 0.09)
    glaze, grout = style.colour(_GLAZES, 0.06), style.colour(_JOINTS, 0.04)
    speckle, marbling = style.uniform(0.02, 0.08), style.uniform(0.02, 0.07)
    u, v = canvas.x / pitch, canvas.y / pitch
    iu, iv, index = cell_index(u, v)
    du = 0.5 - np.abs(u - iu - 0.5)
    dv = 0.5 - np.abs(v - iv - 0.5)
    depth = np.minimum(du, dv) * pitch - 0.5 * joint
    tone = 1.0 + 0.12 * (table(own).take(index) - 0.5)
    tone += marbling * cloud(own, canvas.shape, 5, 2) - speckle * ramp(cloud(own, canvas.shape, 60), 0.35, 0.9)
    tone *= canvas.relief(np.minimum(np.maximum(depth, -0.02), 0.03) * 1.2, 0.3)
    mortar = grout * (1.0 + 0.12 * cloud(own, canvas.shape, 64))
    return mix(mortar, glaze * tone, canvas.inside(-depth))


def brick(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Rough bricks in a running bond with light mortar."""
    height = style.uniform(0.24, 0.34)
    length = height * style.uniform(2.0, 2.7)
    joint = height * style.uniform(0.1, 0.16)
    clay, mortar = style.colour(_BRICKS, 0.05), style.colour(_JOINTS, 0.04)
    variety = style.uniform(0.12, 0.3)
    grain = cloud(own, canvas.shape, 28, 2)
    v = canvas.y / height
    row = np.floor(v)
    u = canvas.x / length + 0.5 * (row - 2.0 * np.floor(0.5 * row))
    iu, _, index = cell_index(u, v)
    du = (0.5 - np.abs(u - iu - 0.5)) * length
    dv = (0.5 - np.abs(v - row - 0.5)) * height
    depth = np.minimum(du, dv) - 0.5 * joint + 0.012 * grain
    fine = cloud(own, canvas.shape, 90)
    tone = 1.0 + variety * (table(own).take(index) - 0.5) + 0.1 * grain + 0.07 * fine
    tone *= canvas.relief(np.minimum(np.maximum(depth, -0.03), 0.03) * 1.3 + 0.006 * grain, 0.4)
    return mix(mortar * (0.92 + 0.1 * fine), clay * tone, canvas.inside(-depth))


def grid(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Woven wire mesh over a dark ground."""
    pitch = style.uniform(0.2, 0.3)
    width = pitch * style.uniform(0.26, 0.38)
    wire = style.colour(_WIRES, 0.06)
    ground = style.colour(((0.1, 0.1, 0.11), (0.2, 0.19, 0.18), (0.14, 0.16, 0.2)), 0.03)
    turn = 0.7071067811865476
    if style.chance(0.5):
        u, v = turn * (canvas.x + canvas.y) / pitch, turn * (canvas.y - canvas.x) / pitch
    else:
        u, v = canvas.x / pitch, canvas.y / pitch
    iu, iv = np.floor(u), np.floor(v)
    du, dv = (u - iu - 0.5) * pitch, (v - iv - 0.5) * pitch
    alternate = np.cos(np.pi * (iu + iv))
    wave_u = np.cos(np.pi * (v - iv - 0.5)) * alternate
    wave_v = np.cos(np.pi * (u - iu - 0.5)) * alternate
    half = 0.5 * width
    rise_u = np.sqrt(np.maximum(half * half - du * du, 0.0)) + 0.35 * width * wave_u
    rise_v = np.sqrt(np.maximum(half * half - dv * dv, 0.0)) - 0.35 * width * wave_v
    cover_u, cover_v = canvas.band(du, width), canvas.band(dv, width)
    shine_u = 0.35 + 0.65 * unit(rise_u / half) * (1.0 - 0.35 * du / half * canvas.product_light[0])
    shine_v = 0.35 + 0.65 * unit(rise_v / half) * (1.0 - 0.35 * dv / half * canvas.product_light[1])
    dust = 1.0 + 0.08 * cloud(own, canvas.shape, 6) + 0.06 * cloud(own, canvas.shape, 80)
    below = ground * (1.0 + 0.2 * cloud(own, canvas.shape, 10))
    first_on_top = alternate > 0.0
    share_u = np.where(first_on_top, cover_u, cover_u * (1.0 - cover_v))
    share_v = np.where(first_on_top, cover_v * (1.0 - cover_u), cover_v)
    level = (shine_u * share_u + shine_v * share_v) * dust
    return below * (1.0 - share_u - share_v) + wire * level


def fabric(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Plain or twill weave with visible threads."""
    pitch = style.uniform(0.07, 0.11)
    step = style.pick((1.0, 1.0, 0.5))
    cloth = style.colour(_CLOTHS, 0.06)
    weft = np.clip(cloth * style.uniform(0.75, 1.25) + 0.04 * (style.array(3).reshape(3, 1, 1) - 0.5), 0.03, 0.95)
    u, v = canvas.x / pitch, canvas.y / pitch
    iu, iv, _ = cell_index(u, v)
    threads = table(own)
    tone_u = threads.take(iu.astype(np.intp) & 2047)
    tone_v = threads.take(2048 + (iv.astype(np.intp) & 2047))
    phase = 0.5 * (iu + step * iv)
    on_top = phase - np.floor(phase) < 0.45
    round_u, round_v = (u - iu - 0.5), (v - iv - 0.5)
    across = np.where(on_top, round_u, round_v)
    along = np.where(on_top, round_v, round_u)
    height = 1.0 - 2.6 * across * across - 1.5 * along * along
    slope = np.where(on_top, canvas.product_light[0], canvas.product_light[1])
    shade = 0.62 + 0.38 * height + 0.35 * across * slope
    shade *= 0.9 + 0.2 * np.where(on_top, tone_u, tone_v)
    fuzz = 1.0 + 0.05 * cloud(own, canvas.shape, 5) + 0.09 * cloud(own, canvas.shape, 90)
    return np.where(on_top, cloth, weft) * (shade * fuzz)


def carpet(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """Looped pile in offset rows, flecked with a second yarn."""
    pitch = style.uniform(0.06, 0.085)
    yarn, fleck = style.colour(_PILES, 0.07), style.colour(_PILES, 0.07)
    flecks = style.uniform(0.05, 0.3)
    wobble = 0.25 * lattice(table(own), canvas.x * 9.0, canvas.y * 9.0)
    v = canvas.y / pitch + wobble
    row = np.floor(v)
    u = canvas.x / (1.25 * pitch) + 0.5 * (row - 2.0 * np.floor(0.5 * row)) + wobble
    iu, _, index = cell_index(u, v)
    du, dv = u - iu - 0.5, v - row - 0.5
    tone = table(own)
    loop = 1.0 - 2.4 * (du * du + dv * dv) + 0.3 * (du * canvas.product_light[0] + dv * canvas.product_light[1])
    fibres = cloud(own, canvas.shape, 96)
    shade = (0.45 + 0.55 * loop) * (0.85 + 0.3 * tone.take(index)) + 0.12 * fibres
    shade *= 1.0 + 0.07 * cloud(own, canvas.shape, 4)
    second = np.where(tone.take(index ^ 1365) < flecks, 1.0, 0.0)
    return mix(yarn, fleck, second) * shade
