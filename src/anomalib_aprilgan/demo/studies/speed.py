"""How much the method adds to its CLIP: ``python -m anomalib_aprilgan.demo.studies.speed``.

Times, in turn and in one process, the plain vision tower of open_clip, the zero-shot and the
few-shot model on one image, and the text features of one class with and without cutting the
context. Ratios are taken round by round, since a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console

from ...clip.architecture import ClipArchitecture
from ...clip.backbone import ClipBackbone
from ...clip.prompts import PromptEnsemble
from ...network.adapters import LinearAdapters
from ...network.memory_bank import MemoryBank
from ...network.model import AprilGANModel
from ...timing import measure
from ..drawn_clip.trainer import random_weights


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Time the method against its CLIP, side by side.")
    parser.add_argument("--backbone", default="ViT-L-14-336", help="open_clip architecture; its weights are random")
    parser.add_argument("--image-size", type=int, default=518, help="side of the image in pixels")
    parser.add_argument("--stages", type=int, nargs="+", default=[6, 12, 18, 24], help="tapped blocks")
    parser.add_argument("--k-shot", type=int, default=4, help="references of the few-shot model")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is not counted")
    options = parser.parse_args(arguments)
    architecture = ClipArchitecture.load(options.backbone, (options.image_size, options.image_size), None)
    backbone = ClipBackbone(architecture, random_weights(architecture, seed=0), "random weights")
    vision = _vision_candidates(backbone, architecture.check_stages(options.stages), options.k_shot)
    text = _text_candidates(backbone)
    console = Console(width=120)
    console.print(
        f"{architecture.name}, {options.image_size} px, random weights, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, one image, median of {options.rounds} rounds (ratios: round by round)\n"
    )
    console.print("| | seconds | ratio | to |\n|---|---|---|---|")
    for candidates in (vision, text):
        with torch.no_grad():
            durations = measure(candidates, options.rounds)
        previous = ""
        for name, seconds in durations.items():
            ratio = [mine / other for mine, other in zip(seconds, durations.get(previous, seconds), strict=True)]
            against = f"{statistics.median(ratio):.3f} | {previous}" if previous else "| "
            console.print(f"| {name} | {statistics.median(seconds):.3f} | {against} |")
            previous = name


def random_model(backbone: ClipBackbone, stages: Sequence[int], k_shot: int) -> AprilGANModel:
    """The model of one class with random adapters, text features and references."""
    architecture, generator = backbone.architecture, torch.Generator().manual_seed(0)
    shapes = architecture.shapes_of(stages)
    adapters = LinearAdapters([shape.width for shape in shapes], architecture.embed_dim)
    bank = MemoryBank(architecture, stages) if k_shot else None
    model = AprilGANModel(adapters, stages, bank)
    model.attach_backbone(backbone)
    features = torch.randn(1, architecture.embed_dim, 2, generator=generator)
    model.set_rows(F.normalize(features, dim=1), [None])
    if bank is not None:
        sizes = [(k_shot, math.prod(shape.grid), shape.width) for shape in shapes]
        tokens = [F.normalize(torch.randn(*size, generator=generator), dim=-1) for size in sizes]
        bank.set_features(0, torch.cat([stage.flatten(1) for stage in tokens], dim=1))
    return model.eval()


def _vision_candidates(backbone: ClipBackbone, stages: Sequence[int], k_shot: int) -> dict[str, Callable[[], object]]:
    image = torch.randn(1, 3, *backbone.architecture.image_size, generator=torch.Generator().manual_seed(0))
    models = {shots: random_model(backbone, stages, shots) for shots in (0, k_shot)}
    return {
        "open_clip's vision tower": lambda: backbone.visual(image),
        "zero-shot": lambda: models[0](image),
        f"{k_shot}-shot": lambda: models[k_shot](image),
    }


def _text_candidates(backbone: ClipBackbone) -> dict[str, Callable[[], object]]:
    normal, anomalous = PromptEnsemble().sentences("object")
    sentences = normal + anomalous
    return {
        "text of one class, full context": lambda: backbone.encode_text(sentences, cut_context=False),
        "text of one class": lambda: backbone.encode_text(sentences),
    }


if __name__ == "__main__":
    main()
