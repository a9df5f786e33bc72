"""Exported models where neither torch nor anomalib is installed: numpy, and OpenVINO or ONNX Runtime.

``Inferencer`` runs what an export wrote. ``values`` and ``changes`` read and change its bounds and thresholds.
"""

from .inferencer import Inferencer, Prediction

__all__ = ["Inferencer", "Prediction"]
