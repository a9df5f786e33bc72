"""The parts of a model, from its settings."""

from __future__ import annotations

from typing import Literal

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
from .network.memory_bank import MemoryBank, VisionMemoryBank
from .network.model import AprilGANModel
from .running import seeded
from .settings import Settings


def build_network(settings: Settings, pre_processor: nn.Module | None) -> AprilGANModel:
    """The network without its CLIP and without any class."""
    architecture = settings.architecture
    with seeded(settings.seed):
        widths = [shape.width for shape in architecture.shapes_of(settings.stages)]
        adapters = LinearAdapters(widths, architecture.embed_dim)
    adapters.requires_grad_(settings.adapters is None)
    scorer = build_scorer(settings, pre_processor) if settings.k_shot else None
    temperature = None if settings.temperature == "model" else float(settings.temperature)
    return AprilGANModel(adapters, settings.stages, scorer, settings.smoothing_sigma, temperature)


def build_scorer(settings: Settings, pre_processor: nn.Module | None) -> FewShotScorer:
    """The few-shot scorer, without any class; a ValueError where the user's pre-processor does not go with it."""
    tower = settings.memory_tower
    if tower is not None:
        if not isinstance(pre_processor, AprilGANPreProcessor):
            msg = "`memory_backbone` needs an AprilGANPreProcessor, whose statistics are known: leave `pre_processor`."
            raise ValueError(msg)
        statistics = pre_processor.mean.flatten().tolist(), pre_processor.std.flatten().tolist()
        options = settings.neighbourhood, settings.remembering.bank_options(settings.seed)
        return VisionMemoryBank(tower, settings.memory_stages, statistics, *options)
    build = SCORERS[settings.few_shot]
    scorer = build(settings.architecture, settings.memory_stages, settings.neighbourhood)
    if isinstance(scorer, MemoryBank):
        scorer.options = settings.remembering.bank_options(settings.seed)
    return scorer


def build_pre_processor(settings: Settings, given: nn.Module | bool) -> nn.Module | bool:
    """The pre-processor to use; a ValueError where the user's does not go with tiles."""
    check_kind("pre_processor", given, nn.Module, "a pre-processor")
    tiled = settings.tile_size is not None
    if given is True:
        known = settings.architecture.statistics or image_statistics(settings.architecture.name, settings.pretrained)
        mean, std = known or (CLIP_MEAN, CLIP_STD)
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
