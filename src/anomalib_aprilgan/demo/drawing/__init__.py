"""Procedurally drawn product pictures with exact defect masks."""

from .catalogue import CATEGORIES, DEFECTS, INVENTIONS, OBJECTS, TEXTURES
from .contact import contact_sheet
from .folder import write_category
from .product import Twins, check_drawing, draw_good, draw_twins

__all__ = [
    "CATEGORIES",
    "DEFECTS",
    "INVENTIONS",
    "OBJECTS",
    "TEXTURES",
    "Twins",
    "check_drawing",
    "contact_sheet",
    "draw_good",
    "draw_twins",
    "write_category",
]
