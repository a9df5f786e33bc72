"""The subcommand ``bench``."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict

import torch

from ..evaluation.engines import ENGINES, Measured, measure_engines
from ..evaluation.tables import markdown
from .printing import say


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure engines and print a Markdown table."""
    _check(given, parser)
    try:
        found = measure_engines(
            given.backbone, given.image_size, given.k_shot, given.engines, given.batch_sizes, given.rounds, given.device
        )
    except ModuleNotFoundError as error:  # an engine is not installed
        parser.error(str(error))
    if given.json:
        say(json.dumps([asdict(one) for one in found], indent=1))
        return 0
    say(
        f"{given.backbone}, {given.k_shot}-shot, random weights, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, {given.device} ({platform.machine()}), median of {given.rounds} rounds, all in one run\n"
    )
    header = ["engine", "batch", "p50, s", "p95, s", "images/s", f"to {given.engines[0]}", "peak MB", "of roofline"]
    rows = [_row(one) for one in found]
    say(markdown(header, rows))
    return 0


def _check(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    unknown = [name for name in given.engines if name not in ENGINES]
    if unknown:
        parser.error(f"--engines must be some of {', '.join(ENGINES)}, got {', '.join(unknown)}.")
    least = {"batch_sizes": (min(given.batch_sizes), 1), "rounds": (given.rounds, 1), "k_shot": (given.k_shot, 0)}
    for name, (value, lowest) in least.items():
        if value < lowest:
            parser.error(f"--{name} must be at least {lowest}, got {value}.")
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:  # as torch says that there is no such device
        parser.error(f"--device {given.device} cannot be used: {str(error).splitlines()[0]}")


def _row(one: Measured) -> list[str]:
    figures = f"{one.p50:.4f}", f"{one.p95:.4f}", f"{one.throughput:.2f}", f"{one.ratio:.3f}"
    peak = "" if one.megabytes is None else f"{one.megabytes:.0f}"
    return [one.engine, str(one.batch_size), *figures, peak, "" if one.roofline is None else f"{one.roofline:.2f}"]
