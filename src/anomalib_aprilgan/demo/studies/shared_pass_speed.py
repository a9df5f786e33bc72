"""How much one pass for all settings saves over a run for each, on the built-in data.

``python -m anomalib_aprilgan.demo.studies.shared_pass_speed`` measures both in one process, one after the other,
metrics included, and compares every metric.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console

from ... import AprilGAN
from ...evaluation.cells import Cell, CellResult
from ...evaluation.jobs import CellJob, SharedPassJob, Task, Workplace
from ...evaluation.plan import DataEntry, ModelEntry
from ...evaluation.tables import markdown
from .. import built_in

CATEGORIES = ("leather", "nut")
ARGUMENTS: dict[str, Any] = {
    "backbone": built_in.ARCHITECTURE,
    "pretrained": built_in.PRETRAINED,
    "image_size": built_in.IMAGE_SIZE,
    "stages": list(built_in.STAGES),
    "memory_stages": list(built_in.MEMORY_STAGES),
}


def settings_of(category: str) -> list[Cell]:
    """The 16 settings of the paper's tables: zero-shot, and 1, 2 and 4 shots of five seeds."""
    drawn = [(k_shot, seed) for k_shot in (1, 2, 4) for seed in range(5)]
    return [Cell("AprilGAN", "DrawnInspection", category, k_shot, seed) for k_shot, seed in [(0, 0), *drawn]]


def seconds_and_results(jobs: Sequence[CellJob | SharedPassJob]) -> tuple[float, list[CellResult]]:
    """Run jobs one after the other."""
    started = time.perf_counter()
    workplace = Workplace()
    results = [result for job in jobs for result in cast("list[CellResult]", job.run(workplace))]
    return time.perf_counter() - started, results


def largest_difference(first: Sequence[CellResult], second: Sequence[CellResult]) -> float:
    """Of any metric of any setting; infinite if one exists in one run alone."""
    pairs = [
        (one.metrics[name], other.metrics[name])
        for one, other in zip(first, second, strict=True)
        for name in one.metrics
    ]
    differences = [0.0 if np.isnan(a) and np.isnan(b) else np.nan_to_num(abs(a - b), nan=np.inf) for a, b in pairs]
    return float(max(differences))


def measure(root: Path, category: str, number: int) -> tuple[float, float, float]:
    """Seconds of one pass and of a run for each setting, and the largest difference.

    Args:
        root: Folder of the drawn pictures.
        category: Whose test images.
        number: Of good test images, and of bad ones.
    """
    drawn = {"root": str(root), "category": category, "image_size": built_in.IMAGE_SIZE, "num_test": number}
    drawn |= {"seed": 300, "num_workers": 0}
    data = DataEntry("drawn", "DrawnInspection", category, {"class_path": "DrawnInspection", "init_args": drawn})
    model = ModelEntry("AprilGAN", AprilGAN, {"class_path": "AprilGAN", "init_args": ARGUMENTS})
    data.build().prepare_data()
    with tempfile.TemporaryDirectory() as folder:
        task = Task("cpu", streaming=False, scratch=Path(folder), maps=Path(folder), shown=0, resamples=1000)
        cells = settings_of(category)
        shared = SharedPassJob(task, tuple(cells), model, data)
        single = [CellJob(task, (cell,), model, data) for cell in cells]
        together, first = seconds_and_results([shared])
        apart, second = seconds_and_results(single)
    return together, apart, largest_difference(first, second)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Time one pass for 16 settings beside 16 runs.")
    parser.add_argument("--root", type=Path, default=Path("datasets/DrawnInspection"), help="folder of drawn pictures")
    parser.add_argument("--number", type=int, default=42, help="good test images, and as many bad ones")
    options = parser.parse_args(arguments)
    measure(options.root, CATEGORIES[0], 1)  # what is loaded at the first use is nobody's
    lines = []
    for category in CATEGORIES:
        together, apart, difference = measure(options.root, category, options.number)
        lines.append(
            (category, f"{together:.2f} s", f"{apart:.2f} s", f"{apart / together:.1f} x", f"{difference:.1e}")
        )
    header = ("16 settings", "one pass", "one by one", "cheaper", "largest difference of a metric")
    Console(width=160, soft_wrap=True, highlight=False).print(markdown(header, lines))


if __name__ == "__main__":
    main()
