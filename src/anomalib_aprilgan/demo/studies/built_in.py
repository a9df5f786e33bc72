"""What the built-in CLIP and its adapters reach on products they never saw.

python -m anomalib_aprilgan.demo.studies.built_in --root datasets/DrawnInspection --out figures.json

Every seed is a new product of every category: freshly drawn, with as many good as defective test
images. Figures are means over categories; the deviation is the one between seeds.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from anomalib.metrics import AUPRO
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from ... import AprilGAN
from ...decision.fusion import ScoreFusion
from ...evaluation.shared_pass import fused_over_test_set
from ...evaluation.tables import markdown
from ...files import write_atomically
from ...provenance import load_adapters
from .. import built_in
from ..drawing import CATEGORIES
from ..drawn_clip.pretrain import CAPTIONED_CATEGORIES, UNSEEN_CATEGORIES, UNSEEN_DEFECTS
from ..inspection import DrawnInspection

SHOTS = (1, 2, 4)
# Good test images of a product, and as many defective ones: three of every kind of defect.
TEST_IMAGES = 42
PIXEL_METRICS = ("pixel AUROC", "pixel AP", "AUPRO")
# By setting, the figures of a category and product.
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Product:
    """Test images and references of one drawn product.

    Attributes:
        images: ``(N, 3, H, W)`` in ``[0, 1]``.
        masks: ``(N, H, W)``, 1 for a defect.
        kinds: ``N`` defect kinds, ``"good"`` for none.
        references: Files of good images of the training set.
    """

    images: Tensor
    masks: Tensor
    kinds: NDArray[np.str_]
    references: list[str]

    @property
    def labels(self) -> Tensor:
        """``(N,)``, 1 for a defective image."""
        return torch.from_numpy((self.kinds != "good").astype(np.int64))


def build_model(class_name: str | dict[str, str], **overrides: Any) -> AprilGAN:  # noqa: ANN401  # arguments of the model
    """The built-in CLIP and its adapters, unless arguments say otherwise."""
    given: dict[str, Any] = {
        "backbone": built_in.ARCHITECTURE,
        "pretrained": built_in.PRETRAINED,
        "image_size": built_in.IMAGE_SIZE,
        "stages": built_in.STAGES,
        "memory_stages": built_in.MEMORY_STAGES,
        "adapters": str(built_in.ADAPTERS),
    }
    return AprilGAN(class_name=class_name, **given | overrides)


def load_product(root: Path, category: str, seed: int) -> Product:
    """A product from disk, drawn on first use."""
    data = DrawnInspection(
        root=root,
        category=category,
        image_size=built_in.IMAGE_SIZE,
        num_train=max(SHOTS),
        num_test=TEST_IMAGES,
        seed=seed,
    )
    data.prepare_data()
    data.setup()
    items: list[Any] = [data.test_data[index] for index in range(len(data.test_data))]
    masks = [torch.zeros(item.image.shape[-2:]) if item.gt_mask is None else item.gt_mask for item in items]
    return Product(
        images=torch.stack([item.image.as_subclass(Tensor) for item in items]),
        masks=torch.stack([mask.as_subclass(Tensor).int() for mask in masks]),
        kinds=np.array([Path(item.image_path).parent.name for item in items]),
        references=sorted(str(path) for path in data.train_data.samples.image_path),
    )


def zero_shot_scores(model: AprilGAN, product: Product) -> Figures:
    """Image AUROC over the drawn, the never drawn, all kinds of defects, and every single one."""
    scores, kinds = raw_scores(model, product)[0], product.kinds
    good, never_drawn = kinds == "good", np.isin(kinds, UNSEEN_DEFECTS)
    groups = {"drawn kinds": ~good & ~never_drawn, "never drawn kinds": never_drawn, "all kinds": ~good}
    groups |= {str(kind): kinds == kind for kind in sorted(set(kinds) - {"good"})}
    chosen = {name: torch.from_numpy(good | bad) for name, bad in groups.items()}
    auroc = {name: float(binary_auroc(scores[part], product.labels[part])) for name, part in chosen.items()}
    return {"0-shot": auroc}


def shots(build: Callable[..., AprilGAN], category: str, product: Product) -> Figures:
    """All figures zero-shot, with references, and of the memory bank's map alone."""
    score, zero_shot_map = raw_scores(build(category), product)
    zero_shot_limit, memory_limit = len(built_in.STAGES), 2 * len(built_in.MEMORY_STAGES)
    figures = {"0-shot": figures_of(score, zero_shot_map / zero_shot_limit, product)}
    memory = {}
    for k_shot in SHOTS:
        model = build(category, k_shot=k_shot, references=product.references[:k_shot])
        text, anomaly_map = raw_scores(model, product)
        fused = fused_scores(text, anomaly_map)
        figures[f"{k_shot}-shot"] = figures_of(fused, anomaly_map / (zero_shot_limit + memory_limit), product)
        distance = (anomaly_map - zero_shot_map) / memory_limit
        memory[f"{k_shot}-shot, memory bank alone"] = figures_of(distance.flatten(1).amax(dim=1), distance, product)
    return figures | memory


