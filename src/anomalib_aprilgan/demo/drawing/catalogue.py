"""What can be drawn: the categories and the defect kinds, with the functions that draw them."""

from collections.abc import Callable
from dataclasses import dataclass

from . import (
    assemblies,
    invented_objects,
    invented_textures,
    metal_objects,
    natural_textures,
    objects,
    regular_textures,
    structural_defects,
    surface_defects,
)
from .canvas import Canvas
from .draws import Array, Draws
from .spot import Spot

Drawer = Callable[[Draws, Draws, Canvas], Array]
Damager = Callable[[Spot, Draws], Array]

# Drawer, and the largest turn from picture to picture in radians.
TEXTURE_DRAWERS: dict[str, tuple[Drawer, float]] = {
    "brick": (regular_textures.brick, 0.05),
    "brushed_metal": (natural_textures.brushed_metal, 0.04),
    "carpet": (regular_textures.carpet, 0.08),
    "fabric": (regular_textures.fabric, 0.06),
    "grid": (regular_textures.grid, 0.06),
    "leather": (natural_textures.leather, 0.4),
    "marble": (natural_textures.marble, 0.4),
    "terrazzo": (natural_textures.terrazzo, 0.4),
    "tile": (regular_textures.tile, 0.06),
    "wood": (natural_textures.wood, 0.05),
}
OBJECT_DRAWERS: dict[str, tuple[Drawer, float]] = {
    "bearing": (metal_objects.bearing, 3.14159),
    "bottle_cap": (metal_objects.bottle_cap, 3.14159),
    "button": (objects.button, 3.14159),
    "cable": (assemblies.cable, 0.3),
    "capsule": (objects.capsule, 0.5),
    "chip": (assemblies.chip, 0.15),
    "connector": (assemblies.connector, 0.1),
    "cookie": (objects.cookie, 3.14159),
    "gear": (metal_objects.gear, 3.14159),
    "nut": (metal_objects.nut, 3.14159),
    "pill": (objects.pill, 0.5),
    "screw": (metal_objects.screw, 3.14159),
    "washer": (metal_objects.washer, 3.14159),
    "zipper": (assemblies.zipper, 0.03),
}
# To learn from, beside the categories: each name gives other products.
INVENTED_TEXTURE_DRAWERS: dict[str, tuple[Drawer, float]] = {
    f"invented_texture_{number}": (invented_textures.invented_texture, 0.1) for number in range(10)
}
INVENTED_OBJECT_DRAWERS: dict[str, tuple[Drawer, float]] = {
    f"invented_object_{number}": (invented_objects.invented_object, 3.14159) for number in range(10)
}


@dataclass(frozen=True)
class Kind:
    """How a defect is made: its drawer, half the window in picture units, whether it sits on an outline."""

    damage: Damager
    reach: float
    at_edge: bool = False


KINDS = {
    "bent": Kind(structural_defects.bent, 0.5, at_edge=True),
    "blur": Kind(structural_defects.blur, 0.6, at_edge=True),
    "contamination": Kind(surface_defects.contamination, 0.36),
    "crack": Kind(surface_defects.crack, 0.6),
    "dent": Kind(surface_defects.dent, 0.26),
    "discolouration": Kind(surface_defects.discolouration, 0.5),
    "fibre": Kind(surface_defects.fibre, 0.7),
    "hairline": Kind(surface_defects.hairline, 0.7),
    "hole": Kind(surface_defects.hole, 0.26),
    "misaligned": Kind(structural_defects.misaligned, 2.0),
    "missing_piece": Kind(structural_defects.missing_piece, 0.44, at_edge=True),
    "rotated_patch": Kind(structural_defects.rotated_patch, 0.36),
    "scratch": Kind(surface_defects.scratch, 0.6),
    "stain": Kind(surface_defects.stain, 0.48),
}

TEXTURES: tuple[str, ...] = tuple(TEXTURE_DRAWERS)
OBJECTS: tuple[str, ...] = tuple(OBJECT_DRAWERS)
CATEGORIES: tuple[str, ...] = tuple(sorted(TEXTURES + OBJECTS))
DEFECTS: tuple[str, ...] = tuple(KINDS)
INVENTIONS: tuple[str, ...] = tuple(INVENTED_TEXTURE_DRAWERS | INVENTED_OBJECT_DRAWERS)
