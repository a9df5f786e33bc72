"""What compression changes: ``python -m anomalib_aprilgan.demo.studies.int8 --root datasets/DrawnInspection``.

On products of the categories that the adapters of the built-in CLIP never saw, without and with 4 references: decisions
of the model in torch and of its compressed graph in OpenVINO. The products of a category go into one graph. Thresholds
are calibrated with 26 other good pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.deploy import CompressionType
from rich.console import Console
from torchmetrics.functional.classification import binary_auroc

from ... import AprilGAN
from ...data.reading import load_image
from ...evaluation.tables import markdown
from ...files import write_atomically
from ...provenance import load_adapters
from ...runtime.openvino_core import compiled
from .. import built_in
from ..drawing import CATEGORIES
from ..inspection import DrawnInspection
from .built_in import build_model

_REFERENCES, _GOOD, _TEST, _FALSE_POSITIVE_RATE = 4, 30, 40, 0.05


def measured(root: Path, category: str, seeds: Sequence[int], k_shot: int, kind: str) -> dict[str, Any]:
    """Changed decisions, image AUROC before and after, size and seconds, of the products of a category."""
    products = {f"{category} {seed}": _product(root, category, seed) for seed in seeds}
    model = build_model(
        {name: name.replace("_", " ") for name in products},
        k_shot=k_shot,
        references={name: good[:_REFERENCES] for name, (good, _, _) in products.items()} if k_shot else None,
        calibration={name: good[_REFERENCES:] for name, (good, _, _) in products.items()},
        false_positive_rate=_FALSE_POSITIVE_RATE,
        export_options={"class_index": True},
    )
    with TemporaryDirectory() as folder:
        path = model.to_openvino(folder, compression_type=CompressionType(kind))
        report = json.loads((path.parent / "metadata.json").read_text())[path.name]["compression"]
        figures = [
            _compared(model, path, row, files, labels) for row, (_, files, labels) in enumerate(products.values())
        ]
    flips, number, before, after = (np.array(values) for values in zip(*figures, strict=True))
    return {
        "category": category,
        "k_shot": k_shot,
        "changed decisions": int(flips.sum()),
        "images": int(number.sum()),
        "AUROC before": float(before.mean()),
        "AUROC after": float(after.mean()),
        "megabytes": [report["megabytes"]["before"], report["megabytes"]["after"]],
    }


def _product(root: Path, category: str, seed: int) -> tuple[list[str], list[str], list[int]]:
    """Good training images, test images and their labels."""
    size = built_in.IMAGE_SIZE
    data = DrawnInspection(root, category, image_size=size, num_train=_GOOD, num_test=_TEST, seed=seed)
    data.prepare_data()
    data.setup()
    samples = data.test_data.samples
    return sorted(map(str, data.train_data.samples.image_path)), list(samples.image_path), list(samples.label_index)


@torch.no_grad()
def _compared(
    model: AprilGAN, path: Path, row: int, files: Sequence[str], labels: Sequence[int]
) -> tuple[int, int, float, float]:
    """Changed decisions, number of images, image AUROC before and after."""
    images, rows = torch.stack([load_image(Path(file)) for file in files]), torch.full((len(files),), row)
    before = model(images, class_index=rows)
    after = compiled(path)([images.numpy(), rows.numpy()])
    flips = int((after["pred_label"] != before.pred_label.numpy()).sum())
    truth = torch.tensor(labels)
    scores = before.pred_score, torch.from_numpy(after["pred_score"])
    first, second = (float(binary_auroc(values, truth)) for values in scores)
    return flips, len(files), first, second


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    seen = load_adapters(built_in.ADAPTERS)[1].trained_on["DrawnInspection"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("datasets/DrawnInspection"))
    parser.add_argument("--categories", nargs="+", default=[name for name in CATEGORIES if name not in seen])
    parser.add_argument("--seeds", type=int, nargs="+", default=[300, 301, 302, 303, 304], help="of the products")
    parser.add_argument("--compression_type", default="int8_ptq")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    console, rows = Console(width=140), []
    for k_shot in (0, 4):
        for category in options.categories:
            start = time.perf_counter()
            rows.append(measured(options.root, category, options.seeds, k_shot, options.compression_type))
            console.print(f"{rows[-1]} ({time.perf_counter() - start:.0f} s)")
    if options.out is not None:
        write_atomically(options.out, lambda file: file.write(json.dumps(rows, indent=1).encode()))
    header = ["shots", "category", "changed", "images", "AUROC before", "after", "MB before", "after"]
    table = [
        [str(row["k_shot"]), row["category"], str(row["changed decisions"]), str(row["images"])]
        + [f"{row[name]:.4f}" for name in ("AUROC before", "AUROC after")]
        + [f"{size:.2f}" for size in row["megabytes"]]
        for row in rows
    ]
    console.print(markdown(header, table), soft_wrap=True)


if __name__ == "__main__":
    main()
