"""APRIL-GAN, zero-/few-shot anomaly detection with CLIP, as an anomalib model (arXiv:2305.17382).

Importing the package makes ``AprilGAN`` and its datamodules known to anomalib. The command ``anomalib-aprilgan`` and
``anomalib_aprilgan_runtime`` put that off until a model is asked for: torch and anomalib's models take seconds, or are
not there.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data import AuxiliaryData, MultiCategoryData
    from .demo.inspection import DrawnInspection
    from .lightning_model import AprilGAN

__all__ = ["AprilGAN", "AuxiliaryData", "DrawnInspection", "MultiCategoryData"]


def __getattr__(name: str) -> object:
    """One of the public names, which are attributes from then on."""
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    plugin = import_module(".plugin", __name__)
    plugin.register()
    globals().update({public: getattr(plugin, public) for public in __all__})
    return globals()[name]


if not getattr(sys.modules.get("_anomalib_aprilgan_startup"), "is_light", False):
    __getattr__("AprilGAN")
