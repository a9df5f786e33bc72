"""What the tests of whole runs share: an Engine on the CPU, data of one category, and raw predictions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch, MVTecAD
from anomalib.engine import Engine
from PIL import Image

from anomalib_aprilgan import AprilGAN, AuxiliaryData

from ..conftest import DATASET


def engine(folder: Path, **options: Any) -> Engine:
    given = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False} | options
    return Engine(default_root_dir=folder, **given)


def category(name: str, **options: Any) -> MVTecAD:
    return MVTecAD(root=DATASET, category=name, num_workers=0, **options)


def auxiliary(**options: Any) -> AuxiliaryData:
    arguments: dict[str, Any] = {"categories": ["metal_nut", "tile"], "num_workers": 0, "train_batch_size": 4}
    return AuxiliaryData(dataset="mvtec", root=DATASET, **(arguments | options))


def good(name: str) -> Path:
    """The folder of a category's normal training images."""
    return DATASET / name / "train" / "good"


def read(path: str | Path) -> torch.Tensor:
    """``(1, 3, H, W)``, the image of a file, in ``[0, 1]``."""
    pixels = np.array(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def adapters(model: AprilGAN) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.model.adapters.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def by_path(batches: Iterable[ImageBatch]) -> dict[str, dict[str, torch.Tensor]]:
    """By image file, what a run predicted for it."""
    found = {}
    for batch in batches:
        for place, path in enumerate(batch.image_path):
            fields = ("pred_score", "anomaly_map", "pred_label", "pred_mask", "gt_label")
            values = {name: getattr(batch, name) for name in fields}
            found[path] = {name: value[place] for name, value in values.items() if value is not None}
    return found
