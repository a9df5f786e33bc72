"""Surfaces that do not exist: patterns, reliefs and grains combined at random, to learn from.

What ``invented_objects`` is to objects this is to textures. No squares as large as tiles and no pebbles of
a hide's size among them: those are categories by which models are judged that never saw them.
"""

import numpy as np

from .canvas import Canvas, mix, ramp, unit
from .draws import Array, Draws
from .noise import cell_index, cells, cloud, lattice, table

_FINISHES = (
    (0.84, 0.82, 0.78), (0.68, 0.68, 0.68), (0.48, 0.48, 0.5), (0.24, 0.23, 0.23), (0.72, 0.58, 0.4),
    (0.58, 0.38, 0.28), (0.62, 0.28, 0.25), (0.34, 0.42, 0.56), (0.36, 0.48, 0.38), (0.76, 0.68, 0.42),
    (0.42, 0.26, 0.18), (0.5, 0.54, 0.54),
)  # fmt: skip
_Pattern = tuple[Array, Array, Array]  # height, share of the second colour, brightness


def invented_texture(style: Draws, own: Draws, canvas: Canvas) -> Array:
    """One of endlessly many surfaces.

    Args:
        style: Fixed draws of the product.
        own: Draws of one picture.
        canvas: Where it is drawn.

    Returns:
        ``(3, H, W)`` colour planes before light and sensor noise.
    """
    turn = style.pick((0.0, 0.0, 0.0, 0.7854, style.uniform(0.0, 3.1416)))
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    u, v = cos * canvas.x + sin * canvas.y, cos * canvas.y - sin * canvas.x
    first, second = style.colour(_FINISHES, 0.07), style.colour(_FINISHES, 0.07)
    if style.chance(0.5):  # two tones of one colour
        second = np.clip(first * style.uniform(0.6, 1.35), 0.03, 0.95)
    pattern = style.pick((_units, _pebbles, _ribs, _weave, _streaks, _speckles, _knobs))
    height, share, tone = pattern(style, own, canvas, u, v)
    if style.chance(0.3):
        more = style.pick((_ribs, _streaks, _speckles))(style, own, canvas, u, v)
        height, share, tone = height + 0.5 * more[0], unit(share + 0.4 * more[1]), tone * (0.5 + 0.5 * more[2])
    fine = cloud(own, canvas.shape, style.integer(24, 90))
    height = height + style.pick((0.0, 0.002, 0.006)) * fine
    shade = tone * canvas.relief(height, style.uniform(0.2, 0.5))
    shade = shade * (1.0 + style.uniform(0.02, 0.09) * fine + style.uniform(0.0, 0.08) * cloud(own, canvas.shape, 4, 2))
    gloss = style.pick((0.0, 0.0, 0.2, 0.4))
    return mix(first, second, share) * shade + gloss * np.maximum(shade - 1.1, 0.0)


def _units(style: Draws, own: Draws, canvas: Canvas, u: Array, v: Array) -> _Pattern:
    """Laid units with joints between them, longer than high, row over row or in a bond."""
    tall = style.uniform(0.1, 0.6)
    wide = tall * style.uniform(1.3, 3.5)
    joint, bond = tall * style.uniform(0.03, 0.2), style.pick((0.0, 0.25, 0.3333, 0.5))
    row = np.floor(v / tall)
    across, down, index = cell_index(u / wide + bond * row, v / tall)
    edge = np.minimum(
        (0.5 - np.abs(u / wide + bond * row - across - 0.5)) * wide, (0.5 - np.abs(v / tall - down - 0.5)) * tall
    )
    depth = edge - 0.5 * joint + style.pick((0.0, 0.01)) * cloud(own, canvas.shape, 26, 2)
    variety = style.uniform(0.0, 0.3)
    rounding = style.pick((0.03, 0.03, 0.3 * tall))
    height = style.uniform(0.6, 1.4) * np.minimum(np.maximum(depth, -0.03), rounding)
    return height, canvas.inside(depth), 1.0 + variety * (table(own).take(index) - 0.5)


def _pebbles(style: Draws, own: Draws, canvas: Canvas, u: Array, v: Array) -> _Pattern:
    """Scattered cells with creases or gaps between them: crumbs or cobbles."""
    pitch = style.pick((style.uniform(3.5, 9.0), style.uniform(22.0, 32.0)))
    squeeze = style.pick((1.0, 1.0, style.uniform(0.4, 1.0)))
    along, across = table(own), table(own)
    warp = style.uniform(0.0, 0.3) * cloud(own, canvas.shape, 14, 2)
    near, second, owner = cells(along, across, u * pitch + warp, v * pitch * squeeze - warp)
    gap = second - near
    crease = ramp(gap, 0.0, style.uniform(0.15, 0.6))
    height = style.uniform(0.3, 0.9) * (style.uniform(0.2, 0.8) * crease - 0.2 * near * near) / pitch
    share = style.pick((0.0, 0.8)) * (1.0 - crease)
    if style.chance(0.3):
        share = np.where(along.take(owner ^ 341) < style.uniform(0.1, 0.5), 1.0, share)
    tone = (1.0 - style.uniform(0.0, 0.35) * (1.0 - crease)) * (1.0 + style.uniform(0.0, 0.25) * along.take(owner ^ 21))
    return height, share, tone


