"""What is exported of a model: modules of tensors alone, for torch's exporter."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from ..clip.backbone import VisionOutput
from ..data.pre_processing import prepared
from ..decision.post_processing import AprilGANPostProcessor
from ..network.model import AprilGANModel, RawPredictions
from ..network.roi import within

Model = Any  # an AprilGAN, which is a layer above
CLASS_INDEX, TOWER_INPUT, IMAGE_FEATURE = "class_index", "tower_input", "image_feature"


@dataclass(frozen=True)
class Exported:
    """A model as it is exported, which shares tensors with the one it is made of.

    Attributes:
        model: An AprilGAN, of one class or of all, without its text tower, for whole images.
        tiles: Side in pixels and overlap of the tiles that it is given; ``None`` for whole images.
        has_index: Whether the row of each image is an input.
    """

    model: Model
    tiles: tuple[int, float] | None
    has_index: bool

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by row."""
        names: tuple[str, ...] = self.model.made.classes.names
        return names


def exported(model: Model, *, class_index: bool = False) -> Exported:
    """What is exported of an AprilGAN that is ready: all classes, or the default one, or the only one.

    Raises:
        ValueError: There are several classes and neither a default one nor ``class_index``, or tiles and a region of
            interest.
    """
    settings, classes = model.settings, model.made.classes
    if settings.tile_size is not None and model.model.roi is not None:
        msg = "`roi` cannot be exported with `tile_size`: export without one of them."
        raise ValueError(msg)
    rows = list(range(len(classes))) if class_index else [classes.default_row()]
    some = copy.copy(model)
    vars(some)["_modules"] = dict(vars(model)["_modules"])  # a shallow copy shares the parts themselves
    some.model, ours = model.model.of_rows(rows), isinstance(model.post_processor, AprilGANPostProcessor)
    some.settings = replace(settings, tile_size=None)
    kept = classes if class_index else classes.of_row(rows[0])
    some.made = replace(model.made, classes=kept, rows=[model.made.rows[row] for row in rows])
    if ours and not class_index:
        some.post_processor = model.post_processor.of_row(rows[0])
    elif not ours:
        some.own_fusion = copy.deepcopy(model.own_fusion)
        some.own_fusion.set_rows(rows, model.model.map_limit)
    tiles = None if settings.tile_size is None else (settings.tile_size, settings.tile_overlap)
    return Exported(some, tiles, class_index)


