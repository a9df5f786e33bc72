"""anomalib's command line as a user types it; in a process of its own where that is what is tested."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch
from omegaconf import OmegaConf

from ..conftest import DATASET

Run = Callable[..., str]
ANOMALIB = str(Path(sys.executable).parent / "anomalib")


@pytest.fixture(scope="module")
def model_arguments(small_clip: Any) -> list[str]:
    return [
        "--model=AprilGAN",
        f"--model.backbone={small_clip.quick_gelu}",
        f"--model.pretrained={small_clip.weights}",
        "--model.image_size=96",
        "--model.stages=[1, 2, 3, 4]",
        f"--model.adapters={small_clip.adapters_4}",
    ]


DATA_ARGUMENTS = ["--data=MVTecAD", f"--data.root={DATASET}", "--data.category=bottle", "--data.num_workers=0"]


def run_process(folder: Path, *arguments: str) -> str:
    """Output of an anomalib command that must succeed, in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    process = subprocess.run(
        [ANOMALIB, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout + process.stderr


def _metrics(output: str) -> dict[str, float]:
    """The table that anomalib prints."""
    rows = (line.split("│") for line in output.splitlines() if line.startswith("│"))
    return {name.strip(): float(value) for _, name, value, *_ in rows if name.strip().startswith(("image_", "pixel_"))}


METRICS = {f"image_{name}" for name in ("AUROC", "F1Max", "AUPR")} | {
    f"pixel_{name}" for name in ("AUROC", "F1Max", "AUPR", "AUPRO")
}


def test_train_prints_all_metrics_and_writes_a_small_checkpoint(tmp_path: Path, model_arguments: list[str]) -> None:
    metrics = _metrics(run_process(tmp_path, "train", *model_arguments, *DATA_ARGUMENTS))
    assert set(metrics) == METRICS
    # 0.607 and 0.818 are what the raw scores give; anomalib's own clamping scale prints 0.500 and 0.656.
    assert metrics["image_AUROC"] == pytest.approx(0.6071428, abs=1e-4)
    assert metrics["image_AUPR"] == pytest.approx(0.8182900, abs=1e-4)
    (checkpoint,) = tmp_path.glob("results/AprilGAN/MVTecAD/bottle/v0/weights/lightning/*.ckpt")
    assert checkpoint.stat().st_size < 100_000  # the CLIP alone has 10 MB
    pictures = list(tmp_path.glob("results/AprilGAN/MVTecAD/bottle/v0/images/**/*.png"))
    assert len(pictures) == 11


def test_fit_trains_fresh_adapters_and_test_uses_them(
    anomalib: Run, tmp_path: Path, small_clip: Any, model_arguments: list[str]
) -> None:
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": "AprilGAN",
            "init_args": {
                "backbone": str(small_clip.quick_gelu),
                "pretrained": str(small_clip.weights),
                "image_size": 96,
                "stages": [1, 2, 3, 4],
                "adapters": None,
            },
        },
        "data": {
            "class_path": "AuxiliaryData",
            "init_args": {
                "dataset": "mvtec",
                "root": str(DATASET),
                "categories": ["metal_nut", "tile"],
                "mosaic_rate": 0.2,
                "num_workers": 0,
            },
        },
        "trainer": {"max_epochs": 1},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
    }
    OmegaConf.save(config, tmp_path / "fit.yaml")
    anomalib("fit", "--config=fit.yaml")
    (path,) = tmp_path.glob("results/AprilGAN/AuxiliaryData/v0/weights/lightning/*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.005  # --optimizer and --lr_scheduler hold
    assert checkpoint["anomalib_aprilgan"]["provenance"]["trained_on"] == {"MVTecAD": ["metal_nut", "tile"]}
    assert not any("_backbone" in name for name in checkpoint["state_dict"])
    output = anomalib("test", *model_arguments, *DATA_ARGUMENTS, f"--ckpt_path={path}")
    assert set(_metrics(output)) == METRICS
    assert "NOT ZERO-SHOT" not in output
    seen = [argument.replace("bottle", "tile") for argument in DATA_ARGUMENTS]
    assert "NOT ZERO-SHOT" in anomalib("test", *model_arguments, *seen, f"--ckpt_path={path}")


def test_validate_learns_thresholds_into_a_checkpoint(
    anomalib: Run, tmp_path: Path, model_arguments: list[str]
) -> None:
    anomalib("validate", *model_arguments, *DATA_ARGUMENTS)
    (path,) = tmp_path.glob("results/**/*.ckpt")
    state_dict = torch.load(path, weights_only=True)["state_dict"]
    assert 0.0 < state_dict["post_processor.image_min"] < state_dict["post_processor.image_max"] < 1.0


@pytest.mark.parametrize("few_shot", [False, True], ids=["zero-shot", "few-shot"])
def test_predict_takes_a_plain_folder(
    anomalib: Run, tmp_path: Path, model_arguments: list[str], few_shot: bool
) -> None:
    references = ["--model.k_shot=4", f"--model.references={DATASET / 'tile' / 'train' / 'good'}"] if few_shot else []
    folder = DATASET / "tile" / "test" / "hole"
    output = anomalib("predict", *model_arguments, *references, f"--data={folder}")
    assert ("References" in output) == few_shot
    assert {path.name for path in tmp_path.glob("results/AprilGAN/latest/images/**/*.png")} == {
        path.name for path in folder.iterdir()
    }


@pytest.mark.thorough
def test_export_writes_the_model(anomalib: Run, tmp_path: Path, model_arguments: list[str]) -> None:
    """To OpenVINO it is a command of the documentation, and run as such."""
    for export_type, name in (("torch", "model.pt"), ("onnx", "model.onnx")):
        anomalib("export", *model_arguments, f"--export_type={export_type}")
        assert (tmp_path / "results" / "weights" / export_type / name).stat().st_size > 10_000


def test_benchmark_of_anomalib_runs_the_model_beside_patchcore(anomalib: Run, tmp_path: Path, small_clip: Any) -> None:
    """anomalib's table wants the same arguments and metrics of all models: theirs in one string, and its own."""

    def entry(class_path: str, arguments: dict[str, Any]) -> dict[str, str]:
        said = ", ".join(f"{name}: {json.dumps(value)}" for name, value in arguments.items())
        return {"class_path": class_path, "init_args": f"${{oc.decode:'{{{said}}}'}}"}

    ours = {
        "backbone": str(small_clip.quick_gelu),
        "pretrained": str(small_clip.weights),
        "image_size": 96,
        "stages": [1, 2, 3, 4],
        "adapters": str(small_clip.adapters_4),
        "evaluator": "anomalib",
    }
    patchcore = {"backbone": "resnet18", "layers": ["layer2"], "pre_trained": False}
    models = [entry("AprilGAN", ours), entry("AprilGAN", ours | {"k_shot": 4}), entry("Patchcore", patchcore)]
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 42,
            "model": {"grid": models},
            "data": {
                "class_path": "MVTecAD",
                "init_args": {"root": str(DATASET), "category": "bottle", "num_workers": 0},
            },
        },
    }
    (tmp_path / "benchmark.yaml").write_text(json.dumps(config))  # JSON is YAML
    anomalib("benchmark", "--config=benchmark.yaml")
    (table,) = tmp_path.glob("runs/benchmark/*/results.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model.class_path"] for row in rows] == ["AprilGAN", "AprilGAN", "Patchcore"]
    assert float(rows[0]["image_AUROC"]) == pytest.approx(0.6071428, abs=1e-4)
    assert rows[0]["pixel_AUROC"] != rows[1]["pixel_AUROC"]
    assert all(0.0 <= float(row[name]) <= 1.0 for row in rows for name in ("image_F1Score", "pixel_F1Score"))


