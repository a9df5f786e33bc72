"""Whether figures, and differences of figures, would be the same with other test images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .cells import CellResult
from .resampling import interval, p_value
from .tables import PAPER, markdown, row_name, setting_of, title_of

_NOTHING = "\N{EN DASH}"
# By the digests of the lists of images, category by category.
Images = tuple[tuple[str, str], ...]
# By metric: the figure, and its bootstrap samples.
Row = dict[str, tuple[float, NDArray[np.float64]]]


def intervals(results: Sequence[CellResult]) -> str:
    """For every row of the summary the 95 % interval of each figure over bootstrap samples of the test images.

    Returns:
        Markdown, percent; empty without samples.
    """
    parts = []
    for dataset, rows in _rows(results):
        lines = [
            (setting_of(k_shot), model, *(_interval(row.get(metric)) for metric in PAPER))
            for (k_shot, model, _), row in rows.items()
        ]
        table = markdown(("setting", "method", *map(title_of, PAPER)), lines)
        parts.append(f"## {dataset}: 95 % of samples of the test images, percent\n\n{table}")
    return "\n\n".join(parts)


def differences(results: Sequence[CellResult]) -> str:
    """For every two methods of a setting that were tested on the same images, how much the first is ahead.

    Returns:
        Markdown, points of percent, and whether the difference could be none; empty without such two.
    """
    parts = []
    for dataset, rows in _rows(results):
        lines = []
        for (key, row), (other_key, other) in combinations(rows.items(), 2):
            (k_shot, model, images), (other_shot, other_model, other_images) = key, other_key
            if (k_shot, images) == (other_shot, other_images):
                figures = (_difference(row.get(metric), other.get(metric)) for metric in PAPER)
                lines.append((setting_of(k_shot), f"{model} - {other_model}", *figures))
        if lines:
            table = markdown(("setting", "methods", *map(title_of, PAPER)), lines)
            parts.append(
                f"## {dataset}: differences in points, and p that there is none\n\n{table}\n\n"
                "p is two-sided, from the deviation of the difference over bootstrap samples of the test images, which "
                "are the same for both methods. Seeds are averaged before. No allowance is made for the number of "
                "comparisons."
            )
    return "\n\n".join(parts)


def _rows(results: Sequence[CellResult]) -> Iterator[tuple[str, dict[tuple[int, str, Images], Row]]]:
    """Data set by data set, the rows of the summary with samples: means over categories and seeds."""
    several = len({result.cell.accelerator for result in results}) > 1
    for dataset in dict.fromkeys(result.cell.dataset for result in results):
        cells: dict[tuple[int, str], list[CellResult]] = {}
        for result in results:
            if result.cell.dataset == dataset and result.samples:
                name = row_name(result.cell.model, result.cell.accelerator if several else None)
                cells.setdefault((result.cell.k_shot, name), []).append(result)
        rows = {
            (k_shot, name, tuple(sorted({(of.cell.category, of.test_files) for of in group}))): _mean(group)
            for (k_shot, name), group in cells.items()
        }
        if rows:
            yield dataset, rows


def _mean(group: Sequence[CellResult]) -> Row:
    """Means over categories of means over seeds, for the metrics that every cell has."""
    found: Row = {}
    for metric in PAPER:
        if all(metric in result.samples and np.isfinite(result.samples[metric]).all() for result in group):
            categories = dict.fromkeys(result.cell.category for result in group)
            of_categories = [
                (
                    np.mean([result.metrics[metric] for result in group if result.cell.category == category]),
                    np.mean([result.samples[metric] for result in group if result.cell.category == category], axis=0),
                )
                for category in categories
            ]
            figures, samples = zip(*of_categories, strict=True)
            found[metric] = float(np.mean(figures)), np.mean(np.array(samples, dtype=np.float64), axis=0)
    return found


def _interval(figure: tuple[float, NDArray[np.float64]] | None) -> str:
    if figure is None:
        return _NOTHING
    low, high = interval(figure[1])
    return f"{100 * figure[0]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _difference(
    first: tuple[float, NDArray[np.float64]] | None, second: tuple[float, NDArray[np.float64]] | None
) -> str:
    if first is None or second is None:
        return _NOTHING
    difference, p = first[0] - second[0], p_value(first[0] - second[0], first[1] - second[1])
    return f"{100 * difference:+.1f} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"
