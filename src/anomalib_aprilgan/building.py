"""The parts of a model: from its settings, and for an export of one class."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal

from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from torch import nn

from .checks import check_kind
from .clip.weights import image_statistics
from .data.pre_processing import CLIP_MEAN, CLIP_STD, AprilGANPreProcessor
from .decision.post_processing import AprilGANPostProcessor
from .network import SCORERS
from .network.adapters import LinearAdapters
from .network.few_shot import FewShotScorer
from .network.model import AprilGANModel
from .running import seeded
from .settings import Settings


def build_network(settings: Settings) -> AprilGANModel:
    """The network without its CLIP and without any class."""
    architecture = settings.architecture
    with seeded(settings.seed):
        adapters = LinearAdapters(len(settings.stages), architecture.width, architecture.embed_dim)
    adapters.requires_grad_(settings.adapters is None)
    scorer = build_scorer(settings) if settings.k_shot else None
    return AprilGANModel(adapters, settings.stages, scorer, settings.smoothing_sigma)


def build_scorer(settings: Settings) -> FewShotScorer:
    """The few-shot scorer, without any class."""
    build = SCORERS[settings.few_shot]
    return build(settings.architecture, settings.memory_stages, settings.neighbourhood)


def build_pre_processor(settings: Settings, given: nn.Module | bool) -> nn.Module | bool:
    """The pre-processor to use; a ValueError where the user's does not go with tiles."""
    check_kind("pre_processor", given, nn.Module, "a pre-processor")
    tiled = settings.tile_size is not None
    if given is True:
        mean, std = image_statistics(settings.architecture.name, settings.pretrained) or (CLIP_MEAN, CLIP_STD)
        return AprilGANPreProcessor(settings.architecture.image_size, mean, std, tiled=tiled)
    if given is not False and getattr(given, "tiled", False) != tiled:
        msg = "`pre_processor` and `tile_size` do not go together: pass `AprilGANPreProcessor(..., tiled=True)`."
        raise ValueError(msg)
    return given


def build_post_processor(settings: Settings, given: nn.Module | bool) -> nn.Module | bool:
    """The post-processor to use; a ValueError where the user's does not go with other arguments."""
    check_kind("post_processor", given, nn.Module, "a post-processor")
    if given is True:
        return AprilGANPostProcessor(top_share=settings.top_share, score_fusion=settings.score_fusion)
    ours = isinstance(given, AprilGANPostProcessor)
    if settings.calibration is not None and not ours:
        msg = "`calibration` sets the thresholds of an AprilGANPostProcessor: leave `post_processor` as it is."
        raise ValueError(msg)
    if isinstance(given, AprilGANPostProcessor):
        for argument, theirs, asked in (
            ("top_share", given.fusion.top_share, settings.top_share),
            ("score_fusion", given.fusion.rule, settings.score_fusion),
        ):
            if theirs != asked:
                own = f"`AprilGANPostProcessor({argument}=...)`"
                msg = f"`post_processor` and `{argument}` do not go together: pass {own}."
                raise ValueError(msg)
    return given


def build_results(
    evaluator: Evaluator | bool | Literal["anomalib"], visualizer: Visualizer | bool
) -> tuple[Evaluator | bool, Visualizer | bool]:
    """Evaluator and visualizer to use; a TypeError where they are something else."""
    check_kind("visualizer", visualizer, Visualizer, "a Visualizer")
    if isinstance(evaluator, str) and evaluator == "anomalib":
        return AnomalibModule.configure_evaluator(), visualizer
    check_kind("evaluator", evaluator, Evaluator, "an Evaluator, 'anomalib'")
    return evaluator, visualizer


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
