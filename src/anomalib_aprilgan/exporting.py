"""Exports of a model: one class to a graph whose only input is the image."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from anomalib.models.components import AnomalibModule

from .decision.post_processing import AprilGANPostProcessor


class Exporting:
    """Mix-in with anomalib's exports, each of a model of one class."""

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401  # anomalib's arguments, passed on
        """Export for anomalib's ``TorchInferencer``; see anomalib's ``ExportMixin.to_torch``."""
        model: Any = self
        model.make_ready("export")
        return AnomalibModule.to_torch(of_one_class(self), *args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401  # anomalib's mixin, not Lightning's
        """Export to ONNX; see anomalib's ``ExportMixin.to_onnx``."""
        model: Any = self
        model.make_ready("export")
        return AnomalibModule.to_onnx(of_one_class(self), *args, **kwargs)


def of_one_class(model: Any) -> Any:  # noqa: ANN401  # an AprilGAN, whose module is a layer above
    """A model of the default class, or of the only one, that shares tensors with this one; nothing here changes.

    A graph has one input, the image, so that anomalib's inferencers can run it. A model that inspects in tiles is a
    RuntimeError, several classes without a default one are a ValueError.
    """
    if model.settings.tile_size is not None:
        msg = (
            "`tile_size` cannot be exported: the tiles depend on the image. Export without it, and run the "
            "exported model on tiles with `anomalib_aprilgan.network.tiling.run_tiled`."
        )
        raise RuntimeError(msg)
    row = model.made.classes.default_row()
    one = copy.copy(model)
    vars(one)["_modules"] = dict(vars(model)["_modules"])  # a shallow copy shares the parts themselves
    one.model = model.model.of_row(row)
    one.made = replace(model.made, classes=model.made.classes.of_row(row), rows=model.made.rows[row : row + 1])
    if isinstance(model.post_processor, AprilGANPostProcessor):
        one.post_processor = model.post_processor.of_row(row)
    else:
        one.own_fusion = copy.deepcopy(model.own_fusion)
        one.own_fusion.set_rows([row], model.model.map_limit)
    return one
