"""From raw predictions to decisions: fusion, scale and thresholds, a row for each class."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torch import Tensor

from ..checks import check_bool, check_number, check_share
from ..classes import Classes, images_of_row, rows_of
from ..running import FullPrecision, align_metrics
from ..value_names import BUFFERS
from .fusion import ScoreFusion
from .good_parts import GoodParts
from .learning import RowLearner
from .scale import Bounds, scaled
from .values import ClassValues, value_table, values_of_images

_MOST = 1e6  # that a map may reach: a few for each stage
Level = Literal["image", "pixel"]


class AprilGANPostProcessor(FullPrecision, PostProcessor):
    """anomalib's post-processor with the fusion of few-shot scores, a strictly increasing scale, and rows.

    Bounds and thresholds are buffers with a row for each class, which checkpoints and exports carry. Until anything
    better is known, defaults hold: scores are cut at 0.5, maps run from 0 to their expected limit and are cut in the
    middle. Validation learns range and best-F1 threshold of scores and maps, as anomalib's does, and the bounds of the
    fusion. ``set_values`` and calibration fix the values of a class, which no validation changes from then on.

    Args:
        map_limit: Highest value a map can be expected to take; set by the model.
        fuse_map_maximum: Whether scores are fused (few-shot) or text probabilities (zero-shot); set by the model.
        enable_normalization: Whether scores and maps are put on the scale where 0.5 is the threshold.
        enable_thresholding: Whether labels and masks are derived.
        image_sensitivity: One minus the score on that scale above which an image is anomalous.
        pixel_sensitivity: The same for pixels.
        top_share: Share of the map's pixels, the highest ones, whose mean stands for the map in the fused score;
            0 for its maximum.
        score_fusion: Name of the fusion in ``anomalib_aprilgan.decision.fusion.FUSIONS``.
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
        score_fusion: str = "mean",
    ) -> None:
        fusion = ScoreFusion(score_fusion, top_share)  # before anything is made
        if not 0.0 < check_number("map_limit", map_limit, "a number above 0") < _MOST:
            msg = f"`map_limit` must be a number above 0, below {_MOST:g}, got {map_limit}."
            raise ValueError(msg)
        for name, flag in (
            ("fuse_map_maximum", fuse_map_maximum),
            ("enable_normalization", enable_normalization),
            ("enable_thresholding", enable_thresholding),
        ):
            check_bool(name, flag)
        check_share("image_sensitivity", image_sensitivity)
        check_share("pixel_sensitivity", pixel_sensitivity)
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            enable_threshold_matching=False,  # scores and maps have different scales
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )
        self.fusion, self.good_parts = fusion, GoodParts()
        self._sensitivity_of_new = {"image_sensitivity": image_sensitivity, "pixel_sensitivity": pixel_sensitivity}
        self.fuse_map_maximum = fuse_map_maximum
        self.map_limit = self.map_ceiling = map_limit
        self.classes = Classes()
        self.learned_rows: list[int] = []
        for name in set(BUFFERS.values()) & set(self._buffers):
            self.register_buffer(name, torch.zeros(1))
        self.register_buffer("fixed", torch.zeros(1, dtype=torch.bool))
        self.fixed: Tensor
        self.register_buffer("table", None, persistent=False)
        self.table: Tensor | None
        self._learners: defaultdict[int, RowLearner] = defaultdict(RowLearner)
        self.of_class(0).set_defaults(map_limit)

    def set_rows(self, classes: Classes, kept: Sequence[int | None], map_limit: float, map_ceiling: float) -> None:
        """Replace the classes; each takes over the values of the row named in ``kept``, and defaults for ``None``.

        What is fixed before any class is known holds for all. Maps are expected up to the limit, and never exceed the
        ceiling.
        """
        known = len(self.classes) > 0
        keeps_defaults = known and (map_limit, map_ceiling) == (self.map_limit, self.map_ceiling)
        self.map_limit, self.map_ceiling = map_limit, map_ceiling
        sources = list(kept) if known else [0] * len(classes)
        for name in (*BUFFERS.values(), "fixed"):
            owner, _, buffer = name.rpartition(".")
            values = torch.stack([self.get_buffer(name)[source or 0] for source in sources])
            setattr(self.get_submodule(owner), buffer, values)
        self.good_parts.set_rows(sources)
        for level in ("image_sensitivity", "pixel_sensitivity"):
            if isinstance(given := getattr(self, level), list):
                default = self._sensitivity_of_new[level]
                setattr(self, level, [default if source is None else given[source] for source in sources])
        self.classes = classes
        for row, source in enumerate(sources):
            if source is None or not (keeps_defaults or self.fixed[row]):
                self.of_class(row).set_defaults(map_limit)

    def make_room(self, classes: Classes, map_limit: float, map_ceiling: float) -> None:
        """Have rows for the classes of a checkpoint, whose values are loaded next."""
        sensitivities = self.image_sensitivity, self.pixel_sensitivity  # the checkpoint's already
        self.set_rows(classes, [None if self.classes else 0] * len(classes), map_limit, map_ceiling)
        self.image_sensitivity, self.pixel_sensitivity = sensitivities

    def of_row(self, row: int) -> AprilGANPostProcessor:
        """A post-processor of one class alone, with the values of this one's row."""
        one = copy.deepcopy(self)
        if len(self.classes):
            one.set_rows(self.classes.of_row(row), [row], self.map_limit, self.map_ceiling)
        return one

    def of_class(self, name: int | str) -> ClassValues:
        """Bounds, thresholds and sensitivities of a class by its name or row; a ValueError if there is none."""
        return ClassValues(self, 0 if not self.classes and name == 0 else self.classes.row(name))

    def values(self) -> dict[str, float]:
        """Bounds and thresholds of the only class by name, raw; see ``ClassValues.values``."""
        return self._only_class().values()

    def set_values(self, **values: float) -> None:
        """Fix some of ``values`` of the only class; see ``ClassValues.set_values``."""
        self._only_class().set_values(**values)

    def _only_class(self) -> ClassValues:
        if len(self.classes) > 1:
            msg = f"Every class has its own values: ask `of_class` for one of {', '.join(self.classes.names)}."
            raise ValueError(msg)
        return self.of_class(0)

    def sensitivities(self, level: Level) -> list[float]:
        """One minus the score above which an image, or a pixel, is anomalous, for each class."""
        given: float | list[float] = getattr(self, f"{level}_sensitivity")
        return list(given) if isinstance(given, list) else [given] * len(self.fixed)

    def set_sensitivity(self, level: Level, row: int, value: float) -> None:
        """Replace one of ``sensitivities``."""
        check_share(f"{level}_sensitivity", value)
        given = self.sensitivities(level)
        given[row] = value
        setattr(self, f"{level}_sensitivity", given)

    @property
    def normalized_image_threshold(self) -> Tensor:
        """Where scores are cut as they leave here: ``(N,)`` on the scale, or raw where that is switched off."""
        return self._cuts("image") if self.enable_normalization else self._image_threshold

    @property
    def normalized_pixel_threshold(self) -> Tensor:
        """Where maps are cut as they leave here: ``(N,)`` on the scale, or raw where that is switched off."""
        return self._cuts("pixel") if self.enable_normalization else self._pixel_threshold

    def _cuts(self, level: Level) -> Tensor:
        return 1.0 - torch.tensor(self.sensitivities(level), device=self.image_min.device)

    def for_graph(self) -> AprilGANPostProcessor:
        """The same post-processor for a graph: its bounds, thresholds and cuts are one constant, ``table``."""
        one = copy.deepcopy(self)
        one.table = value_table(self)
        return one

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "fuse_map_maximum")

    def forward(self, predictions: InferenceBatch, rows: Tensor | None = None) -> InferenceBatch:
        """Fused, scaled and thresholded predictions of raw scores ``(B,)`` and maps ``(B, H, W)``.

        ``rows`` ``(B,)`` is the class of each image. Several classes and no rows give a ValueError, and so does a
        missing score or map.
        """
        (text_probability, statistic), anomaly_map = self._parts_of(predictions), predictions.anomaly_map
        score, label = self.decide_scores(text_probability, statistic, rows)
        mask = None
        if anomaly_map is not None:
            values = values_of_images(self, rows, anomaly_map.shape[0])
            floor, ceiling = anomaly_map.new_zeros(1), anomaly_map.new_full((1,), self.map_ceiling)
            anomaly_map, mask = self._decide("pixel", anomaly_map, floor, ceiling, values)
        return InferenceBatch(pred_score=score, pred_label=label, anomaly_map=anomaly_map, pred_mask=mask)

    def decide_scores(
        self, text_probability: Tensor, statistic: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores ``(B,)`` as they leave here, fused where there is a map statistic ``(B,)``, and their labels."""
        values = values_of_images(self, rows, text_probability.shape[0])
        floor, ceiling = text_probability.new_zeros(1), text_probability.new_ones(1)
        score = text_probability
        if statistic is not None:
            bounds = values["map_maximum_min"], values["map_maximum_max"]
            floor, ceiling = self.fusion.range(self.map_ceiling, bounds)
            score = self.fusion.between(bounds, text_probability, statistic)
        return self._decide("image", score, floor, ceiling, values)

    def fused(self, text_probability: Tensor, statistic: Tensor | None, rows: Tensor | None) -> Tensor:
        """Raw scores ``(B,)``, which are cut at: fused where there is a map statistic ``(B,)``."""
        if statistic is None:
            return text_probability
        score: Tensor = self.fusion(text_probability, statistic, rows if len(self.fixed) > 1 else None)
        return score

    def _parts_of(self, predictions: InferenceBatch) -> tuple[Tensor, Tensor | None]:
        """Text probability and, where scores are fused, map statistic; a ValueError where one of them is missing."""
        score, anomaly_map = predictions.pred_score, predictions.anomaly_map
        if score is None or (anomaly_map is None and self.fuse_map_maximum):
            msg = "The few-shot score is fused from `pred_score` and `anomaly_map`, and one of them is missing."
            raise ValueError(msg)
        if anomaly_map is None or not self.fuse_map_maximum:
            return score, None
        return score, self.fusion.statistic(anomaly_map)

    def _decide(
        self, level: Level, values: Tensor, floor: Tensor, ceiling: Tensor, of_images: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Values as they leave here, and which of them are anomalous; they may lie from floor to ceiling."""

        def broadcast(values_of_images: Tensor) -> Tensor:
            return values_of_images.view(-1, *[1] * (values.ndim - 1))

        learned = [of_images[f"{level}_{name}"] for name in ("min", "threshold", "max")]
        on_scale = scaled(values, Bounds(*map(broadcast, (*learned, floor, ceiling))))
        # Not "greater than": what is not a number must not pass for good.
        decided = ~(on_scale <= broadcast(of_images[f"{level}_cut"])) if self.enable_thresholding else None
        return (on_scale if self.enable_normalization else values), decided

    def post_process_batch(self, batch: Any, rows: Tensor | None = None) -> None:  # noqa: ANN401  # anomalib's batch
        """Fuse, scale and threshold a batch in place (test and predict), and give it ``raw_score`` and ``p_value``."""
        raw = InferenceBatch(pred_score=batch.pred_score, anomaly_map=batch.anomaly_map)
        predictions = self(raw, rows)
        batch.raw_score = self.fused(*self._parts_of(raw), rows)
        batch.p_value = self.good_parts.p_values(batch.raw_score, rows if len(self.fixed) > 1 else None)
        batch.update(**predictions._asdict())

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: object, *_: object) -> None:
        """Post-process a batch."""
        del trainer
        self.post_process_batch(outputs, rows_of(pl_module, outputs))

    on_predict_batch_end = on_test_batch_end

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a validation that was interrupted has collected."""
        del trainer, pl_module
        self._learners.clear()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, *_: object
    ) -> None:
        """Collect what bounds and thresholds are learned from."""
        del trainer
        rows = rows_of(pl_module, outputs)
        for row in sorted(set(rows.tolist())):
            if not self.fixed[row]:
                learner = self._learners[row].to(self.image_min.device)
                learner.update(images_of_row(outputs, rows, row), self.fusion.statistic)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn bounds and thresholds of every class from the images of all processes."""
        del trainer, pl_module
        learners = [self._learners[row].to(self.image_min.device) for row in range(len(self.fixed))]
        align_metrics(learners)
        for row, learner in enumerate(learners):
            learned = learner.learned(partial(self._fuse_row, row) if self.fuse_map_maximum else None)
            self.of_class(row).take(learned)
            self.learned_rows += [row] if learned else []
        self._learners.clear()

    def _fuse_row(self, row: int, text: Tensor, statistic: Tensor, bounds: tuple[float, float] | None) -> Tensor:
        if bounds is not None:
            self.fusion.low[row], self.fusion.high[row] = bounds
        fused: Tensor = self.fusion(text, statistic, torch.full_like(statistic, row, dtype=torch.long))
        return fused
