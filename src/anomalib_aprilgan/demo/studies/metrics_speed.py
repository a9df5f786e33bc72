"""How long the metrics take: ``python -m anomalib_aprilgan.demo.studies.metrics_speed``.

Times, in turn and in one process, the paper's seven metrics written down with scikit-learn and scikit-image,
and all metrics of this package, exact and streaming, on the same drawn maps. Their values must agree.
The regions of the first are sought once and not again for each threshold as the authors do, which favours it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from skimage.measure import label, regionprops

from ...metrics import StreamingMetrics, measure

BATCH = 4
TOLERANCES = {"exact": 1e-6, "streaming": 1e-4}


@dataclass(frozen=True)
class Maps:
    """Drawn results: ``masks`` and ``maps`` are ``(N, H, W)``, ``labels`` and ``scores`` ``(N,)``."""

    masks: NDArray[np.bool_]
    maps: NDArray[np.float32]
    labels: NDArray[np.bool_]
    scores: NDArray[np.float64]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, check that the results agree, and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Time the metrics against scikit-learn and scikit-image.")
    parser.add_argument("--images", type=int, default=100, help="number of maps")
    parser.add_argument("--size", type=int, default=518, help="side of a map in pixels")
    parser.add_argument("--rounds", type=int, default=1, help="measured rounds")
    options = parser.parse_args(arguments)
    drawn = _draw(options.images, options.size)
    candidates = {"scikit-learn and scikit-image": _written_down, "exact": _exact, "streaming": _streaming}
    durations: dict[str, list[float]] = {name: [] for name in candidates}
    figures = {}
    for _ in range(options.rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            figures[name] = run(drawn)
            durations[name].append(time.perf_counter() - start)
    baseline, *ours = candidates
    for name in ours:
        _check_agreement(name, figures[name], figures[baseline])
    console = Console(width=120)
    console.print(
        f"{options.images} maps of {options.size} px, numpy {np.__version__}, median of rounds: {options.rounds} "
        "(ratios: round by round)\n"
    )
    console.print("| | metrics | seconds | ratio |\n|---|---|---|---|")
    for name, seconds in durations.items():
        ratio = statistics.median(mine / other for mine, other in zip(seconds, durations[baseline], strict=True))
        console.print(f"| {name} | {len(figures[name])} | {statistics.median(seconds):.2f} | {ratio:.4f} |")


def _draw(images: int, size: int) -> Maps:
    """Noise, brighter in defects; three images of five have two defects each."""
    generator = np.random.default_rng(0)
    maps = generator.random((images, size, size), dtype=np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    for image in range(max(images * 3 // 5, 1)):
        for _ in range(2):
            top, left = generator.integers(0, size * 3 // 4, 2)
            height, width = generator.integers(2, max(size // 5, 3), 2)
            masks[image, top : top + height, left : left + width] = True
    maps += np.float32(0.4) * masks
    labels = np.array([mask.any() for mask in masks])
    return Maps(masks, maps, labels, generator.random(images) + 0.5 * labels)


def _exact(drawn: Maps) -> dict[str, float]:
    return measure(drawn.masks, drawn.maps, drawn.labels, drawn.scores)


def _streaming(drawn: Maps) -> dict[str, float]:
    metrics = StreamingMetrics()
    for start in range(0, len(drawn.labels), BATCH):
        part = slice(start, start + BATCH)
        metrics.update(drawn.masks[part], drawn.maps[part], drawn.labels[part], drawn.scores[part])
    return metrics.compute()


def _written_down(drawn: Maps) -> dict[str, float]:
    pixels = _scikit_learn(drawn.masks.ravel(), drawn.maps.ravel())
    images = _scikit_learn(drawn.labels, drawn.scores)
    figures = {f"pixel_{name}": value for name, value in pixels.items()}
    figures |= {f"image_{name}": value for name, value in images.items()}
    return figures | {"aupro": _region_overlap(drawn.masks, drawn.maps)}


def _scikit_learn(labels: NDArray[np.bool_], scores: NDArray[Any]) -> dict[str, float]:
    try:
        from sklearn.metrics import (
            average_precision_score,
            precision_recall_curve,
            roc_auc_score,
        )
    except ImportError as error:
        msg = "The comparison needs scikit-learn, which is missing: pip install 'anomalib-aprilgan[test]'."
        raise ImportError(msg) from error

    precision, recall, _ = precision_recall_curve(labels, scores)
    with np.errstate(invalid="ignore"):  # neither where nothing is found
        f1 = 2 * precision * recall / (precision + recall)
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "f1_max": float(np.nanmax(f1)),
        "ap": float(average_precision_score(labels, scores)),
    }


def _region_overlap(masks: NDArray[np.bool_], maps: NDArray[np.float32]) -> float:
    regions = [[region.coords for region in regionprops(label(mask, connectivity=2))] for mask in masks]
    normal = ~masks
    rates, overlaps = [], []
    lowest, highest = maps.min(), maps.max()
    for threshold in np.arange(lowest, highest, (highest - lowest) / 200):
        found = maps > threshold
        shares = [
            found_in_image[coordinates[:, 0], coordinates[:, 1]].mean()
            for found_in_image, regions_of_image in zip(found, regions, strict=True)
            for coordinates in regions_of_image
        ]
        overlaps.append(np.mean(shares))
        rates.append((found & normal).sum() / normal.sum())
    rate, overlap = np.array(rates), np.array(overlaps)
    rate, overlap = rate[rate < 0.3], overlap[rate < 0.3]
    rate = (rate - rate.min()) / (rate.max() - rate.min())
    return float(-np.sum(np.diff(rate) * (overlap[1:] + overlap[:-1])) / 2)


def _check_agreement(name: str, ours: dict[str, float], theirs: dict[str, float]) -> None:
    for metric, value in theirs.items():
        if not math.isclose(ours[metric], value, rel_tol=0, abs_tol=TOLERANCES[name]):
            msg = f"`{metric}` should be {value} as written down, but its {name} form gives {ours[metric]}."
            raise RuntimeError(msg)


if __name__ == "__main__":
    main()