@pytest.mark.thorough
def test_class_path_without_the_hook(tmp_path: Path, model_arguments: list[str]) -> None:
    arguments = ["--model=anomalib_aprilgan.AprilGAN", *model_arguments[1:]]
    environment = {**os.environ, "ANOMALIB_APRILGAN_NO_AUTOLOAD": "1"}
    process = subprocess.run(
        [ANOMALIB, "validate", *arguments, *DATA_ARGUMENTS], cwd=tmp_path, env=environment, check=False
    )
    assert process.returncode == 0
    assert list(tmp_path.glob("results/**/*.ckpt"))


def test_unavailable_weights_end_with_the_remedy(
    anomalib: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pretrained=/path/to/file"):
        anomalib("predict", "--model=AprilGAN", f"--data={DATASET / 'tile' / 'test' / 'hole'}")


def test_image_batch_of_anomalib_is_what_the_steps_expect() -> None:
    """anomalib's batch has no class names; ours has, and stays a batch of theirs."""
    from anomalib_aprilgan.data.multi_category import ClassImageBatch

    assert issubclass(ClassImageBatch, ImageBatch)
    batch = ClassImageBatch(image=torch.rand(2, 3, 4, 4), class_name=["nut", "tile"])
    assert [item.class_name for item in batch] == ["nut", "tile"]