def _ribs(style: Draws, own: Draws, canvas: Canvas, u: Array, v: Array) -> _Pattern:
    """Corrugation, planks or stripes, straight or wavy."""
    pitch = style.uniform(0.07, 0.4)
    wave = style.pick((0.0, 0.0, 0.3)) * lattice(table(own), u * 2.0, v * 0.7)
    phase = u / pitch + wave
    within = phase - np.floor(phase)
    tones = table(own).take(np.floor(phase).astype(np.intp) & 2047)
    tone = 1.0 + style.pick((0.0, 0.1, 0.3)) * (tones - 0.5)
    if style.chance(0.5):  # rounded
        return style.uniform(0.1, 0.3) * pitch * np.cos(2.0 * np.pi * phase), np.zeros(canvas.shape), tone
    line = canvas.inside(np.abs(within - 0.5) * pitch - style.uniform(0.02, 0.45) * pitch)
    return style.pick((0.0, -0.02, 0.02)) * line, line * style.uniform(0.4, 1.0), tone


def _weave(style: Draws, own: Draws, _: Canvas, u: Array, v: Array) -> _Pattern:
    """Threads or straps over and under each other."""
    pitch, step = style.uniform(0.06, 0.3), style.pick((1.0, 1.0, 0.5, 0.3333))
    iu, iv = np.floor(u / pitch), np.floor(v / pitch)
    phase = 0.5 * (iu + step * iv)
    on_top = phase - np.floor(phase) < 0.45
    round_u, round_v = u / pitch - iu - 0.5, v / pitch - iv - 0.5
    across, along = np.where(on_top, round_u, round_v), np.where(on_top, round_v, round_u)
    threads = table(own)
    tones = np.where(on_top, threads.take(iu.astype(np.intp) & 2047), threads.take(2048 + (iv.astype(np.intp) & 2047)))
    open_share = ramp(np.abs(across), style.uniform(0.3, 0.48), 0.5) * style.uniform(0.0, 0.6)
    tone = (1.0 - open_share) * (1.0 + style.uniform(0.0, 0.2) * (tones - 0.5))
    height = -pitch * (style.uniform(0.5, 1.5) * across * across + style.uniform(0.2, 1.0) * along * along)
    return height, np.where(on_top, 1.0, 0.0), tone


def _streaks(style: Draws, own: Draws, _: Canvas, u: Array, v: Array) -> _Pattern:
    """Fibres, grain or grinding along one direction."""
    coarse, stretch = style.uniform(4.0, 40.0), style.uniform(8.0, 40.0)
    bend = style.pick((0.0, 0.0, 0.15)) * lattice(table(own), u * 1.3, v * 0.5)
    level = lattice(table(own), (u + bend) * coarse, v * coarse / stretch)
    fine = lattice(table(own), (u + bend) * coarse * 2.7, v * coarse * 2.7 / stretch)
    share = unit(0.3 + style.uniform(0.2, 0.7) * level + 0.2 * fine)
    return style.pick((0.0, 0.1)) * level / coarse, share * style.uniform(0.3, 1.0), 1.0 + 0.06 * fine


def _speckles(style: Draws, own: Draws, canvas: Canvas, u: Array, v: Array) -> _Pattern:
    """Clouds, flakes or grains without direction, as of stone, foam, plaster and paper."""
    grains = style.uniform(5.0, 40.0)
    noise = lattice(table(own), u * grains, v * grains) + 0.5 * lattice(table(own), u * grains * 2.3, v * grains * 2.3)
    low = style.uniform(-0.4, 0.7)
    share = ramp(noise, low, low + style.pick((0.1, 0.5, 1.0))) * style.uniform(0.3, 1.0)
    return style.pick((0.0, 0.2, 0.5)) * noise / grains, share, np.ones(canvas.shape)


def _knobs(style: Draws, own: Draws, canvas: Canvas, u: Array, v: Array) -> _Pattern:
    """Knobs, pits, holes or prints on a lattice, in rows or staggered."""
    pitch, bond = style.uniform(0.1, 0.4), style.pick((0.0, 0.5))
    row = np.floor(v / pitch)
    across = u / pitch + bond * row
    du, dv = across - np.floor(across) - 0.5, v / pitch - row - 0.5
    radius = style.uniform(0.15, 0.42)
    away = np.sqrt(du * du + dv * dv + 1e-12) if style.chance(0.6) else np.maximum(np.abs(du), np.abs(dv))
    knob = canvas.inside((away - radius) * pitch)
    height = style.pick((-0.4, 0.0, 0.4)) * pitch * unit(1.0 - away / radius)
    uneven = 1.0 + style.uniform(0.0, 0.06) * lattice(table(own), u * 9.0, v * 9.0)
    return height, knob * style.pick((0.0, 0.6, 1.0)), (1.0 - style.pick((0.0, 0.3, 0.7)) * knob) * uneven
