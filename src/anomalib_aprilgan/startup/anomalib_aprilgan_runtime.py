"""Exported models where neither torch nor anomalib is installed, or need not be loaded.

``Inferencer`` runs what an export wrote with numpy, and OpenVINO or ONNX Runtime; see ``anomalib_aprilgan.runtime``.
"""

import _anomalib_aprilgan_startup

if "anomalib_aprilgan" not in _anomalib_aprilgan_startup.sys.modules:
    _anomalib_aprilgan_startup.is_light = True

from anomalib_aprilgan.runtime import Inferencer, Prediction  # after it is known that no model is needed

__all__ = ["Inferencer", "Prediction"]
