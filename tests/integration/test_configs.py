"""Every YAML in configs/ runs through anomalib's command line on small data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anomalib_aprilgan import AprilGAN, built_in
from anomalib_aprilgan.checkpoint import load_adapters

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
FOLDERS = {"train_folder_masks.yaml", "train_folder_labels.yaml", "train_folder_good.yaml"}
BUILT_IN = {"built_in.yaml", "train_built_in.yaml"}


def anomalib(folder: Path, *arguments: str) -> str:
    """Output of a command that must succeed."""
    command = [str(Path(sys.executable).parent / "anomalib"), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout + process.stderr


def test_every_config_is_run_here() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(RECIPES) | FOLDERS | BUILT_IN


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_adapters(name: str, tmp_path: Path, small_clip: Any) -> None:
    make, dataset = RECIPES[name]
    root, categories = make(tmp_path / "data")
    anomalib(
        tmp_path,
        "fit",
        f"--config={CONFIGS / name}",
        f"--model.backbone={small_clip.quick_gelu}",
        f"--model.pretrained={small_clip.weights}",
        "--model.image_size=96",
        "--model.stages=[1, 2, 3, 4]",
        f"--data.root={root}",
        f"--data.categories={categories}",
        "--data.num_workers=0",
        "--trainer.max_epochs=1",
    )
    (path,) = tmp_path.glob("results/**/*.ckpt")
    learned = torch.load(path, weights_only=True)
    assert list(learned["anomalib_aprilgan"]["provenance"]["trained_on"]) == [dataset]
    assert learned["optimizer_states"][0]["param_groups"][0]["betas"] == (0.5, 0.999)


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_recipe_trains_adapters_on_own_folders(name: str, tmp_path: Path, small_clip: Any) -> None:
    """With what the recipe names and no more, elsewhere than it says."""
    root = tmp_path / "washers"
    shutil.copytree(DATASET / "metal_nut" / "train" / "good", root / "good")
    if name != "train_folder_good.yaml":
        shutil.copytree(DATASET / "metal_nut" / "test" / "hole", root / "bad")
    if name == "train_folder_masks.yaml":
        shutil.copytree(DATASET / "metal_nut" / "ground_truth" / "hole", root / "masks")
    anomalib(
        tmp_path,
        "fit",
        f"--config={CONFIGS / name}",
        f"--model.backbone={small_clip.quick_gelu}",
        f"--model.pretrained={small_clip.weights}",
        "--model.image_size=96",
        "--model.stages=[1, 2, 3, 4]",
        f"--data.datamodules.root={root}",
        "--data.datamodules.name=steel washer",
        "--data.num_workers=0",
        "--trainer.max_epochs=1",
    )
    (path,) = tmp_path.glob("results/**/*.ckpt")
    learned = torch.load(path, weights_only=True)["anomalib_aprilgan"]
    assert learned["class_names"] == {"steel washer": "steel washer"}
    assert learned["provenance"]["trained_on"] == {"steel washer": []}


def test_built_in_model_detects_what_it_never_saw(tmp_path: Path) -> None:
    output = anomalib(tmp_path, "train", f"--config={CONFIGS / 'built_in.yaml'}")
    (line,) = (line for line in output.splitlines() if "image_AUROC" in line)
    assert float(line.split("│")[2]) > 0.7


def test_training_of_the_built_in_adapters_writes_what_is_shipped(tmp_path: Path) -> None:
    anomalib(tmp_path, "fit", f"--config={CONFIGS / 'train_built_in.yaml'}", "--trainer.max_steps=2")
    (path,) = tmp_path.glob("results/**/*.ckpt")
    trained = AprilGAN.load_from_checkpoint(path).save_adapters(tmp_path / "adapters.safetensors")
    (weights, provenance), (shipped, shipped_provenance) = load_adapters(trained), load_adapters(built_in.ADAPTERS)
    assert {name: value.shape for name, value in weights.items()} == {name: v.shape for name, v in shipped.items()}
    assert replace(provenance, versions={}) == replace(shipped_provenance, versions={})
