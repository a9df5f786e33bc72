"""What a benchmark leaves to be read: tables, plots and pictures of its results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown

from ..files import write_atomically
from ..metrics.streaming import PROMISED
from . import comparisons, plots, tables
from .cells import DONE, FAILED, CellResult, Results, file_stem
from .figures import heatmap_figure
from .plan import Plan

_BARS = ("image_auroc", "pixel_auroc", "aupro")
_CURVES = ("image_auroc", "pixel_auroc", "pixel_f1_max", "aupro")


def report(
    results: Results, plan: Plan, provenance: dict[str, Any], tolerance: float, left_out: Sequence[str] = ()
) -> None:
    """Write tables, plots and pictures of all results there are, and print the summary.

    Args:
        results: Where they are and go.
        plan: Tells the order of the cells.
        provenance: What they rest on.
        tolerance: Difference to published figures from which on they are flagged.
        left_out: Accelerators that this machine has not.
    """
    cells = plan.cells()
    results.write_tables(cells, provenance)
    found = results.results(cells)
    frame = tables.labelled(results.frame(cells))
    notes = [*_notes(plan, found), *(f"This machine has no {name}: its cells were left out." for name in left_out)]
    parts = {
        "Summary": "\n\n".join([*notes, tables.summary(frame)]),
        "Beside the published figures": tables.comparison(frame, tolerance),
        "Intervals": comparisons.intervals(found),
        "Differences on the same images": comparisons.differences(found),
        "Other metrics": tables.exact_metrics(frame),
        "Cost of an image": tables.costs(frame),
        "Every category": tables.per_category(frame),
        "Failed": tables.failures(frame),
    }
    text = "\n\n".join(f"# {title}\n\n{part.strip()}" for title, part in parts.items() if part.strip()) + "\n"
    write_atomically(results.folder / "tables.md", lambda file: file.write(text.encode()))
    if (frame.status != FAILED).any():
        for metric in _BARS:
            if frame[metric].notna().any():
                plots.category_bars(frame, metric, results.folder / f"bars_{metric}.png")
        plots.shots_curve(frame, [name for name in _CURVES if frame[name].notna().any()], results.folder / "shots.png")
    _draw_heatmaps(results, plan)
    console = Console()
    console.print(Markdown(parts["Summary"]) if console.is_terminal else parts["Summary"], soft_wrap=True)
    console.print(f"All tables, plots and pictures: {results.folder}", soft_wrap=True)


def _notes(plan: Plan, found: Sequence[CellResult]) -> list[str]:
    """What a reader of the summary must know first."""
    notes = []
    for entry in plan.models:
        if any(0 < k_shot < entry.fewest_images for k_shot in plan.shots or ()):
            notes.append(f"{entry.name} is not defined for fewer than {entry.fewest_images} images.")
        if not entry.shots(plan.shots):
            notes.append(f"{entry.name} has no rows: it takes none of the numbers of references asked for.")
    versions = [result.details.get("versions", {}) for result in found if result.status == DONE]
    for package in sorted({name for of_cell in versions for name in of_cell}):
        numbers = sorted({of_cell.get(package, "unknown") for of_cell in versions})
        if len(numbers) > 1:
            notes.append(f"The cells were made with {package} {' and '.join(numbers)}; results.json tells which.")
    bounds = [bound for result in found for bound in result.details.get("error_bounds", {}).values()]
    if max(bounds, default=0.0) > PROMISED:
        notes.append(
            f"Streaming metrics may be off by up to {max(bounds):.1g}; results.json tells which, and by how much."
        )
    return notes


def _draw_heatmaps(results: Results, plan: Plan) -> None:
    """The paper's figure 2 for every model and data set."""
    groups: dict[str, list[Path]] = {}
    for accelerator in plan.accelerators:
        for entry, data, _ in plan.groups(accelerator):
            stored = sorted(results.heatmaps.glob(f"{file_stem(entry.name, data.name, data.category)}-*.npz"))
            known = groups.setdefault(f"{entry.name}-{data.name}", [])
            known += [file for file in stored if file not in known]
    for name, stored in groups.items():
        shown = [np.load(file) for file in stored]
        kept = {key for one in shown[:1] for key in one.files} - {"image", "mask"}
        settings = sorted(kept, key=lambda title: int(title.partition("-")[0]))
        rows = [one for one in shown if all(setting in one.files for setting in settings)]
        rows = [one for one in rows if Path(str(one["image"])).exists()]
        if rows:
            heatmap_figure(
                [Path(str(one["image"])) for one in rows],
                [one["mask"] for one in rows],
                {setting: [torch.from_numpy(one[setting]).float() for one in rows] for setting in settings},
                results.folder / f"heatmaps_{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.png",
            )
