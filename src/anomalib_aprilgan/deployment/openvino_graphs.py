"""Graphs in OpenVINO: converted, put together, run, written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor

from ..files import temporary_folder
from ..runtime.openvino_core import compiled
from .graphs import Graph, TowerGraph
from .writing import write_onnx


def converted(
    graph: Graph | TowerGraph,
    image_size: tuple[int, int] | None = None,
    onnx: Mapping[str, Any] | None = None,
    openvino: Mapping[str, Any] | None = None,
) -> ov.Model:
    """A graph as OpenVINO's; see ``write_onnx``. ``openvino`` are options of ``openvino.convert_model``."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        write_onnx(graph, path, image_size, onnx)
        model: ov.Model = ov.convert_model(path, **(openvino or {}))
        return model.clone()  # whose constants do not lie in the file


def joined(*parts: ov.Model) -> ov.Model:
    """One graph of several, whose inputs are outputs of those before, or inputs of the whole, by name."""
    sources: dict[str, Any] = {}
    parameters = []
    for part in (one.clone() for one in parts):
        for parameter in part.get_parameters():
            name = name_of(parameter.output(0))
            if name in sources:
                parameter.output(0).replace(sources[name])
            else:
                sources[name] = parameter.output(0)
                parameters.append(parameter)
        results = part.get_results()
        sources |= {name_of(result.output(0)): result.input_value(0) for result in results}
    return ov.Model(results, parameters, "AprilGAN")


def runner(model: ov.Model) -> Callable[..., dict[str, Tensor]]:
    """A function from inputs to the outputs of a graph by name, in fp32 on the CPU."""
    run = compiled(model)
    names = [name_of(output) for output in model.outputs]

    def outputs(*values: Tensor) -> dict[str, Tensor]:
        found = run([np.ascontiguousarray(value.detach().cpu().numpy()) for value in values])
        device = values[0].device
        return {name: torch.from_numpy(np.array(found[place])).to(device) for place, name in enumerate(names)}

    return outputs


def save(model: ov.Model, path: Path, *, fp16: bool = False) -> None:
    """Write a graph as ``.xml`` and ``.bin``, whole or not at all; weights in fp16 if asked for."""
    with temporary_folder(path.parent) as folder:
        ov.save_model(model, folder / path.name, compress_to_fp16=fp16)
        for suffix in (".bin", ".xml"):
            (folder / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))


def name_of(output: ov.Output) -> str:
    """Name of an input or output of a graph."""
    return str(next(iter(sorted(output.get_names()))))
