"""Defects on the surface: what is scratched, cracked, spilled, stuck or pressed in.

Every function takes the place and the draws of one defect and returns the damaged
``(C, h, w)`` planes of the window. They change colours only, and an object's colours show
only where it covers, so that the defect lies on the product.
"""

import numpy as np

from .canvas import ramp
from .draws import Array, Draws
from .spot import Spot, walk

_DIRT = (
    (0.2, 0.14, 0.09), (0.1, 0.1, 0.1), (0.85, 0.84, 0.8), (0.52, 0.3, 0.14),
    (0.6, 0.16, 0.13), (0.16, 0.3, 0.5), (0.24, 0.4, 0.2), (0.78, 0.68, 0.3),
)  # fmt: skip
_LIQUIDS = (
    (0.28, 0.18, 0.1),
    (0.12, 0.12, 0.13),
    (0.55, 0.36, 0.16),
    (0.2, 0.28, 0.42),
    (0.5, 0.2, 0.16),
    (0.9, 0.9, 0.88),
)


def _repaint(spot: Spot, colour: Array, share: Array) -> Array:
    """The window with ``colour`` laid over it."""
    after = spot.before.copy()
    after[:3] += (colour - after[:3]) * share
    return after


def _contrasting(spot: Spot, draws: Draws, palette: tuple[tuple[float, float, float], ...]) -> Array:
    """A colour of the palette that differs from the product."""
    colour = draws.colour(palette, 0.05)
    local = spot.before[:3].mean(axis=(1, 2)).reshape(3, 1, 1)
    if float(np.abs(colour - local).max()) < 0.2:
        colour = colour + (0.35 if float(local.mean()) < 0.5 else -0.35)
    return np.clip(colour, 0.03, 0.95)


def scratch(spot: Spot, draws: Draws) -> Array:
    """A furrow with tapered ends, one flank lit and one in shadow."""
    count = 9
    path = walk(draws, spot.size * draws.uniform(0.35, 0.85), 0.22, count)
    taper = np.sin(np.linspace(0.08, 0.92, count) * np.pi)
    width = max(draws.uniform(0.022, 0.045), 0.9 * spot.px) * (0.35 + 0.65 * taper)
    step = spot.step(draws, 0.16, 0.36)
    distance = spot.line(path, width)
    shade = spot.line(path + np.array(spot.light) * 0.02, 0.8 * width)
    after = spot.before.copy()
    after[:3] += step * spot.inside(distance) - 0.3 * step * spot.inside(shade) * (1.0 - spot.inside(distance))
    return after


def crack(spot: Spot, draws: Draws) -> Array:
    """A jagged line with side branches."""
    count = 10
    length = spot.size * draws.uniform(0.4, 0.8)
    path = walk(draws, length, 0.9, count)
    base = max(draws.uniform(0.014, 0.03), 0.8 * spot.px)
    distance = spot.line(path, base * (1.2 - 0.9 * np.linspace(0.0, 1.0, count)))
    for _ in range(draws.integer(1, 3)):
        start = path[draws.integer(2, count - 3)]
        branch = walk(draws, length * draws.uniform(0.25, 0.45), 0.8, 5)
        distance = np.minimum(
            distance, spot.line(branch - branch[0] + start, base * (0.8 - 0.6 * np.linspace(0.0, 1.0, 5)))
        )
    step = spot.step(draws, 0.25, 0.45)
    after = spot.before.copy()
    dark = spot.brightness() > 0.2
    after[:3] = after[:3] + (
        after[:3] * max(1.0 - 2.2 * abs(step), 0.15) - after[:3] if dark else abs(step)
    ) * spot.inside(distance)
    return after


def hole(spot: Spot, draws: Draws) -> Array:
    """A small opening with a shaded far wall and a lit rim."""
    radius = spot.size * draws.uniform(0.06, 0.13)
    distance = spot.blob(draws, radius, 0.5)
    bottom = draws.uniform(0.1, 0.4) * spot.before[:3].mean(axis=(1, 2)).reshape(3, 1, 1) + 0.02
    if spot.brightness() < 0.2:
        bottom = bottom + draws.uniform(0.35, 0.55)
    toward = (spot.x * spot.light[0] + spot.y * spot.light[1]) / radius
    opening = bottom * (1.0 - 0.45 * toward)
    after = _repaint(spot, opening, spot.inside(distance))
    rim = ramp(0.035 - np.abs(distance - 0.02), 0.0, 0.035) * np.maximum(distance, 0.0) / 0.03
    after[:3] *= 1.0 - 0.35 * toward * np.minimum(rim, 1.0)
    return after


