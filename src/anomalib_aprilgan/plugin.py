"""Making the model and the datamodules known to anomalib's CLI, ``get_model`` and ``benchmark``.

anomalib 2.7 loads no plug-ins. Its CLI knows every subclass that was imported, ``get_model`` and
``benchmark`` look names up as attributes of ``anomalib.models`` and ``anomalib.data``. The
start-up hook in ``startup/`` sees to it that this package is imported whenever anomalib's models are.
"""

from __future__ import annotations

from importlib import import_module

from . import data
from .clip.architecture import BUILT_IN_CLIPS
from .data import AuxiliaryData, MultiCategoryData
from .demo.built_in import CLIP
from .demo.inspection import DrawnInspection
from .lightning_model import AprilGAN


def register() -> None:
    """Set the attributes that anomalib looks up. Harmless when repeated."""
    # Not `import anomalib.models`: while the hook runs, the parent package has no such attribute yet.
    setattr(import_module("anomalib.models"), AprilGAN.__name__, AprilGAN)
    BUILT_IN_CLIPS[CLIP.architecture] = CLIP
    data.DrawnInspection = DrawnInspection  # type: ignore[attr-defined]  # where configs of 0.1.0 name it
    for datamodule in (AuxiliaryData, DrawnInspection, MultiCategoryData):
        setattr(import_module("anomalib.data"), datamodule.__name__, datamodule)