class Graph(nn.Module):
    """Base of what is traced: a model whose parts are made for graphs, from tensors to tensors by name.

    Rows are brought into their range. An image whose row is that of no class gets NaN as its score and map, and counts
    as anomalous.
    """

    def __init__(self, source: Exported) -> None:
        super().__init__()
        self.classes, self.has_index, self.of_tiles = source.classes, source.has_index, source.tiles is not None
        model = copy.copy(source.model)
        vars(model)["_modules"] = vars(source.model)["_modules"] | {"model": source.model.model.for_graph()}
        if isinstance(model.post_processor, AprilGANPostProcessor):
            model.post_processor = model.post_processor.for_graph()
        self.model = model
        self.eval()

    def examples(self, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """Inputs by name, of two images of this height and width in pixels; of all but fixed sizes."""
        examples = self._examples(image_size)
        return examples | ({CLASS_INDEX: torch.zeros(2, dtype=torch.long)} if self.has_index else {})

    def _examples(self, image_size: tuple[int, int]) -> dict[str, Tensor]:
        return {"input": torch.zeros(2, 3, *image_size)}

    @property
    def open_axes(self) -> dict[str, tuple[int, ...]]:
        """Which axes of an input, beside the first one, are of any size."""
        return {"input": (2, 3)}

    def _split(self, values: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Inputs without rows, and the rows."""
        return (list(values[:-1]), values[-1]) if self.has_index else (list(values), None)

    def _rows(self, class_index: Tensor | None) -> Tensor | None:
        return None if class_index is None else class_index.clamp(0, len(self.classes) - 1)

    def _decided(self, text_probability: Tensor, anomaly_map: Tensor, class_index: Tensor | None) -> dict[str, Tensor]:
        """Scores and labels ``(B,)``, maps and masks ``(B, h, w)``, as they leave the model."""
        raw = RawPredictions(text_probability, anomaly_map)
        decided: InferenceBatch = self.model.decide(raw, self._rows(class_index))
        found = {name: value for name, value in decided._asdict().items() if value is not None}
        if class_index is None:
            return found
        # Last of all: run times differ in what they make of NaN on its way.
        known = (class_index >= 0) & (class_index < len(self.classes))
        by_images = {name: known.view(-1, *[1] * (value.ndim - 1)) for name, value in found.items()}
        return {
            name: value | ~by_images[name]
            if value.dtype == torch.bool
            else torch.where(by_images[name], value, torch.nan)
            for name, value in found.items()
        }

    def _left(self, raw: RawPredictions, class_index: Tensor | None) -> dict[str, Tensor]:
        """What leaves a graph of images, or of tiles, which are decided on together."""
        if self.of_tiles:
            return {"text_probability": raw.text_probability, "raw_map": raw.anomaly_map}
        return self._decided(raw.text_probability, raw.anomaly_map, class_index)


class ImageGraph(Graph):
    """From images ``(B, 3, H, W)`` of any size to what anomalib's inferencers expect; from tiles to raw predictions."""

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """Scores and labels ``(B,)``, maps and masks ``(B, h, w)`` at the model's image size."""
        (images,), class_index = self._split(values)
        return self._left(self.model.predict(images, self._rows(class_index)), class_index)


class DecisionGraph(Graph):
    """From raw predictions of images, put together of those of tiles, to what leaves the model."""

    def _examples(self, image_size: tuple[int, int]) -> dict[str, Tensor]:
        return {"text_probability": torch.zeros(2), "raw_map": torch.zeros(2, *image_size)}

    @property
    def open_axes(self) -> dict[str, tuple[int, ...]]:
        """See the base class."""
        return {"raw_map": (1, 2)}

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """Scores and labels ``(B,)``, maps and masks ``(B, H, W)``."""
        (text_probability, raw_map), class_index = self._split(values)
        return self._decided(text_probability, raw_map, class_index)


class PreparationGraph(Graph):
    """The first part of an ``ImageGraph``: from images to what CLIP's vision tower gets."""

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """Normalised images ``(B, 3, h, w)`` within their regions of interest."""
        (images,), class_index = self._split(values)
        ready, roi = prepared(self.model.pre_processor, images), self.model.model.roi
        masks = None if roi is None else roi.masks(self._rows(class_index), (ready.shape[-2], ready.shape[-1]))
        return {TOWER_INPUT: within(ready, masks)}


class TowerGraph(nn.Module):
    """The second part: from what a vision tower gets to what it makes of it."""

    has_index = False
    open_axes: Mapping[str, tuple[int, ...]] = {}

    def __init__(self, network: AprilGANModel) -> None:
        super().__init__()
        self.backbone, self.tapped = network.backbone, network.tapped
        self.eval()

    def examples(self, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """See ``Graph``; the size is the tower's own."""
        del image_size
        return {TOWER_INPUT: torch.zeros(2, 3, *self.backbone.architecture.image_size)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Patch tokens ``(B, L, C)`` of every stage, features ``(B, D)``."""
        output = self.backbone(images, self.tapped)
        names = [*(f"tokens_{stage}" for stage in self.tapped), IMAGE_FEATURE]
        return dict(zip(names, (*output.patch_tokens, output.image_feature), strict=True))


class HeadGraph(Graph):
    """The last part: from inputs and outputs of a vision tower to what an ``ImageGraph`` gives."""

    def _examples(self, image_size: tuple[int, int]) -> dict[str, Tensor]:
        del image_size  # the model's own
        network = self.model.model
        architecture = network.backbone.architecture
        images = torch.zeros(2, 3, *architecture.image_size)
        shapes = dict(zip(network.tapped, architecture.shapes_of(network.tapped), strict=True))
        tokens = {f"tokens_{stage}": torch.zeros(2, math.prod(s.grid), s.width) for stage, s in shapes.items()}
        return {TOWER_INPUT: images, **tokens, IMAGE_FEATURE: torch.zeros(2, architecture.embed_dim)}

    @property
    def open_axes(self) -> dict[str, tuple[int, ...]]:
        """See the base class."""
        return {}

    def forward(self, *values: Tensor) -> dict[str, Tensor]:
        """See ``ImageGraph``."""
        (images, *tokens, feature), class_index = self._split(values)
        output = VisionOutput(tokens, feature, tuple(self.model.model.tapped))
        raw = self.model.predict(images, self._rows(class_index), output=output, is_prepared=True)
        return self._left(raw, class_index)
