"""Defects of structure: pieces lost, moved, bent, smeared or turned.

Every function takes the place and the draws of one defect and returns the damaged
``(C, h, w)`` planes of the window. Colour and cover move together, so that the outline of an
object changes too.
"""

import numpy as np

from .canvas import ramp
from .draws import Array, Draws
from .spot import Spot


def _mirror(position: Array, side: int) -> Array:
    """Positions beyond the picture reflected back into ``[0, side - 1]``."""
    reflected = np.abs(position)
    last = float(side - 1)
    return np.minimum(np.maximum(last - np.abs(last - reflected), 0.0), last)


def _sample(spot: Spot, x: Array, y: Array) -> Array:
    """Undamaged planes at other places, between pixels by bilinear weights.

    Args:
        spot: The place.
        x: ``(h, w)`` distances from the centre to the right, in picture units.
        y: ``(h, w)`` distances downwards.

    Returns:
        ``(C, h, w)``.
    """
    side = spot.planes.shape[-1]
    column = _mirror((x + (spot.centre[0] + 1.0)) * (0.5 * side) - 0.5, side)
    row = _mirror((y + (spot.centre[1] + 1.0)) * (0.5 * side) - 0.5, side)
    left, top = np.minimum(np.floor(column), side - 2.0), np.minimum(np.floor(row), side - 2.0)
    tx, ty = column - left, row - top
    index = top.astype(np.intp) * side + left.astype(np.intp)
    flat = spot.planes.reshape(spot.planes.shape[0], -1)
    upper = flat[:, index]
    upper += (flat[:, index + 1] - upper) * tx
    lower = flat[:, index + side]
    lower += (flat[:, index + side + 1] - lower) * tx
    upper += (lower - upper) * ty
    return upper


def _blend(spot: Spot, moved: Array, share: Array) -> Array:
    """The window with moved planes where ``share`` is 1; cover keeps colours apart."""
    before = spot.before
    if not spot.is_object:
        return before + (moved - before) * share
    after = np.empty_like(before)
    kept, new = before[3] * (1.0 - share), moved[3] * share
    after[3] = kept + new
    after[:3] = (before[:3] * kept + moved[:3] * new) / (after[3] + 1e-9)
    return after


def missing_piece(spot: Spot, draws: Draws) -> Array:
    """A piece broken out: of the edge of an object, of the top layer of a texture."""
    radius = spot.size * draws.uniform(0.14, 0.26)
    distance = spot.blob(draws, radius, 0.8)
    gone = spot.inside(distance)
    after = spot.before.copy()
    toward = (spot.x * spot.light[0] + spot.y * spot.light[1]) / radius
    rim = ramp(0.04 - np.abs(distance - 0.02), 0.0, 0.04)
    after[:3] *= 1.0 - rim * (0.12 + 0.2 * toward)
    if spot.is_object:
        after[3] *= 1.0 - gone
        return after
    level = spot.brightness()
    bed = spot.before[:3].mean(axis=(1, 2)).reshape(3, 1, 1)
    bed = 0.45 * bed + 0.1 if level > 0.25 else 0.5 * bed + 0.38
    wall = ramp(-distance, 0.0, 0.05)
    inner = bed * (1.0 - 0.5 * (1.0 - wall) * (0.4 + toward)) + 0.12 * (after[:3] - after[:3].mean())
    after[:3] += (inner - after[:3]) * gone
    return after


def misaligned(spot: Spot, draws: Draws) -> Array:
    """A part slipped sideways: all on one side of a cut, or a block of a texture."""
    angle, slip = draws.uniform(0.0, 2.0 * np.pi), draws.sign() * spot.size * draws.uniform(0.07, 0.14)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    along, across = cos * spot.x + sin * spot.y, cos * spot.y - sin * spot.x
    if spot.is_object:
        beyond = float((spot.before[3] * (across < 0.0)).sum())
        facing = 1.0 if beyond < 0.5 * float(spot.before[3].sum()) else -1.0
        distance = facing * across
    else:
        half_a, half_b = draws.uniform(0.18, 0.3), draws.uniform(0.14, 0.26)
        distance = np.maximum(np.abs(along) - half_a * spot.size, np.abs(across) - half_b * spot.size)
    moved = _sample(spot, spot.x - slip * cos + 0.0 * spot.y, spot.y - slip * sin + 0.0 * spot.x)
    after = _blend(spot, moved, spot.inside(distance))
    seam = ramp(0.022 - np.abs(distance), 0.0, 0.022)
    after[:3] *= 1.0 - 0.25 * seam
    return after


def bent(spot: Spot, draws: Draws) -> Array:
    """The shape pushed out of place around a point; the bulge catches the light."""
    radius = spot.size * draws.uniform(0.3, 0.46)
    angle = draws.uniform(0.0, 2.0 * np.pi)
    push = min(spot.contrast, 1.6) * draws.uniform(0.28, 0.42) * radius
    inside = np.maximum(1.0 - (spot.x * spot.x + spot.y * spot.y) / (radius * radius), 0.0)
    amount = push * inside * inside
    after = _sample(spot, spot.x - float(np.cos(angle)) * amount, spot.y - float(np.sin(angle)) * amount)
    slope = (spot.x * spot.light[0] + spot.y * spot.light[1]) / radius
    after[:3] *= 1.0 + min(0.2 * spot.contrast, 0.8) * slope * inside
    return after


def blur(spot: Spot, draws: Draws) -> Array:
    """Structure smeared out over a patch, which is a little duller or shinier."""
    distance = spot.blob(draws, spot.size * draws.uniform(0.2, 0.34), 0.5)
    width = spot.contrast * draws.uniform(0.035, 0.06) + 0.4 * spot.px
    smear_y, smear_x = _gauss(spot.y[:, 0], width), _gauss(spot.x[0], width)
    before = spot.before
    if spot.is_object:
        weighted = np.concatenate([before[:3] * before[3], before[3:]])
        smeared = smear_y @ weighted @ smear_x.T
        smeared[:3] /= smeared[3] + 1e-9
    else:
        smeared = smear_y @ before @ smear_x.T
    # Smooth goods have little to smear: there the haze is what shows.
    smeared[:3] *= 1.0 + draws.sign() * min(0.03 * spot.contrast, 0.3)
    return _blend(spot, smeared, ramp(-distance, 0.0, 0.06))


def _gauss(axis: Array, width: float) -> Array:
    """``(n, n)`` rows of Gaussian weights along an axis, each of sum 1."""
    weights: Array = np.exp(-0.5 * ((axis[:, None] - axis[None, :]) / width) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def rotated_patch(spot: Spot, draws: Draws) -> Array:
    """A round or square part put back turned."""
    radius = spot.size * draws.uniform(0.19, 0.31)
    turn = draws.sign() * draws.uniform(0.6, 2.6)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    if draws.chance(0.5):
        distance = np.sqrt(spot.x * spot.x + spot.y * spot.y) - radius
    else:
        distance = np.maximum(np.abs(spot.x), np.abs(spot.y)) - 0.88 * radius
    moved = _sample(spot, cos * spot.x + sin * spot.y, cos * spot.y - sin * spot.x)
    after = _blend(spot, moved, spot.inside(distance))
    after[:3] *= 1.0 - 0.18 * ramp(0.02 - np.abs(distance), 0.0, 0.02)
    return after
