"""How many good parts a calibrated threshold flags, and how many defects it finds, with the built-in CLIP.

python -m anomalib_aprilgan.demo.studies.calibration --root datasets/DrawnInspection --out calibration.json

On products of the categories that the adapters never saw: 4 references, 50 other good pictures to calibrate with, 200
more that nothing has seen, and 42 defective ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ... import AprilGAN
from ...data.reading import load_image
from ...evaluation.tables import markdown
from ...files import write_atomically
from ...provenance import load_adapters
from .. import built_in
from ..drawing import CATEGORIES
from ..inspection import DrawnInspection
from .built_in import build_model

FALSE_POSITIVE_RATE = 0.05
REFERENCES, HELD_OUT, FRESH, DEFECTIVE = 4, 50, 200, 42
# Shares of flagged good parts that a single calibration should stay within.
BANDS = ((0.01, 0.15), (0.02, 0.09))
# Flagged good parts and found defects, as shares.
Shares = tuple[float, float]


@dataclass(frozen=True)
class Parts:
    """Pictures of one product.

    Attributes:
        references: Files of good ones to be remembered.
        held_out: Files of good ones to calibrate with.
        fresh: ``(200, 3, H, W)`` in ``[0, 1]``, good.
        defective: ``(42, 3, H, W)``.
    """

    references: list[str]
    held_out: list[str]
    fresh: Tensor
    defective: Tensor


def load_parts(root: Path, category: str, seed: int) -> Parts:
    """A product from disk, drawn on first use."""
    number = REFERENCES + HELD_OUT + FRESH
    data = DrawnInspection(
        root=root,
        category=category,
        image_size=built_in.IMAGE_SIZE,
        num_train=number,
        num_test=DEFECTIVE,
        seed=seed,
    )
    data.prepare_data()
    data.setup()
    good = sorted(str(path) for path in data.train_data.samples.image_path)
    samples = data.test_data.samples
    bad = sorted(samples.image_path[samples.label_index == 1])
    fresh, defective = (
        torch.stack([load_image(Path(file)) for file in files]) for files in (good[REFERENCES + HELD_OUT :], bad)
    )
    return Parts(good[:REFERENCES], good[REFERENCES : REFERENCES + HELD_OUT], fresh, defective)


def settings_of(parts: Parts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ways to come by a threshold, and the arguments of the model for each."""
    yield "0-shot, not calibrated", {}
    yield f"0-shot, {HELD_OUT} good pictures", {"calibration": parts.held_out}
    for k_shot in (1, 2, REFERENCES):
        shots = {"k_shot": k_shot, "references": parts.references[:k_shot]}
        if k_shot == REFERENCES:
            yield f"{k_shot}-shot, not calibrated", shots
        yield f"{k_shot}-shot, the references alone", shots | {"calibration": "references"}
    yield f"{REFERENCES}-shot, {HELD_OUT} good pictures", shots | {"calibration": parts.held_out}


@torch.no_grad()
def shares(model: AprilGAN, parts: Parts) -> Shares:
    """Share of the fresh good pictures that are flagged, and of the defective ones that are found."""
    model.setup("predict")
    flagged = (model(pictures).pred_label.float().mean().item() for pictures in (parts.fresh, parts.defective))
    return next(flagged), next(flagged)


def measure(
    build: Callable[..., AprilGAN], root: Path, seeds: Sequence[int], categories: Sequence[str]
) -> dict[str, dict[str, list[Shares]]]:
    """By setting and category the shares of every product.

    Args:
        build: Makes the model from a class name and further arguments.
        root: Folder of the drawn pictures.
        seeds: The products.
        categories: The categories.
    """
    results: dict[str, dict[str, list[Shares]]] = {}
    tasks = [(category, seed) for category in categories for seed in seeds]
    for category, seed in track(tasks, "products measured", console=Console(stderr=True)):
        parts = load_parts(root, category, seed)
        for setting, arguments in settings_of(parts):
            model = build(category, false_positive_rate=FALSE_POSITIVE_RATE, **arguments)
            results.setdefault(setting, {}).setdefault(category, []).append(shares(model, parts))
    return results


def table(results: Mapping[str, Mapping[str, Sequence[Shares]]]) -> str:
    """Markdown: what is flagged and found in every setting."""
    header = ["threshold from", "good parts flagged", "by class", "defects found"]
    header += [f"calibrations within {low:.0%} to {high:.0%}" for low, high in BANDS]
    rows = []
    for setting, by_category in results.items():
        both = np.array([by_category[category] for category in by_category])  # (category, product, 2)
        flagged, found = both[..., 0], both[..., 1]
        by_class = flagged.mean(axis=1)
        within = [f"{((low <= flagged) & (flagged <= high)).mean():.0%}" for low, high in BANDS]
        span = f"{by_class.min():.1%} to {by_class.max():.1%}"
        rows.append([setting, f"{flagged.mean():.1%}", span, f"{found.mean():.1%}", *within])
    return markdown(header, rows)


def table_by_class(results: Mapping[str, Mapping[str, Sequence[Shares]]], settings: Sequence[str]) -> str:
    """Markdown: of every class, flagged / found, mean over products."""
    categories = list(results[settings[0]])
    rows = []
    for category in categories:
        cells = []
        for setting in settings:
            flagged, found = np.mean(results[setting][category], axis=0)
            cells.append(f"{flagged:.1%} / {found:.1%}")
        rows.append([category, *cells])
    return markdown(["flagged / found", *settings], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print Markdown tables, write the single values."""
    parser = argparse.ArgumentParser(description="Measure calibrated thresholds on freshly drawn products.")
    parser.add_argument("--root", type=Path, default=Path("datasets/DrawnInspection"), help="folder of drawn pictures")
    parser.add_argument("--seeds", type=int, default=5, help="number of products a category")
    parser.add_argument("--first-seed", type=int, default=300, help="the first product; the others follow")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the single values")
    options = parser.parse_args(arguments)
    seen = load_adapters(built_in.ADAPTERS)[1].trained_on.get("DrawnInspection", [])
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results = measure(build_model, options.root, seeds, [name for name in CATEGORIES if name not in seen])
    content = json.dumps({"seeds": list(seeds), "shares": results}, indent=1).encode()
    write_atomically(options.out, lambda file: file.write(content))
    console = Console(width=200, soft_wrap=True, highlight=False)
    console.print(f"{len(seeds)} products a category, seeds {seeds[0]}-{seeds[-1]}\n")
    console.print(table(results) + "\n")
    console.print(table_by_class(results, [setting for setting in results if "not calibrated" not in setting]))


if __name__ == "__main__":
    main()
