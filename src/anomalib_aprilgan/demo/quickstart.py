"""The whole of it in a minute, offline: a product that was never shown in training, with 0 to 4 references.

Runs ``anomalib train --model AprilGAN`` with the built-in CLIP, once per number of references, and
leaves a table and a picture.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.cli import AnomalibCLI
from anomalib.data.utils import read_image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..evaluation.figures import heatmap_figure
from . import built_in
from .inspection import DrawnInspection

# Neither the built-in CLIP nor its adapters were shown one.
CATEGORY = "leather"
SHOTS = (0, 1, 2, 4)
SHOWN_DEFECTS = ("scratch", "hole", "stain", "crack", "missing_piece")
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPR", "pixel_AUPRO")


def quickstart(root: Path) -> None:
    """Run it; everything goes into ``root``."""
    console = Console(highlight=False)
    table = Table("", *METRICS, title=f"{CATEGORY}: a drawn product that neither CLIP nor adapters were shown")
    maps: dict[str, list[Tensor]] = {}
    for k_shot in SHOTS:
        command = _command(root, k_shot)
        console.rule()
        console.print(f"anomalib {shlex.join(command)}", soft_wrap=True)
        cli = AnomalibCLI(args=command)
        metrics = cli.engine.trainer.callback_metrics
        table.add_row(f"{k_shot}-shot", *(f"{metrics[name]:.3f}" for name in METRICS))
        shown = _shown_images(cli.datamodule)
        maps[f"{k_shot}-shot"] = _heatmaps(cli.model, shown)
    heatmap_figure(shown, [_mask_of(image) for image in shown], maps, root / "heatmaps.png")
    console.rule()
    console.print(table)
    console.print(f"Heatmaps of {len(shown)} defects: {root / 'heatmaps.png'}", soft_wrap=True)
    console.print(f"A picture of every test image: {root}/*-shot/**/images", soft_wrap=True)


def _command(root: Path, k_shot: int) -> list[str]:
    options = {
        "--model": "AprilGAN",
        "--model.backbone": built_in.ARCHITECTURE,
        "--model.pretrained": built_in.PRETRAINED,
        "--model.image_size": str(built_in.IMAGE_SIZE),
        "--model.stages": str(list(built_in.STAGES)),
        "--model.memory_stages": str(list(built_in.MEMORY_STAGES)),
        "--model.k_shot": str(k_shot),
        "--data": "DrawnInspection",
        "--data.root": str(root / "data"),
        "--data.category": CATEGORY,
        "--data.image_size": str(built_in.IMAGE_SIZE),
        "--data.num_test": "42",
        "--default_root_dir": str(root / f"{k_shot}-shot"),
    }
    return ["train", *(word for pair in options.items() for word in pair)]


@torch.no_grad()
def _heatmaps(model: torch.nn.Module, images: Sequence[Path]) -> list[Tensor]:
    pictures: list[Any] = [read_image(path, as_tensor=True) for path in images]
    return list(model.eval()(torch.stack(pictures)).anomaly_map)


def _shown_images(data: DrawnInspection) -> list[Path]:
    paths = sorted(Path(path) for path in data.test_data.samples.image_path)
    return [next(path for path in paths if path.parent.name == defect) for defect in SHOWN_DEFECTS]


def _mask_of(image: Path) -> Path:
    """MVTec AD's place for the mask of a test image."""
    category = image.parents[2]
    return category / "ground_truth" / image.parent.name / f"{image.stem}_mask.png"
