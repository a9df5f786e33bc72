"""Datamodules: auxiliary training data, and drawn inspection data that need no download."""

from .auxiliary import AuxiliaryData
from .categories import MultiCategoryData
from .inspection import DrawnInspection

__all__ = ["AuxiliaryData", "DrawnInspection", "MultiCategoryData"]
