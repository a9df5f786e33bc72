"""How much faster adapters are trained with kept features: ``python -m anomalib_aprilgan.demo.studies.training_speed``.

Trains twice in one process on drawn products, without and with ``kept_features``, and compares the adapters. Another
CLIP than the built-in one has random weights: they cost the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.engine import Engine
from rich.console import Console
from safetensors.torch import save_file

from ...clip.architecture import ClipArchitecture
from ...data import AuxiliaryData
from ...lightning_model import AprilGAN
from .. import built_in
from ..drawn_clip.trainer import random_weights
from ..inspection import DrawnInspection


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Time the training of adapters without and with kept features.")
    parser.add_argument("--backbone", default=built_in.ARCHITECTURE, help="open_clip architecture")
    parser.add_argument("--image-size", type=int, default=built_in.IMAGE_SIZE, help="side of the images in pixels")
    parser.add_argument("--images", type=int, default=16, help="good images, and again defective ones")
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        given = _model_arguments(options, Path(folder))
        found = {
            kept: _trained(given, options, Path(folder), kept_features=str(Path(folder) / "features") if kept else None)
            for kept in (False, True)
        }
    (plain, adapters), (kept, others) = found[False], found[True]
    difference = max(float((adapters[name] - others[name]).abs().max()) for name in adapters)
    console = Console(width=120)
    console.print(
        f"{options.backbone}, {options.image_size} px, {2 * options.images} images, {options.epochs} epochs, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    console.print("| training | seconds | times faster | adapters differ by |\n|---|---|---|---|")
    console.print(f"| {options.epochs} passes | {plain:.1f} | 1 | |")
    console.print(f"| kept features | {kept:.1f} | {plain / kept:.2f} | {difference:.1g} |")


def _model_arguments(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if options.backbone == built_in.ARCHITECTURE:
        return {"backbone": built_in.ARCHITECTURE, "pretrained": built_in.PRETRAINED, "stages": built_in.STAGES}
    architecture = ClipArchitecture.load(options.backbone, (options.image_size, options.image_size), None)
    weights = {name: value.contiguous() for name, value in random_weights(architecture, seed=0).items()}
    save_file(weights, folder / "clip.safetensors")
    return {"backbone": options.backbone, "pretrained": str(folder / "clip.safetensors")}


def _trained(
    given: dict[str, Any], options: argparse.Namespace, folder: Path, *, kept_features: str | None
) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of a training, set-up left out, and its adapters."""
    drawn = {"image_size": options.image_size, "num_test": options.images, "num_train": 1, "val_split_mode": "none"}
    product = DrawnInspection(folder / "data", "tile", **drawn)
    data = AuxiliaryData(datamodules=[product], train_batch_size=8, num_workers=0)
    torch.manual_seed(0)
    model = AprilGAN(
        **given, image_size=options.image_size, adapters=None, visualizer=False, kept_features=kept_features
    )
    started: list[float] = []
    prepare = model.on_train_start

    def start() -> None:
        started.append(time.perf_counter())
        prepare()

    vars(model)["on_train_start"] = start
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
    Engine(default_root_dir=folder / "run", max_epochs=options.epochs, accelerator="cpu", devices=1, **quiet).fit(
        model, datamodule=data
    )
    seconds = time.perf_counter() - started[0]
    return seconds, {name: value.clone() for name, value in model.model.adapters.state_dict().items()}


if __name__ == "__main__":
    main()