def stain(spot: Spot, draws: Draws) -> Array:
    """A dried spill: a tinted patch, darker along its outline."""
    distance = spot.blob(draws, spot.size * draws.uniform(0.13, 0.27), 0.9)
    colour = _contrasting(spot, draws, _LIQUIDS)
    strength = min(spot.contrast * draws.uniform(0.3, 0.65), 0.9)
    ring = ramp(0.05 - np.abs(distance + 0.025), 0.0, 0.05)
    share = ramp(-distance, -0.012, 0.02) * (0.75 + 0.25 * ring) * strength
    return _repaint(spot, colour, share)


def contamination(spot: Spot, draws: Draws) -> Array:
    """Bits of foreign matter scattered over the place."""
    colour = _contrasting(spot, draws, _DIRT)
    spread = spot.size * draws.uniform(0.08, 0.26)
    distance = np.full(spot.shape, 9.0)
    for _ in range(draws.integer(3, 10)):
        away, angle = spread * float(np.sqrt(draws.uniform(0.0, 1.0))), draws.uniform(0.0, 6.283)
        bit, flat = spot.size * draws.uniform(0.022, 0.06), draws.uniform(0.5, 1.0)
        turn = draws.uniform(0.0, np.pi)
        cos, sin = float(np.cos(turn)), float(np.sin(turn))
        dx, dy = spot.x - away * float(np.cos(angle)), spot.y - away * float(np.sin(angle))
        along, across = cos * dx + sin * dy, (cos * dy - sin * dx) / flat
        angular = np.maximum(np.abs(along) + 0.5 * np.abs(across), np.abs(across) + 0.35 * np.abs(along))
        distance = np.minimum(distance, angular - bit)
    toward = spot.x * spot.light[0] + spot.y * spot.light[1]
    lit = colour * (1.0 + 0.35 * np.sin(40.0 * toward))
    return _repaint(spot, lit, spot.inside(distance) * draws.uniform(0.75, 0.95))


def dent(spot: Spot, draws: Draws) -> Array:
    """A hollow or a bump that only the light shows."""
    radius = spot.size * draws.uniform(0.12, 0.24)
    turn, flat = draws.uniform(0.0, np.pi), draws.uniform(0.55, 1.0)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    along, across = cos * spot.x + sin * spot.y, (cos * spot.y - sin * spot.x) / flat
    inside = np.maximum(1.0 - (along * along + across * across) / (radius * radius), 0.0)
    slope = (spot.x * spot.light[0] + spot.y * spot.light[1]) / radius
    strength = draws.sign() * min(spot.contrast * draws.uniform(0.35, 0.75), 2.0)
    after = spot.before.copy()
    factor = 1.0 + strength * slope * inside * (1.0 + inside)
    after[:3] = (after[:3] + 0.04) * factor - 0.04
    return after


def fibre(spot: Spot, draws: Draws) -> Array:
    """A curled thread lying on the product, with its shadow."""
    count = 14
    path = walk(draws, spot.size * draws.uniform(0.7, 1.2), 0.55, count)
    colour = _contrasting(spot, draws, _DIRT)
    width = np.full(count, max(draws.uniform(0.016, 0.03), 0.9 * spot.px))
    shadow = spot.inside(spot.line(path - np.array(spot.light) * 0.025, width))
    after = spot.before.copy()
    after[:3] *= 1.0 - 0.35 * shadow
    after[:3] += (colour - after[:3]) * spot.inside(spot.line(path, width))
    return after


def discolouration(spot: Spot, draws: Draws) -> Array:
    """Subtle: a faint cloudy patch of another hue."""
    distance = spot.blob(draws, spot.size * draws.uniform(0.2, 0.34), 0.8)
    hue = draws.array(3).reshape(3, 1, 1) - 0.5
    hue = hue / float(np.abs(hue).max()) + draws.sign() * 0.5
    strength = min(spot.contrast * draws.uniform(0.045, 0.085), 0.35)
    after = spot.before.copy()
    after[:3] += hue * (strength * ramp(-distance, 0.0, 0.06)) * (0.4 + 0.8 * after[:3])
    return after


def hairline(spot: Spot, draws: Draws) -> Array:
    """Subtle: a very thin, nearly straight line of low contrast."""
    count = 6
    path = walk(draws, spot.size * draws.uniform(0.5, 1.0), 0.18, count)
    width = np.full(count, max(draws.uniform(0.009, 0.014), 0.7 * spot.px))
    after = spot.before.copy()
    after[:3] += spot.step(draws, 0.1, 0.18) * spot.inside(spot.line(path, width))
    return after
