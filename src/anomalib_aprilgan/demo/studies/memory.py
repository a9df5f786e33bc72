"""What unlabelled references, images under inspection and bounded memory banks are worth with the built-in CLIP.

python -m anomalib_aprilgan.demo.studies.memory --root datasets/DrawnInspection --out memory.json

On products of the categories that the adapters never saw: 42 good and 42 defective test images, 200 other good ones
that show false alarms, up to 100 good references, and 10 defective images that are among unlabelled ones. With
``--photos`` on categories in MVTec AD's layout instead: 10 of the defective test images are among the unlabelled ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from anomalib.data import MVTecAD, PredictDataset
from anomalib.engine import Engine
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ... import AprilGAN
from ...data.pre_processing import resize_image
from ...data.reading import load_image
from ...evaluation.tables import markdown
from ...files import write_atomically
from ...provenance import load_adapters
from .. import built_in
from ..drawing import CATEGORIES
from ..inspection import DrawnInspection
from .built_in import Product, build_model, figures_of, fused_scores, raw_scores

REFERENCES, CALIBRATION, FRESH = 100, 500, 1000
TEST, AMONG_UNLABELLED = 42, 10
FALSE_POSITIVE_RATE, UNLABELLED, SHARES = 0.05, 20, (0.0, 0.1, 0.3, 0.5)
# Patches of every stage: as many as 4 and 14 images have. At ViT-L and 518 pixels the latter take 150 MB in fp16.
CORESETS = (576, 2016)
_COLUMNS = ("AUPRO", "pixel AP", "pixel AUROC", "image AUROC", "flagged", "found")
# By setting, the figures of a product.
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Stock:
    """Images of one product.

    Attributes:
        product: 42 good and 42 defective test images, without references.
        files: Of these images.
        good: Files of good images to remember.
        calibration: Files of 500 good images to calibrate with.
        others: Files of good images that nothing has seen.
        defective: Files of 10 other defective images.
    """

    product: Product
    files: list[str]
    good: list[str]
    calibration: list[str]
    others: list[str]
    defective: list[str]

    def mixed(self, share: float) -> list[str]:
        """Twenty images of which a share is defective."""
        number = round(share * UNLABELLED)
        return [*self.good[: UNLABELLED - number], *self.defective[:number]]


def read(files: Sequence[str], size: int = built_in.IMAGE_SIZE) -> Tensor:
    """Images ``(B, 3, H, W)`` in ``[0, 1]``, as the model would resize them."""
    return torch.cat([_resized(load_image(Path(file))[None], (size, size)) for file in files])


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return image if tuple(image.shape[-2:]) == size else resize_image(image, size)


def truth_of(masks: Sequence[str | None], size: int = built_in.IMAGE_SIZE) -> Tensor:
    """Masks ``(N, H, W)``, 0 or 1, empty for ``None``."""
    truth = torch.zeros(len(masks), size, size, dtype=torch.int)
    for number, mask in enumerate(masks):
        if mask is not None:
            truth[number] = F.interpolate(load_image(Path(mask))[None, :1], (size, size))[0, 0].round().int()
    return truth


def load_stock(root: Path, category: str, seed: int) -> Stock:
    """A product from disk, drawn on first use."""
    data = DrawnInspection(
        root=root,
        category=category,
        image_size=built_in.IMAGE_SIZE,
        num_train=REFERENCES + CALIBRATION + FRESH + 4,
        num_test=TEST + AMONG_UNLABELLED,
        seed=seed,
    )
    data.prepare_data()
    data.setup()
    samples = data.test_data.samples
    good, bad = (sorted(samples.image_path[samples.label_index == label]) for label in (0, 1))
    # Every kind of defect may be among the unlabelled ones.
    bad = [bad[place] for place in np.random.default_rng(seed).permutation(len(bad))]
    files = [*good[:TEST], *bad[AMONG_UNLABELLED:]]
    train = sorted(str(path) for path in data.train_data.samples.image_path)
    calibration, others = train[REFERENCES:][:CALIBRATION], train[REFERENCES + CALIBRATION :]
    return Stock(product_of(files, samples), files, train[:REFERENCES], calibration, others, bad[:AMONG_UNLABELLED])


def load_photos(root: Path, category: str, seed: int) -> Stock:
    """Photographs in MVTec AD's layout; which of them are remembered is drawn."""
    data = MVTecAD(root=root, category=category)
    data.setup()
    generator = np.random.default_rng(seed)
    samples = data.test_data.samples
    good, bad, train = (
        [str(file) for file in generator.permutation(sorted(files))]
        for files in (
            samples.image_path[samples.label_index == 0],
            samples.image_path[samples.label_index == 1],
            data.train_data.samples.image_path,
        )
    )
    missing = max(0, UNLABELLED - len(train))
    files, remembered, others = [*good[missing:], *bad[AMONG_UNLABELLED:]], [*train, *good[:missing]], good[missing:]
    return Stock(product_of(files, samples), files, remembered, [], others, bad[:AMONG_UNLABELLED])


