"""What accepted parts, p-values and the watch for drift do on a line, with the built-in CLIP.

python -m anomalib_aprilgan.demo.studies.line --root datasets/DrawnInspection --out line.json

On products of the categories that the adapters never saw, 4-shot: thresholds are calibrated with good images, and
others that nothing has seen come along.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats
from torch import Tensor

from ... import AprilGAN
from ...evaluation.tables import markdown
from ...files import write_atomically
from ...provenance import load_adapters
from ...results.drift import DriftMonitor
from .. import built_in
from ..drawing import CATEGORIES
from .built_in import build_model
from .memory import FALSE_POSITIVE_RATE, Figures, Stock, by_seed, cell, load_stock, measure, read

HELD_OUT, ACCEPTED, FRESH = 50, 5, 200
# Change of light, as a factor, and the level at which p-values are called uneven.
LIGHT, UNEVEN = (0.9, 1.1), 0.01
_COLUMNS = {
    "accepted": "accepted parts",
    "still flagged": "of these still flagged",
    "found before": "defects found before",
    "found after": "found after",
    "flagged before": "other good parts flagged before",
    "flagged after": "flagged after",
    "same bytes": "undo gave the same bytes",
}


def calibrated(category: str, stock: Stock, number: int) -> AprilGAN:
    """A ready 4-shot model whose thresholds are calibrated with so many good images."""
    model = build_model(
        category,
        k_shot=4,
        references=stock.good[:4],
        calibration=stock.calibration[:number],
        false_positive_rate=FALSE_POSITIVE_RATE,
    )
    model.setup("predict")
    return model


@torch.no_grad()
def looked_at(model: AprilGAN, images: Tensor) -> tuple[Tensor, Tensor]:
    """Raw scores ``(B,)`` and appearances ``(B, D + 3)``."""
    post_processor: Any = model.post_processor
    scores: list[Tensor] = []
    appearances: list[Tensor] = []
    for start in range(0, len(images), 64):
        raw: Any = model.predict(images[start : start + 64])
        statistic = post_processor.fusion.statistic(raw.anomaly_map)
        scores.append(post_processor.fused(raw.text_probability, statistic, None))
        appearances.append(raw.appearance)
    return torch.cat(scores), torch.cat(appearances)


def accepted(category: str, stock: Stock) -> dict[str, float]:
    """What happens when false alarms join the memory bank."""
    model = calibrated(category, stock, HELD_OUT)
    fresh, defective = read(stock.others[:FRESH]), stock.product.images[stock.product.labels == 1]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def flags(images: Tensor) -> NDArray[np.bool_]:
        with torch.no_grad():
            labels: NDArray[np.bool_] = model(images).pred_label.numpy()
        return labels

    alarms, found = flags(fresh), flags(defective)
    chosen = np.flatnonzero(alarms)[:ACCEPTED]
    others = np.setdiff1d(np.arange(FRESH), chosen)
    joined = model.accept([stock.others[place] for place in chosen]) if len(chosen) else []
    figures = {
        "accepted": float(len(joined)),
        "still flagged": float(sum(one.score_after > 0.5 for one in joined)),
        "found before": float(found.mean()),
        "found after": float(flags(defective).mean()),
        "flagged before": float(alarms[others].mean()),
        "flagged after": float(flags(fresh[others]).mean()),
    }
    if joined:
        model.undo_accept()
    after = model.state_dict()
    same = before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    return figures | {"same bytes": float(same)}


def uniform(category: str, stock: Stock) -> dict[str, float]:
    """Kolmogorov-Smirnov p-value for even p-values of 200 fresh good images, by number of images to calibrate with."""
    found = {}
    for number in (HELD_OUT, len(stock.calibration)):
        model = calibrated(category, stock, number)
        scores, _ = looked_at(model, read(stock.others[:FRESH]))
        post_processor: Any = model.post_processor
        values = post_processor.good_parts.p_values(scores).numpy()
        found[f"KS p, {number} parts"] = float(stats.kstest(values, "uniform").pvalue)
        found[f"p at most 0.05, {number} parts"] = float((values <= 0.05).mean())
    return found


def drift(category: str, stock: Stock) -> dict[str, float]:
    """After how many images drift is told: 1,000 good ones, and 200 in other light; NaN where it never is."""
    images = read(stock.others)
    seen = {"as before": images[:1000]}
    seen |= {f"light x {factor}": (images[:FRESH] * factor).clamp(0.0, 1.0) for factor in LIGHT}
    found: dict[str, float] = {}
    looks: dict[str, tuple[Tensor, Tensor]] = {}
    for number in (HELD_OUT, len(stock.calibration)):
        model = calibrated(category, stock, number)
        post_processor: Any = model.post_processor
        good = [part.numpy() for part in post_processor.of_class(0).good_parts()]
        # Thresholds have no part in it: the scores are those of the same memory bank.
        looks = looks or {name: looked_at(model, given) for name, given in seen.items()}
        for name, (scores, appearances) in looks.items():
            found[f"{name}, {number} parts"] = told_at(DriftMonitor(*good), scores, appearances)
    return found


def told_at(monitor: DriftMonitor, scores: Tensor, appearances: Tensor) -> float:
    """Number of the image at which drift is told; NaN where it never is."""
    for place, (score, appearance) in enumerate(zip(scores, appearances, strict=True), 1):
        monitor.update(score.item(), appearance.numpy())
        if monitor.first is not None:
            return float(place)
    return float("nan")


def measure_product(root: Path, task: tuple[str, int]) -> Figures:
    """All figures of a product."""
    torch.set_num_threads(1)
    stock = load_stock(root, *task)
    parts = {"accept": accepted, "p-values": uniform, "drift": drift}
    return {name: measured(task[0], stock) for name, measured in parts.items()}


def print_tables(results: Mapping[str, Any], console: Console) -> None:
    """Markdown tables of all three parts."""
    values = {name: by_seed(results, "accept", name) for name in _COLUMNS}
    known = {name: value for name, value in values.items() if value is not None}
    totals = {"accepted", "still flagged", "same bytes"}
    row = [f"{known[name].sum():g}" if name in totals else cell(results, "accept", name) for name in known]
    console.print(markdown([_COLUMNS[name] for name in known], [row]) + "\n")
    for part in ("p-values", "drift"):
        first = next(iter(results.values()))[part]
        rows = []
        for name in first:
            found = by_seed(results, part, name)
            if found is None:
                continue
            if name.startswith("KS"):
                even = ", ".join(map(str, (found > UNEVEN).sum(axis=0)))
                rows.append([name, f"above {UNEVEN} in {even} of {len(found)} classes, by product"])
            elif part == "p-values":
                rows.append([name, f"{found.mean():.1%} of good parts"])
            else:
                told = ~np.isnan(found)
                latest = f", at image {found[told].min():.0f} to {found[told].max():.0f}" if told.any() else ""
                rows.append([name, f"told in {told.sum()} of {told.size} runs{latest}"])
        console.print(markdown([part, "found"], rows) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print Markdown tables, write the single values."""
    parser = argparse.ArgumentParser(description="Measure what happens on a line, on freshly drawn products.")
    parser.add_argument("--root", type=Path, default=Path("datasets/DrawnInspection"), help="folder of drawn images")
    parser.add_argument("--seeds", type=int, default=5, help="number of products a category")
    parser.add_argument("--first-seed", type=int, default=300, help="the first product; the others follow")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the single values")
    options = parser.parse_args(arguments)
    seen = load_adapters(built_in.ADAPTERS)[1].trained_on.get("DrawnInspection", [])
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results = measure(options.root, seeds, [name for name in CATEGORIES if name not in seen], measure_product)
    content = json.dumps({"seeds": list(seeds), "figures": results}, indent=1).encode()
    write_atomically(options.out, lambda file: file.write(content))
    console = Console(width=200, soft_wrap=True, highlight=False)
    console.print(f"{len(seeds)} products a category, seeds {seeds[0]}-{seeds[-1]}\n")
    print_tables(results, console)


if __name__ == "__main__":
    main()
