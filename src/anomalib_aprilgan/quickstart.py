"""The whole of it in a minute, offline: train adapters, inspect a product they never saw, look at heatmaps.

The CLIP of this run is small and its weights are random: it shows how things are run and what
comes out, not how well APRIL-GAN detects.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from .backbone import ClipArchitecture, random_weights
from .data import AuxiliaryData, DrawnInspection
from .evaluation.figures import heatmap_figure
from .lightning_model import AprilGAN
from .weights import write_atomically

TRAINING_CATEGORIES = ("tile", "wood", "carpet", "grid", "brick", "bottle_cap", "screw", "pill", "gear", "nut")
INSPECTED_CATEGORY = "washer"
SHOWN_DEFECTS = ("scratch", "stain", "missing_piece", "contamination")
IMAGE_SIZE = 128


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the quickstart; ``--root`` says where everything goes."""
    parser = argparse.ArgumentParser(description="Train and try APRIL-GAN on drawn data, offline, in a minute.")
    parser.add_argument("--root", type=Path, default=Path("results/quickstart"), help="folder for all that is written")
    root: Path = parser.parse_args(arguments).root
    console = Console()
    seed_everything(0, verbose=False)
    with as_file(files("anomalib_aprilgan") / "small_clip.json") as config:
        weights = write_weights(root / "small_clip.safetensors", str(config))
        clip = {
            "backbone": str(config),
            "pretrained": str(weights),
            "image_size": IMAGE_SIZE,
            "stages": (1, 2, 3, 4),
        }
        console.rule(f"Training adapters on {len(TRAINING_CATEGORIES)} drawn categories")
        adapters = train(root, clip)
        inspected = DrawnInspection(root=root / "data", category=INSPECTED_CATEGORY, image_size=IMAGE_SIZE, num_test=28)
        maps: dict[str, list[Tensor]] = {}
        for k_shot in (0, 4):
            console.rule(f"{k_shot}-shot on the category {INSPECTED_CATEGORY!r}, which they never saw")
            predictions = inspect(root / f"{k_shot}-shot", clip, adapters, k_shot, inspected)
            shown = _shown_images(predictions)
            maps[f"{k_shot}-shot"] = [predictions[image] for image in shown]
    masks = [_mask_of(image) for image in shown]
    heatmap_figure(shown, masks, maps, root / "heatmaps.png")
    console.print(f"Heatmaps of {len(shown)} defects: {root / 'heatmaps.png'}")
    console.print(f"A picture of every test image: {root}/*-shot/**/images")


def write_weights(path: Path, config: str) -> Path:
    """Generated weights of the small CLIP, written once."""
    if not path.is_file():
        content = save(random_weights(ClipArchitecture.load(config, (IMAGE_SIZE, IMAGE_SIZE), None), seed=0))
        write_atomically(path, lambda file: file.write(content))
    return path


def train(root: Path, clip: dict[str, Any]) -> Path:
    """Adapters trained on the test images of the training categories, with their provenance."""
    sources = [
        DrawnInspection(root=root / "data", category=name, image_size=IMAGE_SIZE, num_train=1, num_test=14)
        for name in TRAINING_CATEGORIES
    ]
    model = AprilGAN(**clip, adapters=None)
    engine = Engine(default_root_dir=root / "training", max_epochs=3)
    engine.fit(model, datamodule=AuxiliaryData(datamodules=[*sources], num_workers=0))
    return model.save_adapters(root / "adapters.safetensors")


def inspect(
    root: Path, clip: dict[str, Any], adapters: Path, k_shot: int, inspected: DrawnInspection
) -> dict[Path, Tensor]:
    """Test and predict through anomalib's Engine, which prints its table and writes a picture per image."""
    model = AprilGAN(**clip, adapters=str(adapters), k_shot=k_shot)
    engine = Engine(default_root_dir=root)
    engine.test(model, datamodule=inspected)
    batches: list[Any] = engine.predict(model, datamodule=inspected) or []
    return {
        Path(path): anomaly_map
        for batch in batches
        for path, anomaly_map in zip(batch.image_path, batch.anomaly_map, strict=True)
    }


def _shown_images(predictions: dict[Path, Tensor]) -> list[Path]:
    return [next(path for path in sorted(predictions) if path.parent.name == defect) for defect in SHOWN_DEFECTS]


def _mask_of(image: Path) -> Path:
    """MVTec AD's place for the mask of a test image."""
    category = image.parents[2]
    return category / "ground_truth" / image.parent.name / f"{image.stem}_mask.png"


if __name__ == "__main__":
    main()
