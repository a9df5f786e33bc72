"""OpenVINO's core, one for the whole process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino

# OpenVINO computes in bf16 by itself where a CPU has instructions for it; scores would not be those of the model.
FULL_PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


@cache
def core() -> openvino.Core:
    """The core that everything here shares; it lives as long as the process.

    Each core that has used the CPU sets a stack for signal handlers and frees it at its end. Where several end in the
    order they began in, the process is left with a stack that is gone, and the next signal with a handler ends it
    (openvino 2026.4: ``SigAltStackSetup`` of the CPU plugin).
    """
    import openvino

    return openvino.Core()


def compiled(model: object, device: str = "CPU", config: Mapping[str, Any] | None = None) -> openvino.CompiledModel:
    """A graph, or a file of one, ready to run; in fp32 unless ``config``, options of the device, says otherwise."""
    return core().compile_model(model, device, {**FULL_PRECISION, **(config or {})})
