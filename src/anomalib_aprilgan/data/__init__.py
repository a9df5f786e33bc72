"""Datamodules: auxiliary training data, and many categories in one run."""

from .auxiliary import AuxiliaryData
from .categories import MultiCategoryData

__all__ = ["AuxiliaryData", "MultiCategoryData"]
