"""A model in fewer bits: compressed, compared with the original on normal images, its thresholds set again."""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openvino as ov
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from torch import Tensor, nn

from ..clip.backbone import ClipBackbone, VisionOutput
from ..decision.post_processing import AprilGANPostProcessor
from ..preparation import Workplace
from ..preparation.decision import calibrate
from ..runtime.openvino_core import core
from ..timing import measure
from .graphs import IMAGE_FEATURE, TOWER_INPUT, Exported, HeadGraph, Model, PreparationGraph, TowerGraph
from .int8 import linear_layers, products_of_inputs, quantised
from .normal_images import NormalImages, normal_images
from .openvino_graphs import converted, joined, runner, save

logger = logging.getLogger(__name__)

_MOST_IN_ALL = 32  # images that weights are rounded with
_ROUNDS = 3  # of timing


class GraphBackbone(nn.Module):
    """A vision tower as a graph in the place of a ``ClipBackbone`` without text tower."""

    def __init__(self, backbone: ClipBackbone, tower: ov.Model) -> None:
        super().__init__()
        self.architecture, self.temperature = backbone.architecture, backbone.temperature
        self._run = runner(tower)

    def without_text(self) -> GraphBackbone:
        """This one: it has none."""
        return self

    def forward(self, images: Tensor, stages: Sequence[int]) -> VisionOutput:
        """See ``ClipBackbone``."""
        outputs = self._run(images)
        return VisionOutput([outputs[f"tokens_{stage}"] for stage in stages], outputs[IMAGE_FEATURE], tuple(stages))


@torch.no_grad()
def compressed(
    model: Model,
    source: Exported,
    kind: CompressionType | str,
    datamodule: AnomalibDataModule | None,
    image_size: tuple[int, int] | None,
    options: Mapping[str, Any],
) -> tuple[ov.Model, Exported, dict[str, Any]]:
    """A model's graph with its vision tower in fewer bits, what it is a graph of, and what has changed.

    ``source`` is what is exported of the model. The result has its thresholds set again: calibrated ones on the images
    that calibrated them, others moved by what good parts moved. See ``Exporting.to_openvino`` for errors.
    """
    kind = CompressionType(kind)
    if kind == CompressionType.INT8_ACQ:
        msg = (
            "`compression_type=INT8_ACQ` gives layers back to fp32 until labelled images lose no accuracy. Activations "
            "in fixed ranges cost this model's scores more than that at nearly every layer, so that nearly all would "
            "be given back. Use INT8_PTQ, whose ranges are those of each token, with the export option `max_flips`."
        )
        raise ValueError(msg)
    images, max_flips = normal_images(model, source, datamodule), model.export_options.max_flips
    if not images.number and (kind == CompressionType.INT8_PTQ or max_flips is not None):
        needs = f"`compression_type={kind.name}`" if max_flips is None else "the export option `max_flips`"
        msg = (
            f"{needs} needs normal images: pass a datamodule, the export option `images`, `calibration`, or references."
        )
        raise ValueError(msg)
    before = converted(PreparationGraph(source), image_size, **options)
    tower = converted(TowerGraph(source.model.model))
    layers, small = _small(tower, kind, source, images)
    twin = _twin(source, GraphBackbone(source.model.model.backbone, small))
    knows_all = len(source.classes) == len(model.made.classes)
    thresholds = {
        name: _moved(source, twin, row, images, knows_all=knows_all) for row, name in enumerate(source.classes)
    }
    changes = _changes(source, twin, images)
    after = replace(source, model=twin)
    head = converted(HeadGraph(after))
    whole = joined(before, small, head)
    report = {
        "type": kind.value,
        "layers": layers,
        "images": f"{images.number} from {images.source}" if images.number else "none",
        **changes,
        "thresholds": {name: values for name, values in thresholds.items() if values},
        "megabytes": {"before": _megabytes(tower, head), "after": _megabytes(small, head)},
        "seconds_of_tower": _seconds(source, {"before": tower, "after": small}),
    }
    _check_flips(report, max_flips)
    logger.info("Compressed to %s: %s", kind.value, report)
    return whole, after, report