def product_of(files: Sequence[str], samples: pd.DataFrame) -> Product:
    """Test images with their masks, from the table of a data set."""
    defective = samples[samples.label_index == 1]
    masks = dict(zip(defective.image_path, defective.mask_path, strict=True))
    kinds = np.array([Path(file).parent.name for file in files])
    return Product(read(files), truth_of([masks.get(file) for file in files]), kinds, [])


def figures(model: AprilGAN, stock: Stock) -> dict[str, float]:
    """Metrics of the test images; scores are fused as published."""
    text, anomaly_map = raw_scores(model, stock.product)
    score = fused_scores(text, anomaly_map) if model.settings.k_shot else text
    return figures_of(score, anomaly_map / model.model.map_ceiling, stock.product)


@torch.no_grad()
def shares(model: AprilGAN, stock: Stock) -> dict[str, float]:
    """Share of 200 fresh good images that are flagged, and of the defective test images that are found."""
    model.setup("predict")
    images = {"flagged": read(stock.others[:200]), "found": stock.product.images[stock.product.labels == 1]}
    return {name: model(given).pred_label.float().mean().item() for name, given in images.items()}


def unlabelled(category: str, stock: Stock) -> Figures:
    """Zero-shot, verified references, unlabelled ones, and the images under inspection themselves."""
    build = partial(build_model, category)
    at_a_share = partial(build, calibration="references", false_positive_rate=FALSE_POSITIVE_RATE)
    found = {"0-shot": figures(build(), stock)}
    model = at_a_share(k_shot=4, references=stock.good[:4])
    found["4 verified references"] = figures(model, stock) | shares(model, stock)
    verified = build(k_shot=UNLABELLED, references=stock.good[:UNLABELLED])
    found[f"{UNLABELLED} verified references"] = figures(verified, stock)
    for share in SHARES:
        of_maps: dict[str, float] = {}  # on which the stated share has no influence
        for contamination in sorted({share, 0.3} if share == 0.0 else {share}):  # the default where none is defective
            mixed = {"k_shot": UNLABELLED, "references": stock.mixed(share), "references_unlabelled": True}
            model = at_a_share(**mixed, contamination=contamination)
            of_maps = of_maps or figures(model, stock)
            name = f"{UNLABELLED} unlabelled, {share:.0%} defective, `contamination={contamination:g}`"
            found[name] = of_maps | shares(model, stock)
    found["`batch_zero_shot` with the test images"] = of_batch(build, stock)
    return found


