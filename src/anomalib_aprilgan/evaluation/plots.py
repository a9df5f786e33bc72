"""Plots of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..files import SOFTWARE, write_atomically
from .cells import DONE, FULL
from .tables import means_of_seeds, setting_of, settings_in, title_of

# Okabe and Ito's colours, told apart by colour-blind eyes as well; markers tell the models apart without colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def category_bars(frame: pd.DataFrame, metric: str, path: Path) -> None:
    """Bars of every category, one panel per data set and setting, one colour per model; whiskers are seeds.

    Args:
        frame: ``Results.frame``.
        metric: The metric shown.
        path: PNG file to write.
    """
    done = frame[frame.status == DONE]
    panels = [
        (str(dataset), k_shot, rows[rows.k_shot == k_shot])
        for dataset, rows in done.groupby("dataset", sort=False)
        for k_shot in settings_in(rows)
    ]
    models = list(done.model.unique())
    widest = max(rows.category.nunique() for _, _, rows in panels)
    width = float(np.clip(2.5 + 0.22 * widest * len(models), 5.0, 18.0))
    figure = Figure(figsize=(width, 2.3 * len(panels) + 0.6), layout="constrained")
    for axis, (dataset, k_shot, rows) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _bars(axis, rows, metric, models)
        axis.set_title(f"{dataset}, {setting_of(k_shot)}", fontsize=9, loc="left")
        axis.set_ylabel(title_of(metric), fontsize=8)
    _legend(figure, [Patch(color=_colour(number), label=model) for number, model in enumerate(models)])
    _save(figure, path)


def shots_curve(frame: pd.DataFrame, metrics: Sequence[str], path: Path) -> None:
    """Means over categories against the number of references; whiskers are seeds.

    Args:
        frame: ``Results.frame``.
        metrics: The metrics shown, one panel each; a data set has a row of panels.
        path: PNG file to write.
    """
    done = frame[frame.status == DONE]
    datasets = list(done.dataset.unique())
    models = list(done.model.unique())
    figure = Figure(figsize=(2.9 * len(metrics) + 0.6, 2.6 * len(datasets) + 0.6), layout="constrained")
    axes = figure.subplots(len(datasets), len(metrics), squeeze=False)
    for row, dataset in zip(axes, datasets, strict=True):
        rows = done[done.dataset == dataset]
        places = {k_shot: place for place, k_shot in enumerate(settings_in(rows))}
        for axis, metric in zip(row, metrics, strict=True):
            for number, model in enumerate(models):
                shift = 0.06 * (number - (len(models) - 1) / 2)  # whiskers beside each other
                _curve(axis, rows[rows.model == model], metric, places, shift, _style(number))
            if rows[metric].isna().all():
                axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center")
                axis.set_yticks([])
            axis.set_xticks(list(places.values()), [_shots_label(k_shot) for k_shot in places])
            axis.set_xlim(-0.4, len(places) - 0.6)
            axis.set_title(title_of(metric), fontsize=9)
            axis.grid(axis="y", alpha=0.3)
            axis.tick_params(labelsize=8)
        row[0].set_ylabel(f"{dataset}, percent", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("reference images", fontsize=8)
    _legend(figure, [Line2D([], [], label=model, **_style(number)) for number, model in enumerate(models)])
    _save(figure, path)


def _bars(axis: Axes, rows: pd.DataFrame, metric: str, models: Sequence[str]) -> None:
    categories = list(rows.category.unique())
    present = [model for model in models if (rows.model == model).any()]
    width = 0.8 / len(present)
    for place, model in enumerate(present):
        groups = [rows[(rows.model == model) & (rows.category == category)][metric].dropna() for category in categories]
        centres = np.arange(len(categories)) + (place - (len(present) - 1) / 2) * width
        colour = _colour(models.index(model))
        for centre, group in zip(centres, groups, strict=True):
            if len(group):
                whisker = 100 * group.std(ddof=0) if len(group) > 1 else None
                axis.bar(centre, 100 * group.mean(), width, color=colour, yerr=whisker, error_kw={"lw": 0.8})
            else:
                axis.text(centre, 1, "none", fontsize=6, rotation=90, ha="center", va="bottom")
    axis.set_xticks(range(len(categories)), categories, fontsize=8, rotation=30 if len(categories) > 5 else 0)
    axis.set_ylim(0, 100)
    axis.set_xlim(-0.6, len(categories) - 0.4)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", labelsize=8)


def _curve(
    axis: Axes, rows: pd.DataFrame, metric: str, places: dict[int, int], shift: float, style: dict[str, Any]
) -> None:
    means = {k_shot: means_of_seeds(rows[rows.k_shot == k_shot], metric).dropna() for k_shot in places}
    means = {k_shot: values for k_shot, values in means.items() if len(values)}
    # All images are no point of the curve of few: they stand alone.
    for group in ([k for k in means if k != FULL], [k for k in means if k == FULL]):
        heights = [100 * means[k_shot].mean() for k_shot in group]
        whiskers = [100 * means[k_shot].std(ddof=0) for k_shot in group]
        axis.errorbar([places[k_shot] + shift for k_shot in group], heights, whiskers, capsize=2, lw=1.2, **style)


def _shots_label(k_shot: int) -> str:
    return "all" if k_shot == FULL else str(k_shot)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _style(number: int) -> dict[str, Any]:
    return {"color": _colour(number), "marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(figure.get_figwidth() / (0.075 * longest + 0.6)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize=8, frameon=False)


def _save(figure: Figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110, metadata={"Software": SOFTWARE}))