def untrained(build: Callable[..., AprilGAN], category: str, product: Product) -> Figures:
    """All figures with adapters as they are before training, drawn anew each time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The adapters are untrained")
        score, anomaly_map = raw_scores(build(category, adapters=None), product)
    return {"untrained adapters": figures_of(score, anomaly_map / len(built_in.STAGES), product)}


@torch.no_grad()
def raw_scores(model: AprilGAN, product: Product) -> tuple[Tensor, Tensor]:
    """Text probability and map, neither fused nor scaled."""
    model.setup("predict")
    return model.predict(product.images)[:2]


def fused_scores(text_probability: Tensor, anomaly_map: Tensor, top_share: float = 0.0) -> Tensor:
    """Few-shot scores as published: the bounds of the map statistic are those over the test images."""
    fusion = ScoreFusion(top_share=top_share)
    return fused_over_test_set(fusion, text_probability, fusion.statistic(anomaly_map))


def figures_of(score: Tensor, anomaly_map: Tensor, product: Product) -> dict[str, float]:
    """Metrics, exact, of scores and maps in ``[0, 1]``: beyond it torchmetrics squashes them into ties."""
    pixels, truth = anomaly_map.flatten().clamp(0.0, 1.0), product.masks.flatten()
    aupro: Any = AUPRO(fields=["anomaly_map", "gt_mask"])
    aupro.update(SimpleNamespace(anomaly_map=anomaly_map, gt_mask=product.masks))
    return {
        "pixel AUROC": float(binary_auroc(pixels, truth)),
        "pixel AP": float(binary_average_precision(pixels, truth)),
        "AUPRO": float(aupro.compute()),
        "image AUROC": float(binary_auroc(score.clamp(0.0, 1.0), product.labels)),
    }


def measure(build: Callable[..., AprilGAN], root: Path, seeds: Sequence[int], inspected: Sequence[str]) -> Any:  # noqa: ANN401  # JSON
    """Figures by category and setting: a list with one value a seed.

    Args:
        build: Makes the model from a class name and further arguments.
        root: Folder of the drawn images.
        seeds: The products.
        inspected: Categories that the adapters never saw; the others are scored by the text alone.
    """
    torch.manual_seed(0)
    tasks = [(category, seed) for category in CATEGORIES for seed in seeds]
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for category, seed in track(tasks, "products measured", console=Console(stderr=True)):
        product = load_product(root, category, seed)
        measured = {"text": zero_shot_scores(build(category), product)["0-shot"]}
        if category in inspected:
            measured |= shots(build, category, product)
            measured |= untrained(build, category, product)
        for setting, figures in measured.items():
            for name, value in figures.items():
                results.setdefault(category, {}).setdefault(setting, {}).setdefault(name, []).append(value)
    return results


def table_of_scores(results: Mapping[str, Any]) -> str:
    """Markdown: zero-shot image AUROC by what was shown in training."""
    columns = ("drawn kinds", "never drawn kinds", "all kinds")
    groups = {"captioned": CAPTIONED_CATEGORIES, "never shown": UNSEEN_CATEGORIES}
    rows = [
        (
            f"{name} ({len(categories)} categories)",
            *(mean_and_deviation(results, categories, "text", column) for column in columns),
        )
        for name, categories in groups.items()
    ]
    return markdown(("zero-shot image AUROC", *columns), rows)


def table_of_maps(results: Mapping[str, Any], categories: Sequence[str]) -> str:
    """Markdown: all figures of every setting, over these categories."""
    columns = (*PIXEL_METRICS, "image AUROC")
    settings = [setting for setting in results[categories[0]] if setting != "text"]
    rows = [
        (setting, *(mean_and_deviation(results, categories, setting, column) for column in columns))
        for setting in settings
    ]
    return markdown((", ".join(categories), *columns), rows)


def mean_and_deviation(results: Mapping[str, Any], categories: Sequence[str], setting: str, name: str) -> str:
    """A figure over categories: its mean and its deviation between the products, in words."""
    by_seed = np.mean([results[category][setting][name] for category in categories], axis=0)
    return f"{by_seed.mean():.3f} ± {by_seed.std():.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print Markdown tables, write the single values."""
    parser = argparse.ArgumentParser(description="Measure the built-in CLIP on freshly drawn products.")
    parser.add_argument("--root", type=Path, default=Path("datasets/DrawnInspection"), help="folder of drawn pictures")
    parser.add_argument("--seeds", type=int, default=5, help="number of products a category")
    parser.add_argument("--first-seed", type=int, default=300, help="the first product; the others follow")
    parser.add_argument("--pretrained", default=built_in.PRETRAINED, help="weights; else the built-in ones")
    parser.add_argument("--adapters", type=Path, default=built_in.ADAPTERS, help="adapters; else the built-in ones")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the single values")
    options = parser.parse_args(arguments)
    build = partial(build_model, pretrained=options.pretrained, adapters=str(options.adapters))
    seen = load_adapters(options.adapters)[1].trained_on.get("DrawnInspection", [])
    inspected = [category for category in CATEGORIES if category not in seen]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    results = measure(build, options.root, seeds, inspected)
    content = json.dumps({"seeds": list(seeds), "figures": results}, indent=1).encode()
    write_atomically(options.out, lambda file: file.write(content))
    console = Console(width=160, soft_wrap=True, highlight=False)
    console.print(f"{len(seeds)} products a category, seeds {seeds[0]}-{seeds[-1]}; mean ± deviation between seeds\n")
    groups = [
        [category for category in inspected if category in part] for part in (UNSEEN_CATEGORIES, CAPTIONED_CATEGORIES)
    ]
    for table in (table_of_scores(results), *(table_of_maps(results, group) for group in groups if group)):
        console.print(f"{table}\n")


if __name__ == "__main__":
    main()
