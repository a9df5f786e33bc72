"""Time of an image with small CLIPs beside the published one, in torch and in OpenVINO; weights are random."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import openvino
import torch
from rich.console import Console

from ...clip.architecture import ClipArchitecture
from ...clip.backbone import ClipBackbone
from ...runtime.openvino_core import compiled
from ...timing import measure
from ..drawn_clip.trainer import random_weights
from .speed import random_model

PUBLISHED = ("ViT-L-14-336", 518)
_SMALL = (
    "MobileCLIP2-S0", "MobileCLIP2-S2", "ViT-B-16-SigLIP2", "PE-Core-T-16-384", "PE-Core-S-16-384",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Time small CLIPs beside the published one, side by side.")
    parser.add_argument("--backbones", nargs="+", default=_SMALL, help="open_clip architectures, each at its own size")
    parser.add_argument("--k-shot", type=int, default=4, help="references of the few-shot model")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one that is not counted")
    options = parser.parse_args(arguments)
    architectures = [ClipArchitecture.load(name, None, None) for name in options.backbones]
    architectures.append(ClipArchitecture.load(PUBLISHED[0], (PUBLISHED[1], PUBLISHED[1]), None))
    with tempfile.TemporaryDirectory() as folder:
        candidates = [_candidates(one, options.k_shot, Path(folder)) for one in architectures]
        with torch.no_grad():
            durations = measure({name: run for of_one in candidates for name, run in of_one.items()}, options.rounds)
    _print(architectures, durations, options)


def _candidates(architecture: ClipArchitecture, k_shot: int, folder: Path) -> dict[str, Callable[[], object]]:
    weights = random_weights(architecture, seed=0)
    backbone = ClipBackbone(architecture, weights, "random weights").without_text()
    image = torch.randn(1, 3, *architecture.image_size, generator=torch.Generator().manual_seed(0))
    found: dict[str, Callable[[], object]] = {}
    for shots in (0, k_shot):
        model = random_model(backbone, architecture.check_stages("auto"), shots)
        found[f"{architecture.name} {shots} torch"] = partial(model, image)
        path = folder / f"{architecture.name}_{shots}.onnx"
        torch.onnx.export(model, (image,), path, dynamo=True, verbose=False)
        found[f"{architecture.name} {shots} OpenVINO"] = partial(compiled(path), image.numpy())
    return found


def _print(
    architectures: Sequence[ClipArchitecture], durations: dict[str, list[float]], options: argparse.Namespace
) -> None:
    console = Console(width=160)
    console.print(
        f"Random weights, torch {torch.__version__}, OpenVINO {openvino.__version__} (fp32), {torch.get_num_threads()} "
        f"threads, one image, median seconds of {options.rounds} rounds, all in one run\n"
    )
    kinds = [f"{shots} {runtime}" for shots in (0, options.k_shot) for runtime in ("torch", "OpenVINO")]
    titles = [f"{kind.partition(' ')[0]}-shot, {kind.partition(' ')[2]}" for kind in kinds]
    console.print(f"| CLIP | pixels | {' | '.join(titles)} | times faster |")
    console.print(f"|---|---|{'---|' * (len(kinds) + 1)}")
    last = kinds[-1]
    published = durations[f"{PUBLISHED[0]} {last}"]
    for one in architectures:
        seconds = [statistics.median(durations[f"{one.name} {kind}"]) for kind in kinds]
        mine = durations[f"{one.name} {last}"]
        ratio = statistics.median(theirs / ours for theirs, ours in zip(published, mine, strict=True))
        cells = [f"{value:.3f}" for value in seconds]
        console.print(f"| {one.name} | {one.image_size[0]} | {' | '.join(cells)} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
