"""Every YAML in configs/ runs through anomalib's command line on small data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..conftest import DATASET

CONFIGS = Path(__file__).parents[2] / "configs"


def mvtec(_: Path) -> tuple[Path, str]:
    return DATASET, "[bottle, tile]"


def visa(folder: Path) -> tuple[Path, str]:
    """The layout that anomalib's Visa leaves after its split, with two of VisA's names."""
    for ours, name in (("bottle", "candle"), ("tile", "pcb1")):
        category = folder / "visa_pytorch" / name
        shutil.copytree(DATASET / ours / "train", category / "train")
        shutil.copytree(DATASET / ours / "test" / "good", category / "test" / "good")
        shutil.copytree(DATASET / ours / "test" / "scratch", category / "test" / "bad")
        (category / "ground_truth" / "bad").mkdir(parents=True)
        for mask in (DATASET / ours / "ground_truth" / "scratch").iterdir():
            shutil.copy(mask, category / "ground_truth" / "bad" / mask.name.replace("_mask", ""))
    return folder, "[candle, pcb1]"


RECIPES = {"train_mvtec.yaml": (mvtec, "MVTecAD"), "train_visa.yaml": (visa, "Visa")}


def test_every_config_is_run_here() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_adapters(name: str, tmp_path: Path, small_clip: Any) -> None:
    make, dataset = RECIPES[name]
    root, categories = make(tmp_path / "data")
    arguments = [
        f"--config={CONFIGS / name}",
        f"--model.backbone={small_clip.quick_gelu}",
        f"--model.pretrained={small_clip.weights}",
        "--model.image_size=96",
        "--model.stages=[1, 2, 3, 4]",
        f"--data.root={root}",
        f"--data.categories={categories}",
        "--data.num_workers=0",
        "--trainer.max_epochs=1",
    ]
    command = [str(Path(sys.executable).parent / "anomalib"), "fit", *arguments]
    process = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    (path,) = tmp_path.glob("results/**/*.ckpt")
    learned = torch.load(path, weights_only=True)
    assert list(learned["anomalib_aprilgan"]["provenance"]["trained_on"]) == [dataset]
    assert learned["optimizer_states"][0]["param_groups"][0]["betas"] == (0.5, 0.999)
