"""Datamodules: auxiliary training data, and many categories in one run."""

from .datamodules import AuxiliaryData, MultiCategoryData

__all__ = ["AuxiliaryData", "MultiCategoryData"]
