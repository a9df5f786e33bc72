"""Writes the checkpoints and predictions in this folder; runs with version 0.1.0 of the package, see README.md."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch import seed_everything
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
PARITY = HERE.parents[1] / "parity"
sys.path.insert(0, str(PARITY))

from make_weights import adapter_state_dict, clip_state_dict  # noqa: E402  # beside the golden outputs

from anomalib_aprilgan import AprilGAN, AuxiliaryData  # noqa: E402
from anomalib_aprilgan.data import MultiCategoryData  # noqa: E402

DATASET = Path("golden/dataset")
GOOD = {name: [str(DATASET / name / f"train/good/00{number}.png") for number in (0, 1)] for name in ("bottle", "tile")}
IMAGES = [
    f"golden/dataset/{name}.png" for name in ("bottle/test/good/000", "bottle/test/hole/000", "tile/test/hole/001")
]
EVERY = 8  # of the map's rows and columns, what is kept


def build(**arguments: Any) -> AprilGAN:
    given = {"stages": (2, 4), "adapters": "adapters.pth", "memory_stages": (3,), "image_size": 64} | arguments
    return AprilGAN(backbone="golden/ViT-tiny-quickgelu.json", pretrained="clip.safetensors", visualizer=False, **given)


def engine(**options: Any) -> Engine:
    return Engine(
        default_root_dir="runs", accelerator="cpu", devices=1, enable_progress_bar=False, logger=False, **options
    )


def bottle() -> MVTecAD:
    return MVTecAD(root=DATASET, category="bottle", num_workers=0)


def zero_shot() -> tuple[AprilGAN, Engine]:
    model, runner = build(), engine()
    runner.test(model, datamodule=bottle(), verbose=False)
    return model, runner


def few_shot() -> tuple[AprilGAN, Engine]:
    model, runner = build(k_shot=2, references=GOOD["bottle"]), engine()
    runner.test(model, datamodule=bottle(), verbose=False)
    return model, runner


def two_classes() -> tuple[AprilGAN, Engine]:
    model, runner = build(k_shot=2, references=GOOD), engine()
    data = MultiCategoryData("mvtec", DATASET, ["bottle", "tile"], num_workers=0)
    runner.test(model, datamodule=data, verbose=False)
    return model, runner


def calibrated() -> tuple[AprilGAN, Engine]:
    arguments = {"calibration": "references", "false_positive_rate": 0.1, "class_name": "bottle"}
    model, runner = build(k_shot=2, references=GOOD["bottle"], **arguments), engine()
    runner.test(model, datamodule=bottle(), verbose=False)
    return model, runner


def trained() -> tuple[AprilGAN, Engine]:
    seed_everything(0)
    model, runner = build(adapters=None), engine(max_epochs=1)
    data = AuxiliaryData("mvtec", DATASET, ["metal_nut", "tile"], num_workers=0, train_batch_size=4)
    runner.fit(model, datamodule=data)
    return model, runner


def read(path: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None] / 255


def predictions(model: AprilGAN) -> dict[str, Any]:
    """By class and image: label, raw score, fused where there are references, and a part of the raw map."""
    found: dict[str, Any] = {}
    several = len(model.model.class_names) > 1
    for name in model.model.class_names:
        of_class = found[name] = {"values": model.post_processor.of_class(name).values(), "images": {}}
        for path in IMAGES:
            asked = [name] if several else []
            model.post_processor.enable_normalization = True
            label = model(read(path), *asked).pred_label.item()
            model.post_processor.enable_normalization = False
            raw = model(read(path), *asked)
            of_class["images"][path] = {
                "label": label,
                "score": raw.pred_score.item(),
                "map_maximum": raw.anomaly_map.amax().item(),
                "map": raw.anomaly_map[0, ::EVERY, ::EVERY].tolist(),
            }
    return found


def main() -> None:
    cases = (zero_shot, few_shot, two_classes, calibrated, trained)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("golden").symlink_to(PARITY / "golden")
        config = json.loads(Path("golden/ViT-tiny-gelu.json").read_text())
        weights = {key: torch.from_numpy(np.array(value)) for key, value in clip_state_dict(config, 1234).items()}
        save_file(weights, "clip.safetensors")
        adapters = {key: torch.from_numpy(value) for key, value in adapter_state_dict(64, 40, 2, 98).items()}
        torch.save({"trainable_linearlayer": adapters}, "adapters.pth")
        found = {}
        for case in cases:
            model, runner = case()
            runner.trainer.save_checkpoint(HERE / f"{case.__name__}.ckpt")
            model.eval()
            with torch.no_grad():
                found[case.__name__] = predictions(model)
            shutil.rmtree("runs", ignore_errors=True)
        (HERE / "predictions.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