def _small(tower: ov.Model, kind: CompressionType, source: Exported, images: NormalImages) -> tuple[int, ov.Model]:
    """The tower in fewer bits, and how many of its layers are."""
    if kind == CompressionType.FP16:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "tower.xml"
            save(tower, path, fp16=True)
            model: ov.Model = core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())
            return 0, model
    layers = linear_layers(tower)
    if not layers:
        msg = f"`compression_type={kind.name}`: this vision tower has no linear layer over tokens. Use FP16."
        raise ValueError(msg)
    pairs = [(image, row) for row, own in images.of_rows.items() for image in own]
    chosen = pairs[:: max(1, -(-len(pairs) // _MOST_IN_ALL))]
    products = products_of_inputs(tower, layers, [_tower_input(source, *pair) for pair in chosen])
    return len(layers), quantised(tower, layers, products, activations=kind == CompressionType.INT8_PTQ)


def _tower_input(source: Exported, image: Tensor, row: int) -> Tensor:
    """An image as the vision tower gets it."""
    device = source.model.device
    rows = [torch.tensor([row], device=device)] if source.has_index else []
    found: Tensor = PreparationGraph(source)(image.to(device), *rows)[TOWER_INPUT]
    return found.cpu()


def _twin(source: Exported, backbone: GraphBackbone) -> Model:
    """The model with another tower, whose decisions can be changed while those of the original stay."""
    twin = copy.copy(source.model)
    network = source.model.model.of_rows(range(len(source.classes)))
    network.attach_backbone(backbone)
    vars(twin)["_modules"] = vars(source.model)["_modules"] | {"model": network}
    twin.made = replace(source.model.made, rows=copy.deepcopy(source.model.made.rows))
    twin.post_processor = copy.deepcopy(source.model.post_processor)
    return twin


def _moved(
    source: Exported, twin: Model, row: int, images: NormalImages, *, knows_all: bool
) -> dict[str, dict[str, float]]:
    """Set the thresholds of a class again; returns them before and after.

    They are calibrated again where the images of each class can be told, as in the model: where it ``knows_all``
    classes. Else, and in tiles, they move as the scores of whole images do.
    """
    post_processor = twin.post_processor
    if not isinstance(post_processor, AprilGANPostProcessor) or not images.of_rows.get(row):
        return {}
    values = post_processor.of_class(row).values()
    before = {name: values[name] for name in ("image_threshold", "pixel_threshold")}
    calibration = twin.settings.how_to_calibrate
    recalibrated, is_calibrated = False, twin.made.rows[row].calibration is not None
    if calibration is not None and is_calibrated and source.tiles is None and knows_all:
        place, recipes = Workplace.of(twin, None), twin.made.rows[row]
        recipe, recipes.calibration = recipes.calibration, None
        try:
            calibrate(place, calibration, row)
            recalibrated = True
        except (FileNotFoundError, ValueError):  # its images are gone
            recipes.calibration = recipe
            post_processor.of_class(row).take(values)
    if not recalibrated:
        moves = [_statistics(twin, image, row) - _statistics(source.model, image, row) for image in images.of_rows[row]]
        by_image, by_pixel = torch.stack(moves).median(dim=0).values.tolist()
        new = {
            "image_threshold": before["image_threshold"] + by_image,
            "pixel_threshold": before["pixel_threshold"] + by_pixel,
        }
        post_processor.of_class(row).take(new)
    values = post_processor.of_class(row).values()
    return {name: {"before": value, "after": values[name]} for name, value in before.items()}


def _statistics(model: Model, image: Tensor, row: int) -> Tensor:
    """Raw score and map maximum of an image: ``(2,)``."""
    rows = torch.tensor([row], device=model.device)
    raw = model.predict(image.to(model.device), rows)
    fused = model.post_processor.fused(raw.text_probability, _map_statistic(model, raw.anomaly_map), rows)
    return torch.stack([fused[0], raw.anomaly_map.amax()])


def _map_statistic(model: Model, anomaly_map: Tensor) -> Tensor | None:
    post_processor = model.post_processor
    return post_processor.fusion.statistic(anomaly_map) if post_processor.fuse_map_maximum else None


def _changes(source: Exported, twin: Model, images: NormalImages) -> dict[str, Any]:
    """How many decisions have changed, and how much scores and maps, as they leave the model."""
    if not images.number:
        return {}
    flips, scores, maps = 0, list[float](), list[float]()
    for row, own in images.of_rows.items():
        rows = torch.tensor([row], device=twin.device)
        for image in own:
            on_device = image.to(twin.device)
            before, after = (model.decide(model.predict(on_device, rows), rows) for model in (source.model, twin))
            scores.append(float((after.pred_score - before.pred_score).abs()))
            maps.append(float((after.anomaly_map - before.anomaly_map).abs().mean()))
            flips += int(before.pred_label is not None and bool(before.pred_label != after.pred_label))
    return {
        "changed_decisions": flips,
        "share": flips / images.number,
        "score_change": {"mean": statistics.fmean(scores), "largest": max(scores)},
        "map_change": {"mean": statistics.fmean(maps), "largest_of_an_image": max(maps)},
    }


def _check_flips(report: Mapping[str, Any], most: float | None) -> None:
    if most is not None and report["share"] > most:
        msg = (
            f"Compression to {report['type']} changes {report['changed_decisions']} decisions on {report['images']} "
            f"({report['share']:.1%}), more than `max_flips={most}`. Nothing was written. Use FP16, or no compression."
        )
        raise ValueError(msg)


def _megabytes(*parts: ov.Model) -> float:
    """Size of the constants of graphs."""
    nodes = [node for part in parts for node in part.get_ops() if node.get_type_name() == "Constant"]
    return round(sum(float(node.get_byte_size()) for node in nodes) / 1e6, 3)


def _seconds(source: Exported, towers: Mapping[str, ov.Model]) -> dict[str, float]:
    """Median seconds of each tower with one image, in turn."""
    image = torch.zeros(1, 3, *source.model.settings.architecture.image_size)
    taken = measure({name: partial(runner(tower), image) for name, tower in towers.items()}, _ROUNDS)
    return {name: round(statistics.median(values), 5) for name, values in taken.items()}
