"""What most tests need: a small CLIP with generated weights, adapters for it, and a data set of three categories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_weights import adapter_state_dict, checksum, clip_state_dict
from safetensors.torch import save_file

from anomalib_aprilgan import AprilGAN

GOLDEN = Path(__file__).parent / "parity" / "golden"
DATASET = GOLDEN / "dataset"
CLIP_SHA256 = "98d07ac0"  # of the weights the golden outputs were recorded with


def pytest_configure() -> None:
    """Workers share the cores, as do the processes they start: with all threads each, twice the time is spent."""
    threads = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


@dataclass(frozen=True)
class SmallClip:
    """Files of a CLIP of 4 blocks: 64 px grid, patch 8, width 64, joint width 40."""

    quick_gelu: Path
    gelu: Path
    weights: Path
    adapters_4: Path
    adapters_2: Path


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> SmallClip:
    folder = tmp_path_factory.mktemp("small_clip")
    config = json.loads((GOLDEN / "ViT-tiny-gelu.json").read_text())
    state_dict = clip_state_dict(config, 1234)
    assert checksum(state_dict).startswith(CLIP_SHA256)
    save_file(
        {name: torch.from_numpy(np.array(value)) for name, value in state_dict.items()}, folder / "clip.safetensors"
    )
    for stages, seed in ((4, 99), (2, 98)):
        adapters = {name: torch.from_numpy(value) for name, value in adapter_state_dict(64, 40, stages, seed).items()}
        torch.save({"trainable_linearlayer": adapters}, folder / f"adapters_{stages}.pth")
    return SmallClip(
        GOLDEN / "ViT-tiny-quickgelu.json",
        GOLDEN / "ViT-tiny-gelu.json",
        folder / "clip.safetensors",
        folder / "adapters_4.pth",
        folder / "adapters_2.pth",
    )


@pytest.fixture(scope="session")
def april_gan(small_clip: SmallClip) -> Callable[..., AprilGAN]:
    """Builds an AprilGAN on the small CLIP; arguments override."""

    def build(**overrides: Any) -> AprilGAN:
        arguments: dict[str, Any] = {
            "backbone": str(small_clip.quick_gelu),
            "pretrained": str(small_clip.weights),
            "image_size": 96,
            "stages": (1, 2, 3, 4),
            "adapters": str(small_clip.adapters_4),
        }
        return AprilGAN(**(arguments | overrides))

    return build
