"""What adapters learn from masks, from labels alone and from good parts alone.

python -m anomalib_aprilgan.demo.studies.supervision --root datasets/DrawnInspection --out figures.json

On drawn products: adapters of the built-in CLIP are trained on a few categories, read by anomalib's
``Folder`` as a user's own folders would be, once with masks, once without, once on the good pictures
alone with synthetic defects. They are tested on products of categories that neither they nor CLIP
were shown, beside untrained adapters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, Folder
from anomalib.engine import Engine
from lightning import seed_everything
from rich.console import Console

from ... import AprilGAN
from ...data import AuxiliaryData
from ...evaluation.tables import markdown
from ...files import write_atomically
from .. import built_in
from ..drawn_clip.pretrain import DRAWN_DEFECTS, UNSEEN_CATEGORIES
from ..inspection import DrawnInspection
from .built_in import (
    PIXEL_METRICS,
    Product,
    figures_of,
    load_product,
    mean_and_deviation,
    raw_scores,
    untrained,
)

TRAINED_CATEGORIES = ("bearing", "brick", "carpet", "cookie", "pill", "wood")
TRAINING_SEED = 910
SUPERVISION = ("masks", "labels", "good parts")
UNTRAINED = "untrained adapters"
# Good pictures that get a synthetic defect, where there are no others.
SYNTHETIC_RATE = 0.5
LEARNING_PICTURES = 88


def folders(root: Path, supervision: str, seed: int) -> AuxiliaryData:
    """The training categories as folders of a user who has this and no more, the same number of pictures each.

    Args:
        root: Folder of the drawn pictures, drawn on first use.
        supervision: One of ``SUPERVISION``.
        seed: Seed of the order and of synthetic defects.
    """
    datamodules: list[AnomalibDataModule] = []
    for category in TRAINED_CATEGORIES:
        drawn = DrawnInspection(
            root=root,
            category=category,
            image_size=built_in.IMAGE_SIZE,
            num_train=LEARNING_PICTURES,
            num_test=LEARNING_PICTURES // 2,
            seed=TRAINING_SEED,
            defects=list(DRAWN_DEFECTS),
        )
        drawn.prepare_data()
        folder = drawn.dataset_root / category
        kinds = sorted(path.name for path in (folder / "ground_truth").iterdir())
        bad: dict[str, Any] = {
            "normal_test_dir": "test/good",
            "abnormal_dir": [f"test/{kind}" for kind in kinds],
            "mask_dir": [f"ground_truth/{kind}" for kind in kinds] if supervision == "masks" else None,
        }
        given = {} if supervision == "good parts" else bad
        datamodules.append(Folder(name=category, root=folder, normal_dir="train/good", num_workers=0, **given))
    rate = SYNTHETIC_RATE if supervision == "good parts" else 0.0
    return AuxiliaryData(datamodules=datamodules, synthetic_rate=rate, train_batch_size=16, num_workers=0, seed=seed)


def train(data: AuxiliaryData, epochs: int, seed: int) -> dict[str, torch.Tensor]:
    """Adapters of the built-in CLIP, trained on this data on the CPU."""
    seed_everything(seed, verbose=False)
    model = _model(adapters=None)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "default_root_dir": folder}
        engine = Engine(max_epochs=epochs, accelerator="cpu", devices=1, **options)
        engine.fit(model, datamodule=data)
    return {name: value.detach().clone() for name, value in model.model.adapters.state_dict().items()}


def inspect(adapters: Mapping[str, torch.Tensor], category: str, product: Product) -> dict[str, float]:
    """Figures of these adapters on a product, zero-shot."""
    model = _model(class_name=category)
    model.setup("predict")
    model.model.adapters.load_state_dict(adapters)
    score, anomaly_map = raw_scores(model, product)
    return figures_of(score, anomaly_map / len(built_in.STAGES), product)


def measure(root: Path, epochs: int, seeds: Sequence[int]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Figures by category and supervision: a list with one value a product, each with adapters trained anew."""
    trained = {(name, seed): train(folders(root, name, seed), epochs, seed) for name in SUPERVISION for seed in seeds}
    seed_everything(0, verbose=False)
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for category in UNSEEN_CATEGORIES:
        for seed in seeds:
            product = load_product(root, category, seed)
            measured = untrained(lambda name, **given: _model(class_name=name, **given), category, product)
            measured |= {name: inspect(trained[name, seed], category, product) for name in SUPERVISION}
            for name, figures in measured.items():
                for metric in PIXEL_METRICS:
                    results.setdefault(category, {}).setdefault(name, {}).setdefault(metric, []).append(figures[metric])
    return results


def table(results: Mapping[str, Any]) -> str:
    """Markdown: pixel figures over all categories, one row for every supervision."""
    rows = [
        (name, *(mean_and_deviation(results, list(results), name, metric) for metric in PIXEL_METRICS))
        for name in (UNTRAINED, *SUPERVISION)
    ]
    return markdown(("trained on", *PIXEL_METRICS), rows)


def _model(**arguments: Any) -> AprilGAN:  # noqa: ANN401  # arguments of the model
    given: dict[str, Any] = {
        "backbone": built_in.ARCHITECTURE,
        "pretrained": built_in.PRETRAINED,
        "image_size": built_in.IMAGE_SIZE,
        "stages": built_in.STAGES,
    }
    return AprilGAN(**given | arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print a Markdown table, write the single values."""
    parser = argparse.ArgumentParser(description="Compare adapters trained on masks, labels and good parts.")
    parser.add_argument("--root", type=Path, default=Path("datasets/DrawnInspection"), help="folder of drawn pictures")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of every training")
    parser.add_argument("--seeds", type=int, default=3, help="number of products tested a category")
    parser.add_argument("--first-seed", type=int, default=300, help="the first product; the others follow")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the single values")
    options = parser.parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results = measure(options.root, options.epochs, seeds)
    content = json.dumps({"seeds": list(seeds), "epochs": options.epochs, "figures": results}, indent=1).encode()
    write_atomically(options.out, lambda file: file.write(content))
    console = Console(width=160, soft_wrap=True, highlight=False)
    console.print(f"{', '.join(results)}: {len(seeds)} products each, with adapters trained anew for each;")
    console.print("mean ± deviation between the products\n")
    console.print(f"{table(results)}\n")


if __name__ == "__main__":
    main()
