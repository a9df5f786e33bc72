"""The subcommand ``report``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import track

from ..results.report import write_report
from ..results.run_files import InspectedImage, RunFiles
from .printing import say


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Write the page of a run's results."""
    del parser
    run_files = RunFiles.read(given.folder)
    path = write_report(given.folder, run_files, given.title, _with_progress)
    without = "" if any(one.map_file for one in run_files.images) else " (without heatmaps: the run has no maps.csv)"
    say(f"{len(run_files.images)} images: {path}{without}")
    return 0


def _with_progress(images: Sequence[InspectedImage]) -> Iterable[InspectedImage]:
    return track(images, "Images", len(images), console=Console(stderr=True))
