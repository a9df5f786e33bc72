"""Trains the small CLIP of this package on captioned drawings: seeded, on a CPU or a GPU.

OMP_NUM_THREADS=1 python -m anomalib_aprilgan.demo.drawn_clip.pretrain --seed 1 --out ViT-drawn-96.safetensors

The weights in this package are what this command wrote, with the log beside them: an hour and forty minutes on
one core, and 8 GB of memory. The README says what they reach, and what those of another seed do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import normalize

from ...clip.architecture import ClipArchitecture
from ...clip.backbone import ClipBackbone
from ...clip.prompts import PromptEnsemble
from ...data.pre_processing import CLIP_MEAN, CLIP_STD
from ...files import write_atomically
from ...network.scoring import text_probability
from .. import built_in
from ..drawing import CATEGORIES, DEFECTS, INVENTIONS
from .pictures import Pictures, draw_pictures
from .trainer import Recipe, Trainer, as_planes

# Neither captioned nor drawn in training, so that they can show what the model makes of the unknown.
UNSEEN_CATEGORIES = ("capsule", "leather", "nut", "tile")
UNSEEN_DEFECTS = ("dent", "fibre", "rotated_patch")
CAPTIONED_CATEGORIES = tuple(name for name in CATEGORIES if name not in UNSEEN_CATEGORIES)
DRAWN_DEFECTS = tuple(name for name in DEFECTS if name not in UNSEEN_DEFECTS)
# Seeds of products: training far away from the small numbers that anyone would test on.
TRAINING_SEED = 1_000_000_000
PROBE_SEED = 1_100_000_000
_SEEDS_APART = 1_000_000  # of the products of one training from those of the next


@torch.no_grad()
def zero_shot_auroc(clip: ClipBackbone, products: Sequence[Pictures]) -> dict[str, float]:
    """Zero-shot image AUROC of every category with the paper's prompts, averaged over products."""
    categories = sorted(set(products[0].categories))
    states = {category: clip.encode_states(*PromptEnsemble().sentences(category)) for category in categories}
    figures = [_auroc_of_product(clip, pictures, states) for pictures in products]
    return {category: float(np.mean([figure[category] for figure in figures])) for category in categories}


def _auroc_of_product(clip: ClipBackbone, pictures: Pictures, states: dict[str, Tensor]) -> dict[str, float]:
    device = clip.visual.proj.device
    figures = {}
    for category, text_features in states.items():
        chosen = np.array([name == category for name in pictures.categories])
        images = torch.cat([as_planes(array[chosen], device) for array in (pictures.good, pictures.bad)])
        features = [
            clip(normalize(batch, list(CLIP_MEAN), list(CLIP_STD)), []).image_feature
            for batch in torch.split(images, 128)
        ]
        target = torch.arange(len(images), device=device) >= len(images) // 2
        figures[category] = float(binary_auroc(text_probability(torch.cat(features), text_features), target.long()))
    return figures


def state_dict_of(clip: ClipBackbone) -> dict[str, Tensor]:
    """Weights under open_clip's names, in fp16."""
    weights = {f"visual.{name}": value for name, value in clip.visual.state_dict().items()}
    weights |= clip.text.state_dict()  # type: ignore[union-attr]  # freshly built: it has one
    return {name: value.detach().half().cpu().contiguous() for name, value in sorted(weights.items())}


def train(recipe: Recipe, out: Path, *, workers: int = 1, checkpoint_every: int = 1000) -> dict[str, Any]:
    """Trains the small CLIP and writes its weights, and a log beside them.

    Args:
        recipe: How.
        out: A name ending in ``.safetensors``; the log has the same name, ending in ``.log.json``.
        workers: Processes that draw.
        checkpoint_every: Steps between two writings of weights and log.

    Returns:
        The log: recipe, losses, zero-shot image AUROC of each category, seconds.
    """
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = ClipArchitecture.load(built_in.ARCHITECTURE, (built_in.IMAGE_SIZE, built_in.IMAGE_SIZE), None)
    side = architecture.image_size[0]
    shown = CAPTIONED_CATEGORIES + INVENTIONS * recipe.inventions
    first = TRAINING_SEED + _SEEDS_APART * recipe.seed
    pictures = draw_pictures(shown, DRAWN_DEFECTS, recipe.products, recipe.per_product, first, side, workers=workers)
    # Two products of every category, none of them trained on.
    probe = [
        draw_pictures(CATEGORIES, DRAWN_DEFECTS, len(CATEGORIES), 22, seed, side, progress=False)
        for seed in (PROBE_SEED, PROBE_SEED + 1)
    ]
    trainer = Trainer(architecture, recipe, pictures, device)
    log: dict[str, Any] = {
        "recipe": asdict(recipe),
        "captioned": CAPTIONED_CATEGORIES,
        "drawn_defects": DRAWN_DEFECTS,
        "device": str(device),
        "curve": [],
    }
    recent: dict[str, list[float]] = {}
    console = Console(stderr=True)
    for number in track(range(recipe.steps), "training", console=console):
        for name, loss in trainer.step(number).items():
            recent.setdefault(name, []).append(loss)
        last = number + 1 == recipe.steps
        if last or (number + 1) % checkpoint_every == 0:
            losses = {name: float(np.mean(values)) for name, values in recent.items()}
            auroc = zero_shot_auroc(trainer.kept, probe)
            log["curve"].append({"step": number + 1, "losses": losses, **_summary(auroc)})
            log |= {"zero_shot_image_auroc": auroc, "seconds": time.monotonic() - start}
            console.print_json(data=log["curve"][-1], indent=None)
            _write(out, save(state_dict_of(trainer.kept)))
            _write(out.with_suffix(".log.json"), json.dumps(log, indent=1).encode())
            recent = {}
    return log


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def _summary(auroc: dict[str, float]) -> dict[str, float]:
    groups = {"captioned": CAPTIONED_CATEGORIES, "never_shown": UNSEEN_CATEGORIES}
    return {group: float(np.mean([auroc[name] for name in names])) for group, names in groups.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="anomalib_aprilgan.demo.drawn_clip.pretrain", description=__doc__)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="seed of everything (default: %(default)s)")
    parser.add_argument(
        "--products", type=int, default=Recipe.products, help="products drawn beforehand (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that draw (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="weight file to write, .safetensors")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".safetensors":
        parser.error(f"--out must end in .safetensors, got {options.out.name}")
    train(Recipe(options.steps, options.seed, options.products), options.out, workers=options.workers)


if __name__ == "__main__":
    main()
