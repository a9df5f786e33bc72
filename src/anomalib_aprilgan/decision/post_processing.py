"""From raw outputs to decisions: fusion of text and map, thresholds, and a scale without ties."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from ..class_rows import PREDICTIONS, class_index_of, part_of, rows_by_class
from ..distributed import align_metrics
from ..network.scoring import fused_score, map_statistic

# Share of the scale at either end that is kept for values beyond the bounds.
TAIL = 1e-3


class AprilGANPostProcessor(PostProcessor):
    """anomalib's post-processor with the fusion of the few-shot score and a strictly increasing scale.

    In validation it learns, as anomalib's does, the range and the best-F1 threshold of scores and
    maps. Until then documented defaults hold: scores are probabilities cut at 0.5, maps run from 0
    to ``map_limit`` and are cut in the middle. All of it lives in buffers, which checkpoints and
    exports carry.

    The few-shot score is half the text probability plus half the map maximum, the latter scaled to
    ``[0, 1]`` by bounds (arXiv:2305.17382, sec. 2.2). The authors take the bounds from the test
    images of the class; here they are learned in validation, which is the same where the
    validation set is the test set (anomalib's default), and set beforehand otherwise, so that an
    image can be scored alone. With a ``top_share`` the mean of the highest pixels stands for the map instead of
    the maximum, there and in the bounds.

    :meth:`calibrate` and :meth:`set_values` fix bounds and thresholds: from then on no validation changes them.

    For a model of several classes there is one of these per class (:meth:`set_classes`); batches are taken
    apart by their ``class_index`` and put together again.

    Args:
        map_limit: Highest value a map can be expected to take.
        fuse_map_maximum: Whether the score is fused (few-shot) or the text probability (zero-shot).
        enable_normalization: Whether scores and maps are put on the scale where 0.5 is the threshold.
        enable_thresholding: Whether labels and masks are derived.
        image_sensitivity: One minus the normalised score above which an image is anomalous.
        pixel_sensitivity: The same for pixels.
        top_share: Share of the map's pixels, the highest ones, whose mean stands for the map in the fused score;
            0 for its maximum.

    Raises:
        ValueError: ``top_share`` is not in ``[0, 1]``.
    """

    def __init__(
        self,
        map_limit: float = 4.0,
        fuse_map_maximum: bool = False,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
        top_share: float = 0.0,
    ) -> None:
        if not 0.0 <= top_share <= 1.0:
            msg = f"`top_share` must be a share of the map in [0, 1], or 0 for its maximum, got {top_share}."
            raise ValueError(msg)
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            enable_threshold_matching=False,  # scores and maps have different scales
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )
        self.fuse_map_maximum = fuse_map_maximum
        self.top_share = top_share
        self.class_names: tuple[str, ...] = ()
        self.by_class = nn.ModuleList()  # empty for one class
        self._map_limit = map_limit
        self._validation_scores = _ScoreStore()
        self._image_threshold_metric = _Threshold(fields=["pred_score", "gt_label"], strict=False)
        self._pixel_threshold_metric = _Threshold(fields=["anomaly_map", "gt_mask"], strict=False)
        self.register_buffer("map_maximum_min", torch.tensor(0.0))
        self.register_buffer("map_maximum_max", torch.tensor(float(map_limit)))
        self.map_maximum_min: Tensor
        self.map_maximum_max: Tensor
        self.register_buffer("calibrated", torch.tensor(False))
        self.calibrated: Tensor
        self.set_defaults(map_limit)

    def set_classes(self, class_names: Sequence[str]) -> None:
        """Have bounds and thresholds for these classes.

        A class that was there before keeps its own; so does the only class where it gets another name.

        Args:
            class_names: ``N`` names, in the order of the model's.
        """
        class_names = tuple(class_names)
        if class_names == self.class_names or (len(class_names) == 1 and not self.by_class):
            self.class_names = class_names
            return
        before = {name: _learned(self.of_class(number)) for number, name in enumerate(self.class_names)}
        if len(class_names) == 1:
            self.by_class = nn.ModuleList()
            self.set_defaults(self._map_limit)
            _take(self, before.get(class_names[0], {}))
        else:
            parts = [AprilGANPostProcessor(self._map_limit).to(self.image_min.device) for _ in class_names]
            for name, part in zip(class_names, parts, strict=True):
                _take(part, before.get(name, {}))
            self.by_class = nn.ModuleList(parts)
        self.class_names = class_names

    def of_class(self, name: int | str) -> AprilGANPostProcessor:
        """Bounds and thresholds of a class, by its name or its place in ``class_names``.

        Raises:
            ValueError: There is no class of this name.
        """
        if isinstance(name, str) and name not in self.class_names:
            msg = f"`name` must be one of {', '.join(self.class_names)}, got {name!r}."
            raise ValueError(msg)
        if not self.by_class:
            return self
        number = self.class_names.index(name) if isinstance(name, str) else name
        part = cast("AprilGANPostProcessor", self.by_class[number])
        part.load_checkpoint_config(self.checkpoint_config())  # the switches are those of the whole
        part.top_share = self.top_share
        return part

    def set_defaults(
        self, map_limit: float, held_out_maxima: Tensor | None = None, held_out_statistics: Tensor | None = None
    ) -> None:
        """Bounds and thresholds for the case that no validation data will tell better ones.

        Args:
            map_limit: Highest value a map can be expected to take.
            held_out_maxima: ``(K,)`` map maxima of good parts: the lowest bounds the map maximum from below,
                and pixels are cut above the highest.
            held_out_statistics: ``(K,)`` what stands for these maps in the score; unset, the maxima.
        """
        self._map_limit = map_limit
        defaults = {
            "image_min": 0.0,
            "_image_threshold": 0.5,
            "image_max": 1.0,
            "pixel_min": 0.0,
            "_pixel_threshold": map_limit / 2.0,
            "pixel_max": map_limit,
            "map_maximum_min": 0.0,
            "map_maximum_max": map_limit,
        }
        if held_out_maxima is not None and len(held_out_maxima):
            statistics = held_out_maxima if held_out_statistics is None else held_out_statistics
            defaults["map_maximum_min"] = statistics.min().item()
            defaults["_pixel_threshold"] = held_out_maxima.max().item()
        for name, value in defaults.items():
            getattr(self, name).fill_(value)

    def calibrate(self, image_threshold: float, pixel_threshold: float, map_limit: float) -> None:
        """Fix these thresholds, on a scale that depends on nothing but them.

        Scores then run from 0 to 1 and maps from 0 to ``map_limit``, as do the bounds of the map maximum.

        Args:
            image_threshold: Raw score, fused where there are references, above which an image is anomalous.
            pixel_threshold: Raw value of the map above which a pixel is.
            map_limit: Highest value a map can be expected to take.
        """
        self.set_defaults(map_limit)
        self.set_values(image_threshold=image_threshold, pixel_threshold=pixel_threshold)

    def values(self) -> dict[str, float]:
        """Bounds and thresholds by name, raw: what is 0, 0.5 and 1 on the final scale."""
        return {name: getattr(self, buffer).item() for name, buffer in _VALUES.items()}

    def set_values(self, **values: float) -> None:
        """Fix some of :meth:`values`.

        Args:
            values: By name.

        Raises:
            ValueError: There is no such name, the value is not finite, or there are several classes: ask
                :meth:`of_class` for one.
        """
        for name, value in values.items():
            if name not in _VALUES or not math.isfinite(value):
                msg = f"`values` must be finite numbers for some of {', '.join(_VALUES)}, got {name}={value}."
                raise ValueError(msg)
        if self.by_class:
            msg = f"Every class has its own values: ask `of_class` for one of {', '.join(self.class_names)}."
            raise ValueError(msg)
        for name, value in values.items():
            getattr(self, _VALUES[name]).fill_(value)
        self.calibrated.fill_(True)

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "fuse_map_maximum")

    def fuse(self, text_probability: Tensor, anomaly_map: Tensor) -> Tensor:
        """Published few-shot score: ``0.5 * (text + minmax(max of the map))``, or of the mean of the ``top_share``.

        Args:
            text_probability: ``(B,)`` in ``[0, 1]``.
            anomaly_map: ``(B, H, W)``, raw.

        Returns:
            ``(B,)``; within ``[0, 1]`` where the map maximum is within its bounds.
        """
        return self._fuse_maximum(text_probability, map_statistic(anomaly_map, self.top_share))

    def forward(self, predictions: InferenceBatch, class_index: Tensor | None = None) -> InferenceBatch:
        """Fused, scaled and thresholded predictions.

        Args:
            predictions: Raw scores ``(B,)`` and maps ``(B, H, W)``.
            class_index: ``(B,)`` places in ``class_names``; not needed for one class.
        """
        if self.by_class:
            parts = [
                (rows, part(InferenceBatch(*(None if value is None else value[rows] for value in predictions))))
                for part, rows in self._routes(class_index)
            ]
            return InferenceBatch(**_together(parts))
        if self.fuse_map_maximum:
            predictions = predictions._replace(pred_score=self.fuse(*_text_and_map(predictions)))
        return super().forward(predictions)

    def on_validation_batch_end(  # type: ignore[override]  # as anomalib's own
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch[Any],
        *args: Any,  # noqa: ANN401  # anomalib's signature
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Collect what the bounds and thresholds are learned from."""
        if self.by_class:
            for part, rows in self._routes(class_index_of(outputs)):
                part.on_validation_batch_end(trainer, pl_module, part_of(outputs, rows))
            return
        if self.calibrated:
            return
        if not self.fuse_map_maximum:
            super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
            return
        text_probability, anomaly_map = _text_and_map(outputs)
        map_maximum = map_statistic(anomaly_map, self.top_share)
        self._validation_scores.update(text_probability, map_maximum, outputs.gt_label)
        if self.enable_thresholding:
            self._pixel_threshold_metric.update(outputs)
        if self.enable_normalization:
            self._pixel_min_max_metric.update(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn bounds and thresholds, those of every class from the images of all processes."""
        align_metrics([self])
        for number in range(len(self.by_class)):
            self.of_class(number)._learn(trainer, pl_module)  # noqa: SLF001  # one of its own kind
        self._learn(trainer, pl_module)

    def _learn(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn the bounds of the map maximum first: the fused scores need them."""
        if self._validation_scores.update_called:
            text_probability, map_maximum, label = self._validation_scores.compute()
            self._validation_scores.reset()
            if label is not None and label.any() and not label.all():  # good parts alone do not show the range
                self.map_maximum_min.copy_(map_maximum.min())
                self.map_maximum_max.copy_(map_maximum.max())
            fused = self._fuse_maximum(text_probability, map_maximum)
            scores: Any = SimpleNamespace(pred_score=fused, gt_label=label)  # the two fields the metrics read
            if self.enable_thresholding and label is not None:
                self._image_threshold_metric.update(scores)
            if self.enable_normalization:
                self._image_min_max_metric.update(scores)
        super().on_validation_epoch_end(trainer, pl_module)

    def post_process_batch(self, batch: Batch[Any]) -> None:
        """Fuse, scale and threshold a batch in place (test and predict)."""
        if self.by_class:
            parts = []
            for part, rows in self._routes(class_index_of(batch)):
                parts.append((rows, part_of(batch, rows)))
                part.post_process_batch(parts[-1][1])
            for name, value in _together(parts).items():
                setattr(batch, name, value)
            return
        if self.fuse_map_maximum:
            batch.pred_score = self.fuse(*_text_and_map(batch))
        super().post_process_batch(batch)

    def _routes(self, class_index: Tensor | None) -> Iterator[tuple[AprilGANPostProcessor, Tensor]]:
        """For every class of a batch its bounds and thresholds and its rows."""
        if class_index is None:
            msg = f"`class_index` is needed to choose among the classes {self.class_names}, got None."
            raise ValueError(msg)
        for number, rows in rows_by_class(class_index):
            yield self.of_class(number), rows

    def _fuse_maximum(self, text_probability: Tensor, map_maximum: Tensor) -> Tensor:
        return fused_score(text_probability, map_maximum, self.map_maximum_min, self.map_maximum_max)

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        return None if preds is None else scale_between(preds, norm_min, threshold, norm_max)


def scale_between(values: Tensor, low: Tensor, threshold: Tensor, high: Tensor) -> Tensor:
    """Strictly increasing scale onto the open interval (0, 1) with the threshold at 0.5.

    Piecewise linear through ``low -> 0.001``, ``threshold -> 0.5``, ``high -> 0.999``; what lies
    beyond the bounds approaches 0 and 1 without reaching them. anomalib's own scale clamps there,
    and metrics computed after it see ties; torchmetrics in turn takes anything outside ``[0, 1]``
    for logits. Where the threshold lies at an end of the range, the other side's slope serves both.

    Args:
        values: Any shape.
        low: Scalar, lower bound.
        threshold: Scalar.
        high: Scalar, upper bound.

    Returns:
        Same shape as ``values``.
    """
    low, high = torch.minimum(low, threshold), torch.maximum(high, threshold)
    below, above = threshold - low, high - threshold
    below, above = torch.where(below > 0, below, above), torch.where(above > 0, above, below)
    below = torch.where(below > 0, below, torch.ones_like(below))
    above = torch.where(above > 0, above, torch.ones_like(above))
    offset = values - threshold
    distance = offset.abs() / torch.where(offset < 0, below, above)
    # Linear up to 1, then a hyperbola that leaves with the same slope.
    inside = (0.5 - TAIL) * distance
    beyond = 0.5 - TAIL / (1.0 + (0.5 - TAIL) / TAIL * (distance - 1.0).clamp(min=0.0))
    half = torch.where(distance <= 1.0, inside, beyond)
    return torch.where(offset < 0, 0.5 - half, 0.5 + half)


def _learned(part: nn.Module) -> dict[str, Tensor]:
    """The bounds and thresholds of one class."""
    return {name: value.clone() for name, value in part.named_buffers(recurse=False)}


def _take(part: nn.Module, learned: Mapping[str, Tensor]) -> None:
    for name, value in learned.items():
        getattr(part, name).copy_(value)


# By name, the buffers that a user may read and set; anomalib hides two of them.
_VALUES = {
    "image_min": "image_min",
    "image_threshold": "_image_threshold",
    "image_max": "image_max",
    "pixel_min": "pixel_min",
    "pixel_threshold": "_pixel_threshold",
    "pixel_max": "pixel_max",
    "map_maximum_min": "map_maximum_min",
    "map_maximum_max": "map_maximum_max",
}


def _together(parts: Sequence[tuple[Tensor, Any]]) -> dict[str, Tensor | None]:
    """Predictions of a batch from those of its classes, in the order of the batch."""
    order = torch.cat([rows for rows, _ in parts]).argsort()
    values = {name: [getattr(part, name) for _, part in parts] for name in PREDICTIONS}
    return {name: None if given[0] is None else torch.cat(given)[order] for name, given in values.items()}


def _text_and_map(predictions: Batch[Any] | InferenceBatch) -> tuple[Tensor, Tensor]:
    """The two that the few-shot score is fused from.

    Raises:
        ValueError: One is missing.
    """
    if predictions.pred_score is None or predictions.anomaly_map is None:
        msg = "The few-shot score is fused from `pred_score` and `anomaly_map`, and one of them is missing."
        raise ValueError(msg)
    return predictions.pred_score, predictions.anomaly_map


class _Threshold(F1AdaptiveThreshold):
    """anomalib's; gathered across processes, its targets are one tensor, of which anomalib makes an object a pixel."""

    def _has_anomalous_samples(self) -> bool:
        return bool((dim_zero_cat(self.target) == 1).any())

    def _has_normal_samples(self) -> bool:
        return bool((dim_zero_cat(self.target) == 0).any())


class _ScoreStore(Metric):
    """Text probability, what stands for the map, and label of validation images, gathered across processes."""

    full_state_update = False
    text_probability: list[Tensor]
    map_maximum: list[Tensor]
    label: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("text_probability", "map_maximum", "label"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, text_probability: Tensor, map_maximum: Tensor, label: Tensor | None) -> None:
        self.text_probability.append(text_probability)
        self.map_maximum.append(map_maximum)
        if label is not None:
            self.label.append(label)

    def compute(self) -> tuple[Tensor, Tensor, Tensor | None]:
        label = dim_zero_cat(self.label) if len(self.label) else None  # a tensor once gathered across processes
        return dim_zero_cat(self.text_probability), dim_zero_cat(self.map_maximum), label
