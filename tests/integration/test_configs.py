"""Every YAML in configs/ but those of the benchmark runs through anomalib's command line on small data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anomalib_aprilgan import AprilGAN, config_files
from anomalib_aprilgan.command import main
from anomalib_aprilgan.demo import built_in
from anomalib_aprilgan.provenance import load_adapters

from ..conftest import DATASET

Run = Callable[..., str]


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


RECIPES = {"train/mvtec": (mvtec, "MVTecAD"), "train/visa": (visa, "Visa")}
FOLDERS = {"train/folder_masks", "train/folder_labels", "train/folder_good"}
BUILT_IN = {"model/built_in", "train/built_in"}
# test_benchmark.py runs these.
BENCHMARKS = {"benchmark/compare", "benchmark/built_in", "benchmark/data_sets"}
BENCHMARKS |= {"benchmark/reproduce_mvtec_ad", "benchmark/reproduce_visa"}


def test_every_config_is_run_here() -> None:
    assert set(config_files.names()) == set(RECIPES) | FOLDERS | BUILT_IN | BENCHMARKS


def test_the_command_names_configs_and_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config"])
    assert capsys.readouterr().out.split() == config_files.names()
    main(["config", "train/visa"])
    assert Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8").startswith("# The paper's adapters")
    with pytest.raises(SystemExit):
        main(["config", "train/vis"])
    assert "There is no config 'train/vis' in" in capsys.readouterr().err


@pytest.fixture
def fit(anomalib: Run, tmp_path: Path, small_clip: Any) -> Callable[..., dict[str, Any]]:
    """Trains adapters of the small CLIP by a config for an epoch; returns what the checkpoint holds."""

    def run(name: str, *data: str) -> dict[str, Any]:
        anomalib(
            "fit",
            f"--config={config_files.path_of(name)}",
            f"--model.backbone={small_clip.quick_gelu}",
            f"--model.pretrained={small_clip.weights}",
            "--model.image_size=96",
            "--model.stages=[1, 2, 3, 4]",
            *data,
            "--data.num_workers=0",
            "--trainer.max_epochs=1",
        )
        (path,) = tmp_path.glob("results/**/*.ckpt")
        learned: dict[str, Any] = torch.load(path, weights_only=True)
        return learned

    return run


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_adapters(name: str, fit: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    make, dataset = RECIPES[name]
    root, categories = make(tmp_path / "data")
    learned = fit(name, f"--data.root={root}", f"--data.categories={categories}")
    assert list(learned["anomalib_aprilgan"]["provenance"]["trained_on"]) == [dataset]
    assert learned["optimizer_states"][0]["param_groups"][0]["betas"] == (0.5, 0.999)


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_recipe_trains_adapters_on_own_folders(name: str, fit: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """With what the recipe names and no more, elsewhere than it says."""
    root = tmp_path / "washers"
    shutil.copytree(DATASET / "metal_nut" / "train" / "good", root / "good")
    if name != "train/folder_good":
        shutil.copytree(DATASET / "metal_nut" / "test" / "hole", root / "bad")
    if name == "train/folder_masks":
        shutil.copytree(DATASET / "metal_nut" / "ground_truth" / "hole", root / "masks")
    learned = fit(name, f"--data.datamodules.root={root}", "--data.datamodules.name=steel washer")["anomalib_aprilgan"]
    assert learned["classes"] == [["steel washer", "steel washer"]]
    assert learned["provenance"]["trained_on"] == {"steel washer": []}


def test_built_in_model_detects_what_it_never_saw(anomalib: Run) -> None:
    output = anomalib("train", f"--config={config_files.path_of('model/built_in')}")
    (line,) = (line for line in output.splitlines() if "image_AUROC" in line)
    assert float(line.split("│")[2]) > 0.7


@pytest.mark.thorough
def test_training_of_the_built_in_adapters_writes_what_is_shipped(anomalib: Run, tmp_path: Path) -> None:
    """All categories and kinds of defects of the recipe, a twelfth of the images: drawing takes the time."""
    recipe = config_files.path_of("train/built_in").read_text()
    assert "num_test: 132" in recipe
    (tmp_path / "few.yaml").write_text(recipe.replace("num_test: 132", "num_test: 11"))
    anomalib("fit", "--config=few.yaml", "--trainer.max_steps=2")
    (path,) = tmp_path.glob("results/**/*.ckpt")
    model = AprilGAN.load_from_checkpoint(path)
    model.setup("predict")
    trained = model.save_adapters(tmp_path / "adapters.safetensors")
    (weights, provenance), (shipped, shipped_provenance) = load_adapters(trained), load_adapters(built_in.ADAPTERS)
    assert {name: value.shape for name, value in weights.items()} == {name: v.shape for name, v in shipped.items()}
    # The shipped ones know CLIP by the digest of 0.1.0.
    assert all(model.model.backbone.matches(one.fingerprint) for one in (provenance, shipped_provenance))
    unlike: dict[str, Any] = {"versions": {}, "fingerprint": None}
    assert replace(provenance, **unlike) == replace(shipped_provenance, **unlike)