def of_batch(build: Any, stock: Stock) -> dict[str, float]:  # noqa: ANN401  # a partial
    """Metrics where the test images are compared with each other, in one prediction."""
    model = build(batch_zero_shot=True, k_shot=len(stock.files), post_processor=False, visualizer=False)
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(stock.files):
            (Path(folder) / f"{number:03}.png").symlink_to(Path(file).resolve())
        engine = Engine(
            default_root_dir=Path(folder) / "runs", accelerator="cpu", logger=False, enable_progress_bar=False
        )
        batches: Any = engine.predict(model, dataset=PredictDataset(folder)) or []
    raw = {
        Path(path).name: one for batch in batches for path, one in zip(batch.image_path, batch.anomaly_map, strict=True)
    }
    scores = {
        Path(path).name: one for batch in batches for path, one in zip(batch.image_path, batch.pred_score, strict=True)
    }
    maps = torch.stack([raw[name] for name in sorted(raw)]).as_subclass(Tensor)
    score = torch.stack([scores[name] for name in sorted(scores)]).as_subclass(Tensor)
    return figures_of(score, maps / model.model.map_ceiling, stock.product)


def bounded_settings(stock: Stock) -> Iterator[tuple[str, dict[str, Any]]]:
    """Memory banks, by what they keep."""
    yield "4 references, all patches, float32", {"k_shot": 4, "references": stock.good[:4]}
    many = {"k_shot": REFERENCES, "references": stock.good[:REFERENCES]}
    for dtype in ("float32", "float16"):
        yield f"{REFERENCES} references, all patches, {dtype}", many | {"memory_dtype": dtype}
    for size in CORESETS:
        name = f"{REFERENCES} references, {size} patches, float16"
        yield name, many | {"memory_size": size, "memory_dtype": "float16"}


def bounded(category: str, stock: Stock) -> Figures:
    """Metrics and size of memory banks."""
    found = {}
    for name, arguments in bounded_settings(stock):
        model = build_model(category, **arguments)
        found[name] = figures(model, stock) | {"bytes": float(size_of(model))}
    return found


def size_of(model: AprilGAN) -> int:
    """Bytes that the memory bank takes, in memory, checkpoints and exports."""
    scorer = model.model.few_shot
    return 0 if scorer is None else sum(value.nbytes for value in scorer.state_dict().values())


@torch.no_grad()
def times(category: str, stock: Stock, repetitions: int = 60) -> dict[str, float]:
    """Milliseconds that one image takes with every bank: the median, the banks taken in turn."""
    models = {name: build_model(category, **arguments) for name, arguments in bounded_settings(stock)}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(repetitions + 5):
        image = stock.product.images[number % len(stock.files)][None]
        for name, model in models.items():
            if number == 0:
                model.setup("predict")
            start = time.perf_counter()
            model.predict(image)
            if number >= 5:  # warm by then
                taken[name].append(1000.0 * (time.perf_counter() - start))
    return {name: statistics.median(of_model) for name, of_model in taken.items()}


def measure_photos(root: Path, task: tuple[str, int]) -> Figures:
    """The figures of unlabelled references on photographs."""
    torch.set_num_threads(1)
    return unlabelled(task[0], load_photos(root, *task))


def measure_product(root: Path, task: tuple[str, int]) -> Figures:
    """All figures of a product."""
    torch.set_num_threads(1)
    stock = load_stock(root, *task)
    return unlabelled(task[0], stock) | bounded(task[0], stock)


def measure(root: Path, seeds: Sequence[int], categories: Sequence[str], of_product: Any = measure_product) -> Any:  # noqa: ANN401  # JSON
    """Figures by category, setting and name: a list with one value a seed.

    Args:
        root: Folder of the drawn images.
        seeds: The products.
        categories: The categories.
        of_product: Measures one, from the folder, its category and seed.
    """
    tasks = [(category, seed) for category in categories for seed in seeds]
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(partial(of_product, root), tasks)
        progress = track(found, "products measured", len(tasks), console=Console(stderr=True))
        for (category, _), of_task in zip(tasks, progress, strict=True):
            for setting, values in of_task.items():
                for name, value in values.items():
                    results.setdefault(category, {}).setdefault(setting, {}).setdefault(name, []).append(value)
    return results


