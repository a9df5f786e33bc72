"""Graphs as ONNX files, and what describes them beside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components.base.export_mixin import utils

from ..files import write_atomically
from ..runtime.metadata import METADATA, read_entries
from .graphs import CLASS_INDEX, Exported, Graph, TowerGraph

# Before 18, resizing has no antialiasing in ONNX; torch's exporter knows no older one.
_OPSET = 18
_SMALL = (32, 32)  # pixels of the images that are traced


@torch.no_grad()
def write_onnx(
    graph: Graph | TowerGraph,
    path: Path,
    image_size: tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Trace a graph and write it, with images of any size or of this height and width, and a batch of any size.

    ``options`` are those of ``torch.onnx.export``, as anomalib's ``to_onnx`` takes them. A ModuleNotFoundError where
    onnxscript is missing.
    """
    given = dict(options or {})
    utils.get_onnx_dynamo_flag(given)
    device = next(chain(graph.parameters(), graph.buffers())).device
    examples = {name: example.to(device) for name, example in graph.examples(image_size or _SMALL).items()}
    names = utils.validate_input_names(given.pop("input_names", list(examples)))
    outputs = list(graph(*examples.values()))
    shapes = given.pop("dynamic_shapes", None)
    axes = given.pop("dynamic_axes", None)
    if shapes is None and axes is not None:
        shapes = utils.get_dynamic_shapes_from_axes(axes, names, outputs)
    if shapes is None:
        batch, sizes = torch.export.Dim("batch_size"), dict[int, torch.export.Dim]()
        if image_size is None:
            sizes = {number: torch.export.Dim(name) for number, name in enumerate(("height", "width"))}
        by_input = [
            {0: batch, **{axis: sizes[place] for place, axis in enumerate(graph.open_axes.get(name, ())) if sizes}}
            for name in examples
        ]
        # All in one variadic argument, but for a tower.
        shapes = tuple(by_input) if isinstance(graph, TowerGraph) else (tuple(by_input),)
    given = {"opset_version": _OPSET, "verbose": False} | given
    try:
        torch.onnx.export(
            graph,
            tuple(examples.values()),
            f=str(path),
            input_names=names,
            output_names=outputs,
            dynamo=True,
            dynamic_shapes=shapes,
            **given,
        )
    except ModuleNotFoundError as error:
        if "onnxscript" in str(error):
            utils.raise_missing_onnxscript_error(error)
        raise


def write_metadata(path: Path, source: Exported, decision: str | None, compression: Mapping[str, Any] | None) -> None:
    """Write what a graph is beside its file, into ``metadata.json``, where other files of the folder have entries too.

    Args:
        path: File of the graph.
        source: What it was made of.
        decision: Name of the file with the graph that decides on what tiles are put together to.
        compression: What compression has changed.
    """
    entry = {
        "package": f"anomalib-aprilgan {version('anomalib-aprilgan')}",
        "classes": list(source.classes),
        "inputs": ["input", *([CLASS_INDEX] if source.has_index else [])],
        "image_size": list(source.model.settings.architecture.image_size),
        "tile_size": None if source.tiles is None else source.tiles[0],
        "tile_overlap": None if source.tiles is None else source.tiles[1],
        "decision": decision,
        "compression": None if compression is None else dict(compression),
    }
    file = path.parent / METADATA
    content = json.dumps(read_entries(file) | {path.name: entry}, indent=1, ensure_ascii=False)
    write_atomically(file, lambda opened: opened.write(content.encode()))
