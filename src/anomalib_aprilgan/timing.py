"""Seconds of several things side by side: the speed of a machine drifts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def measure(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in every round, one after the other, after a round that is not counted."""
    durations: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if number:
                durations[name].append(time.perf_counter() - start)
    return durations
