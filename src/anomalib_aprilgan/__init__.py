"""APRIL-GAN, zero-/few-shot anomaly detection with CLIP, as an anomalib model (arXiv:2305.17382).

Importing the package makes ``AprilGAN`` and its datamodules known to anomalib.
"""

from . import plugin
from .data import AuxiliaryData, MultiCategoryData
from .demo.inspection import DrawnInspection
from .lightning_model import AprilGAN

__all__ = ["AprilGAN", "AuxiliaryData", "DrawnInspection", "MultiCategoryData"]

plugin.register()
