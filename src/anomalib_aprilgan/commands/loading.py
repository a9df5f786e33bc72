"""Models of checkpoints, ready to inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..lightning_model import AprilGAN


def load_for_inspection(path: Path) -> AprilGAN:
    """The model of a checkpoint, in evaluation mode; a FileNotFoundError or ValueError names a file that is none."""
    model: Any = AprilGAN.load_from_checkpoint(path, map_location="cpu")
    model.eval()
    found: AprilGAN = model
    return found
