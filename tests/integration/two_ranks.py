"""Validate and test many classes in one process, or (run as a script, by `test_ranks.py`) in two at once."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from anomalib.engine import Engine
from anomalib.metrics import AUROC

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.csv_text import read_csv
from anomalib_aprilgan.data import MultiCategoryData
from anomalib_aprilgan.results.evaluator import ClassEvaluator

CATEGORIES = ["bottle", "metal_nut", "tile"]
# Number of references, and of test images: one that two processes share evenly, and one that they do not.
CASES = [(0, 32), (2, 31)]


def interleaved(dataset: str, number: int) -> MultiCategoryData:
    """Up to 32 test images in such an order that of two processes one sees all tiles, the other all nuts."""
    data = MultiCategoryData("mvtec", dataset, CATEGORIES, eval_batch_size=4, num_workers=0)
    data.setup()
    table = data.test_data.samples
    bottles, nuts, tiles = (table.index[table.class_name == name].tolist() for name in CATEGORIES)
    pairs = zip([*tiles, *bottles[:5]], [*bottles[5:], *nuts[:10]], strict=True)
    samples = table.loc[[index for pair in pairs for index in pair][:number]].reset_index(drop=True)
    samples.attrs = table.attrs
    data.test_data._samples = samples  # the setter of `samples` sorts by path
    return data


def evaluate(
    arguments: dict[str, Any], k_shot: int, number: int, dataset: str, folder: str, **trainer: Any
) -> dict[str, Any]:
    """Metrics, bounds and thresholds, and memory banks after a validation and a test."""
    of_scores, of_maps = {"fields": ["pred_score", "gt_label"]}, {"fields": ["anomaly_map", "gt_mask"]}
    usual = list(AprilGAN.configure_evaluator().test_metrics)
    in_validation = [AUROC(**of_scores, prefix="val_image_"), AUROC(**of_maps, prefix="val_pixel_")]
    model = AprilGAN(**arguments, k_shot=k_shot, evaluator=ClassEvaluator(in_validation, usual))
    runner = Engine(
        default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **trainer
    )
    data = interleaved(dataset, number)
    (metrics,) = runner.validate(model, datamodule=data, verbose=False)
    metrics |= runner.test(model, datamodule=data, verbose=False)[0]
    scorer = model.model.few_shot
    return {
        "metrics": metrics,
        "values": {name: model.post_processor.of_class(name).values() for name in model.classes.names},
        "regions": written(Path(runner.trainer.default_root_dir)) if runner.trainer.is_global_zero else [],
        "banks": [] if scorer is None else [scorer.features(row) for row in range(len(CATEGORIES))],
    }


def written(folder: Path) -> list[list[str]]:
    """Boxes and areas of all regions that a run has written, and how many files there are for the images."""
    rows = [list(row.values())[:8] for row in read_csv(folder / "regions.csv")]
    report = (folder / "report.html").read_text(encoding="utf-8")
    return [
        *rows,
        [str(len(list((folder / kind).rglob("*.png")))) for kind in ("masks", "maps")],
        [str("<svg" in report)],
    ]


def _run(rank: int, arguments: dict[str, Any], dataset: str, folder: str, port: int) -> None:
    # As torchrun would have it.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(1)
    results = [evaluate(arguments, *case, dataset, folder, devices=2, strategy="ddp") for case in CASES]
    torch.save(results, Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (json.loads(sys.argv[1]), *sys.argv[2:], port)
    # Forked, for what was imported is there already; nothing was computed yet.
    torch.multiprocessing.start_processes(_run, given, nprocs=2, start_method="fork")
