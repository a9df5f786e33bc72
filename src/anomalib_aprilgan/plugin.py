"""Making the model and the datamodules known to anomalib's CLI, ``get_model`` and ``benchmark``.

anomalib 2.7 loads no plug-ins. Its CLI knows every subclass that was imported, ``get_model`` and
``benchmark`` look names up as attributes of ``anomalib.models`` and ``anomalib.data``. The
start-up hook in ``startup/`` sees to it that this package is imported whenever anomalib's models are.
"""

from __future__ import annotations

from importlib import import_module

from .data import AuxiliaryData, DrawnInspection
from .lightning_model import AprilGAN


def register() -> None:
    """Set the attributes that anomalib looks up. Harmless when repeated."""
    # Not `import anomalib.models`: while the hook runs, the parent package has no such attribute yet.
    setattr(import_module("anomalib.models"), AprilGAN.__name__, AprilGAN)
    for datamodule in (AuxiliaryData, DrawnInspection):
        setattr(import_module("anomalib.data"), datamodule.__name__, datamodule)
