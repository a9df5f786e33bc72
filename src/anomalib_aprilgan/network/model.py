"""The network: CLIP, adapters and few-shot scorer, from images to raw predictions (arXiv:2305.17382, fig. 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from ..clip.backbone import ClipBackbone, VisionOutput
from ..running import full_precision
from .adapters import LinearAdapters
from .few_shot import FewShotScorer
from .roi import RegionsOfInterest, StackedRegions, within
from .scoring import (
    TEMPERATURE,
    accepted_share,
    mean_colour,
    smooth,
    text_logits,
    text_probability,
    text_probability_maps,
)
from .stacked_bank import for_graph


class RawPredictions(NamedTuple):
    """What the network says of a batch, before any fusion, scale or threshold; fp32.

    Zero-shot scores ``(B,)`` in ``[0, 1]``; maps ``(B, H, W)`` in ``[0, map_ceiling]`` of the network; and for each
    stage the normal and the anomalous probability ``(B, 2, H, W)``. The appearance ``(B, D + 3)`` of each image is
    CLIP's image feature, of unit length, and the mean colour; for images in tiles ``(B, 3)``, the colour alone.
    """

    text_probability: Tensor
    anomaly_map: Tensor
    stage_probabilities: Sequence[Tensor] = ()
    appearance: Tensor | None = None


class AprilGANModel(nn.Module):
    """Zero-shot and few-shot anomaly scores and maps from one vision pass per image.

    What is kept per class has a row: references in the few-shot scorer, and ``text_features`` ``(N, D, 2)``, so that a
    forward pass never needs the text tower. The frozen CLIP is attached later: it is large, and not needed to hold,
    count or optimise what is learned.

    Args:
        adapters: One linear map per stage.
        stages: Tapped blocks of the zero-shot map, ascending, counted from 1.
        few_shot: Compares images with references; ``None`` for a zero-shot model.
        smoothing_sigma: Standard deviation in pixels of the Gaussian that maps are smoothed with; 0 for none.
        temperature: What cosine similarities are multiplied with before the softmax; ``None`` for CLIP's own.
        roi: What is looked at of the images of each class; ``None`` where whole images are.
    """

    def __init__(
        self,
        adapters: LinearAdapters,
        stages: Sequence[int],
        few_shot: FewShotScorer | None = None,
        smoothing_sigma: float = 0.0,
        temperature: float | None = TEMPERATURE,
        roi: RegionsOfInterest | None = None,
    ) -> None:
        super().__init__()
        self.adapters, self.stages = adapters, tuple(stages)
        self.few_shot, self.smoothing_sigma, self._temperature = few_shot, smoothing_sigma, temperature
        self.roi = roi
        self.register_buffer("text_features", torch.empty(0))
        self.text_features: Tensor
        self._backbone: ClipBackbone | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AprilGANModel:
        features = self.text_features
        apply: Any = super()._apply
        apply(fn, recurse)
        self.text_features = features.to(self.text_features.device)  # in fp32 also where a model is converted
        return self

    @property
    def backbone(self) -> ClipBackbone:
        """The frozen CLIP; a RuntimeError if none was attached yet."""
        if self._backbone is None:
            msg = "The model has no CLIP yet: call `AprilGAN.setup('predict')` first."
            raise RuntimeError(msg)
        return self._backbone

    @property
    def has_backbone(self) -> bool:
        """Whether a CLIP was attached."""
        return self._backbone is not None

    def attach_backbone(self, backbone: ClipBackbone) -> None:
        """Give the model its frozen CLIP."""
        self._backbone = backbone

    @property
    def temperature(self) -> float:
        """What cosine similarities are multiplied with. CLIP's own has a bias at times, which cancels in a softmax."""
        return self.backbone.temperature if self._temperature is None else self._temperature

    @property
    def map_limit(self) -> float:
        """Highest value that a map can be expected to take."""
        return len(self.stages) + (0.0 if self.few_shot is None else self.few_shot.map_limit)

    @property
    def map_ceiling(self) -> float:
        """Value that no map can exceed."""
        return len(self.stages) + (0.0 if self.few_shot is None else self.few_shot.map_ceiling)

    def set_rows(self, text_features: Tensor, kept: Sequence[int | None]) -> None:
        """Replace the classes by those of text features ``(N, D, 2)``, unit columns: normal, anomalous.

        Each takes over the references and region of interest of the row named in ``kept``, and none for ``None``.
        """
        self.text_features = text_features
        for part in (self.few_shot, self.roi):
            if part is not None:
                part.set_rows(kept)

    def of_rows(self, rows: Sequence[int]) -> AprilGANModel:
        """A network of some of the classes, which shares tensors with this one and has no text tower.

        Its regions of interest are for images of any size.
        """
        few_shot = copy.copy(self.few_shot)
        roi = None if self.roi is None else self.roi.without_frames()
        some = AprilGANModel(self.adapters, self.stages, few_shot, self.smoothing_sigma, self._temperature, roi)
        some.text_features = self.text_features[list(rows)]
        some.attach_backbone(self.backbone.without_text())
        if some.few_shot is not None:
            some.few_shot._modules = dict(some.few_shot._modules)  # noqa: SLF001  # a shallow copy shares them
            some.few_shot.set_rows(list(rows))
        if some.roi is not None:
            some.roi.set_rows(list(rows))
        return some.train(self.training)

    def for_graph(self) -> AprilGANModel:
        """The same network, where there are several classes made to choose among them by rows within a graph."""
        twin = self.of_rows(range(len(self.text_features)))
        twin.few_shot = None if twin.few_shot is None else for_graph(twin.few_shot)
        if twin.roi is not None and len(self.text_features) > 1:
            twin.roi = StackedRegions(twin.roi, self.backbone.architecture.image_size)
        return twin

    def forward(self, images: Tensor, rows: Tensor | None = None) -> InferenceBatch:
        """Text probability as ``pred_score`` ``(B,)`` and ``anomaly_map`` ``(B, H, W)``, see ``predict``."""
        raw = self.predict(images, rows)
        return InferenceBatch(pred_score=raw.text_probability, anomaly_map=raw.anomaly_map)

    def predict(
        self,
        images: Tensor,
        rows: Tensor | None = None,
        without: Collection[int] = (),
        output: VisionOutput | None = None,
        *,
        few_shot: bool = True,
        masks: Tensor | None = None,
    ) -> RawPredictions:
        """Raw predictions of images: the one way to them, in training, inspection, calibration and exports.

        Args:
            images: ``(B, 3, H, W)``, resized and normalised.
            rows: ``(B,)`` the class of each image; not needed for a model of one class.
            without: Indices of remembered references to hold out.
            output: What ``encode`` made of the images, where that is known.
            few_shot: Whether references count.
            masks: ``(B, H, W)`` or ``(1, H, W)``, true where the images are looked at. All else is replaced before
                anything sees it, and 0 in the map: it changes no bit of the result.

        Raises:
            RuntimeError: CLIP, text features or references are missing.
            ValueError: There are several classes and no rows.
        """
        images = within(images, masks)
        output = self.encode(images) if output is None else output
        text_features = self._text_features_of(rows)
        with full_precision(images):
            probabilities = self._stage_probabilities(images, output, text_features)
            # The anomalous probability is summed over the stages; the authors do not average.
            anomaly_map = torch.stack([maps[:, 1] for maps in probabilities]).sum(dim=0)
            image_feature = output.image_feature.float()
            score = text_probability(image_feature, text_features, self.temperature)
            scorer = self.few_shot if few_shot else None
            compared = None if scorer is None else scorer.compare(images, output, rows, without)
            if compared is None or compared.accepted is None or compared.references is None:
                nearest = 0.0 if compared is None else compared.nearest
                anomaly_map = within(smooth(anomaly_map + nearest, self.smoothing_sigma), masks)
            else:
                # What accepted parts show is normal, also where the sentences say otherwise; the text's verdict on the
                # whole image counts as far as the map still shows what it is about.
                before = within(smooth(anomaly_map + compared.references, self.smoothing_sigma), masks)
                rest = anomaly_map * (1.0 - accepted_share(compared.references, compared.accepted))
                anomaly_map = within(smooth(rest + compared.nearest, self.smoothing_sigma), masks)
                score = score * (anomaly_map.amax(dim=(1, 2)) / before.amax(dim=(1, 2)).clamp(min=1e-6))
            appearance = torch.cat([F.normalize(image_feature, dim=-1), mean_colour(images)], dim=1)
        return RawPredictions(score, anomaly_map, probabilities, appearance)

    def stage_probabilities(
        self, images: Tensor, rows: Tensor | None = None, output: VisionOutput | None = None
    ) -> list[Tensor]:
        """Probability maps ``(B, 2, H, W)`` of every stage, with gradients for the adapters; see ``predict``."""
        output = self.encode(images) if output is None else output
        with full_precision(images):
            return self._stage_probabilities(images, output, self._text_features_of(rows))

    @property
    def tapped(self) -> list[int]:
        """The stages of the tower that anyone needs, ascending."""
        return sorted({*self.stages, *(() if self.few_shot is None else self.few_shot.stages)})

    @torch.no_grad()
    def encode(self, images: Tensor) -> VisionOutput:
        """One pass of the frozen tower over all stages that anyone needs."""
        output: VisionOutput = self.backbone(images, self.tapped)
        return output

    def _stage_probabilities(self, images: Tensor, output: VisionOutput, text_features: Tensor) -> list[Tensor]:
        features = self.adapters([output.tokens_of(stage) for stage in self.stages])
        shapes, size = self.backbone.architecture.shapes_of(self.stages), (images.shape[-2], images.shape[-1])
        return [
            text_probability_maps(text_logits(stage, text_features, self.temperature), shape.grid, size)
            for stage, shape in zip(features, shapes, strict=True)
        ]

    def _text_features_of(self, rows: Tensor | None) -> Tensor:
        """``(B, D, 2)``, or ``(D, 2)`` where every image is of the one class."""
        number = len(self.text_features)
        if not number:
            msg = "The model has no text features yet: call `AprilGAN.setup('predict')` first."
            raise RuntimeError(msg)
        if number == 1:
            return self.text_features[0].float()
        if rows is None:
            msg = f"`rows` are needed to choose among {number} classes, got None."
            raise ValueError(msg)
        return self.text_features.index_select(0, rows).float()
