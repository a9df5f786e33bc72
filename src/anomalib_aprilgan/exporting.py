"""anomalib's exports of a model: to torch, ONNX and OpenVINO."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from torchmetrics import Metric

from .deployment.graphs import DecisionGraph, Exported, ImageGraph, exported
from .deployment.options import ExportOptions
from .deployment.writing import write_metadata, write_onnx


class Exporting:
    """Mix-in with anomalib's exports, of one class or of all; ``metadata.json`` beside a graph describes it.

    A model that inspects in tiles becomes two graphs: of the tiles, and of the decision on what they are put together
    to. ``anomalib_aprilgan.runtime.Inferencer`` runs both.
    """

    export_options: ExportOptions

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export for anomalib's ``TorchInferencer``; see anomalib's ``ExportMixin.to_torch``."""
        source = self._exported()
        if source.tiles is not None:
            msg = "`tile_size` cannot be exported to torch: anomalib's inferencer cuts no tiles. Export to ONNX."
            raise RuntimeError(msg)
        path: Path = AnomalibModule.to_torch(source.model, export_root, model_file_name)
        write_metadata(path, source, None, None)
        return path

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **options: object,
    ) -> Path:
        """Export to ONNX; see anomalib's ``ExportMixin.to_onnx``."""
        source = self._exported()
        path = _folder(export_root, "onnx") / f"{model_file_name}.onnx"
        write_onnx(ImageGraph(source), path, input_size, options)
        decision = None
        if source.tiles is not None:
            decision = f"{model_file_name}.decision.onnx"
            write_onnx(DecisionGraph(source), path.parent / decision)
        write_metadata(path, source, decision, None)
        return path

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: object = None,
        max_drop: float = 0.01,
        ov_kwargs: Mapping[str, Any] | None = None,
        onnx_kwargs: Mapping[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO; see anomalib's ``ExportMixin.to_openvino``.

        A compressed model is compared with this one on normal images: those of the datamodule, or of the export option
        ``images``, or of ``calibration``, or the references. Its thresholds are set again. ``metadata.json`` tells what
        has changed. ``INT8_PTQ`` quantises the linear layers of CLIP's vision tower; see ``deployment.int8``.

        Raises:
            ModuleNotFoundError: OpenVINO is missing.
            ValueError: ``INT8_ACQ`` is asked for, there are no images to quantise with, or more decisions changed than
                the option ``max_flips`` allows; nothing is written.
        """
        del metric, task, max_drop  # of INT8_ACQ
        source = self._exported()
        if importlib.util.find_spec("openvino") is None:
            msg = 'OpenVINO is missing: pip install "anomalib-aprilgan[openvino]"'
            raise ModuleNotFoundError(msg, name="openvino")
        from .deployment import compression, openvino_graphs  # optional

        options: dict[str, Any] = {"onnx": dict(onnx_kwargs or {}), "openvino": dict(ov_kwargs or {})}
        report = None
        if compression_type is None:
            graph = openvino_graphs.converted(ImageGraph(source), input_size, **options)
        else:
            graph, source, report = compression.compressed(
                self, source, compression_type, datamodule, input_size, options
            )
        decision = None if source.tiles is None else openvino_graphs.converted(DecisionGraph(source), None)
        folder, name = _folder(export_root, "openvino"), None
        if decision is not None:
            name = f"{model_file_name}.decision.xml"
            openvino_graphs.save(decision, folder / name)
        path = folder / f"{model_file_name}.xml"
        openvino_graphs.save(graph, path)
        write_metadata(path, source, name, report)
        return path

    def _exported(self) -> Exported:
        """What is exported of the model, which is made ready."""
        model: Any = self
        model.make_ready("export")
        return exported(model, class_index=self.export_options.class_index)


def _folder(root: Path | str, kind: str) -> Path:
    """The folder of an export, which is made, as anomalib names it."""
    folder = Path(root) / "weights" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder
