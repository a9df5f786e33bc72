"""What smoothing, neighbourhoods and the mean of the highest pixels are worth with the built-in CLIP.

python -m anomalib_aprilgan.demo.studies.options --root datasets/DrawnInspection --out options.json

On products of the categories that neither CLIP nor its adapters saw. Figures are means over categories; the
deviation is the one between seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ...files import write_atomically
from .. import built_in
from ..drawn_clip.pretrain import UNSEEN_CATEGORIES
from .built_in import Product, build_model, figures_of, fused_scores, load_product, raw_scores, table_of_maps

K_SHOT = 4
SMOOTHING: Mapping[str, Mapping[str, Any]] = {
    f"smoothing_sigma {sigma:g}": {"smoothing_sigma": sigma} for sigma in (1.0, 2.0, 4.0)
}
ZERO_SHOT: Mapping[str, Mapping[str, Any]] = {"plain": {}, **SMOOTHING}
FEW_SHOT: Mapping[str, Mapping[str, Any]] = {
    **ZERO_SHOT,
    "neighbourhood 3": {"neighbourhood": 3},
    "top_share 0.01": {"top_share": 0.01},
    "smoothing_sigma 2, neighbourhood 3, top_share 0.01": {
        "smoothing_sigma": 2.0,
        "neighbourhood": 3,
        "top_share": 0.01,
    },
}


def zero_shot(category: str, product: Product) -> dict[str, dict[str, float]]:
    """Figures without references, option by option."""
    figures = {}
    for name, options in ZERO_SHOT.items():
        score, anomaly_map = raw_scores(build_model(category, **options), product)
        figures[f"0-shot, {name}"] = figures_of(score, anomaly_map / len(built_in.STAGES), product)
    return figures


def few_shot(category: str, product: Product) -> dict[str, dict[str, float]]:
    """Figures with references, option by option."""
    limit = len(built_in.STAGES) + 2 * len(built_in.MEMORY_STAGES)
    build = partial(build_model, category, k_shot=K_SHOT, references=product.references[:K_SHOT])
    figures = {}
    for name, options in FEW_SHOT.items():
        text, anomaly_map = raw_scores(build(**options), product)
        fused = fused_scores(text, anomaly_map, options.get("top_share", 0.0))
        figures[f"{K_SHOT}-shot, {name}"] = figures_of(fused, anomaly_map / limit, product)
    return figures


def measure(root: Path, seeds: Sequence[int], categories: Sequence[str]) -> dict[str, Any]:
    """Figures by category and setting: a list with one value a seed.

    Args:
        root: Folder of the drawn pictures.
        seeds: The products.
        categories: The categories.
    """
    results: dict[str, Any] = {}
    tasks = [(category, seed) for category in categories for seed in seeds]
    for category, seed in track(tasks, "products measured", console=Console(stderr=True)):
        product = load_product(root, category, seed)
        for setting, figures in (zero_shot(category, product) | few_shot(category, product)).items():
            for name, value in figures.items():
                results.setdefault(category, {}).setdefault(setting, {}).setdefault(name, []).append(value)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a Markdown table, write the single values."""
    parser = argparse.ArgumentParser(description="Measure the options of maps and scores on freshly drawn products.")
    parser.add_argument("--root", type=Path, default=Path("datasets/DrawnInspection"), help="folder of drawn pictures")
    parser.add_argument("--seeds", type=int, default=5, help="number of products a category")
    parser.add_argument("--first-seed", type=int, default=300, help="the first product; the others follow")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the single values")
    options = parser.parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results = measure(options.root, seeds, UNSEEN_CATEGORIES)
    content = json.dumps({"seeds": list(seeds), "figures": results}, indent=1).encode()
    write_atomically(options.out, lambda file: file.write(content))
    console = Console(width=160, soft_wrap=True, highlight=False)
    console.print(f"{len(seeds)} products a category, seeds {seeds[0]}-{seeds[-1]}; mean ± deviation between seeds\n")
    console.print(table_of_maps(results, UNSEEN_CATEGORIES))


if __name__ == "__main__":
    main()