def by_seed(results: Mapping[str, Any], setting: str, name: str) -> NDArray[np.float64] | None:
    """A figure ``(categories, seeds)``; ``None`` where it was not measured."""
    rows = [of_category[setting].get(name) for of_category in results.values()]
    return None if rows[0] is None else np.array(rows, dtype=np.float64)


def cell(results: Mapping[str, Any], setting: str, name: str) -> str:
    """A figure over categories: its mean and its deviation between the products, in words."""
    values = by_seed(results, setting, name)
    return "" if values is None else f"{values.mean():.3f} ± {values.mean(axis=0).std():.3f}"


def table(results: Mapping[str, Any], settings: Sequence[str], columns: Sequence[str]) -> str:
    """Markdown: figures of settings, and for flagged good parts the classes between which they lie."""
    rows = []
    for setting in settings:
        flagged = by_seed(results, setting, "flagged")
        of_classes = [] if flagged is None else flagged.mean(axis=1).tolist()
        span = f"{min(of_classes):.1%} to {max(of_classes):.1%}" if of_classes else ""
        rows.append([setting, *(cell(results, setting, name) for name in columns), span])
    return markdown(["", *columns, "flagged, by class"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print Markdown tables, write the single values."""
    parser = argparse.ArgumentParser(description="Measure memory banks on freshly drawn products.")
    parser.add_argument("--root", type=Path, default=Path("datasets/DrawnInspection"), help="folder of drawn images")
    parser.add_argument("--seeds", type=int, default=5, help="number of products a category")
    parser.add_argument("--first-seed", type=int, default=300, help="the first product; the others follow")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the single values")
    parser.add_argument("--photos", type=Path, help="folder of categories in MVTec AD's layout, to measure instead")
    options = parser.parse_args(arguments)
    if options.photos is not None:
        _print_photos(options.photos, range(options.first_seed, options.first_seed + options.seeds), options.out)
        return
    seen = load_adapters(built_in.ADAPTERS)[1].trained_on.get("DrawnInspection", [])
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    categories = [name for name in CATEGORIES if name not in seen]
    results = measure(options.root, seeds, categories)
    first = load_stock(options.root, categories[0], seeds[0])
    milliseconds = times(categories[0], first)
    content = json.dumps({"seeds": list(seeds), "figures": results, "milliseconds": milliseconds}, indent=1).encode()
    write_atomically(options.out, lambda file: file.write(content))
    console = Console(width=200, soft_wrap=True, highlight=False)
    console.print(f"{len(seeds)} products a category, seeds {seeds[0]}-{seeds[-1]}; mean ± deviation between seeds\n")
    rest = [setting for setting in results[categories[0]] if setting not in milliseconds]
    console.print(table(results, rest, _COLUMNS) + "\n")
    rows = []
    for setting, taken in milliseconds.items():
        size = by_seed(results, setting, "bytes")
        megabytes = "" if size is None else f"{size.mean() / 1e6:.2f}"
        ratio = taken / next(iter(milliseconds.values()))
        rows.append([setting, megabytes, cell(results, setting, "AUPRO"), f"{taken:.1f}", f"{ratio:.2f}"])
    console.print(markdown(["memory bank", "MB", "AUPRO", "ms an image", "of the first"], rows))


def _print_photos(root: Path, seeds: Sequence[int], out: Path) -> None:
    categories = sorted(path.name for path in root.iterdir() if (path / "train").is_dir())
    results = measure(root, seeds, categories, measure_photos)
    content = json.dumps({"seeds": list(seeds), "figures": results}, indent=1).encode()
    write_atomically(out, lambda file: file.write(content))
    console = Console(width=200, soft_wrap=True, highlight=False)
    for category in categories:
        of_category = {category: results[category]}
        console.print(f"{category}, {len(seeds)} draws\n\n{table(of_category, list(results[category]), _COLUMNS)}\n")


if __name__ == "__main__":
    main()
