"""Wrong, extreme and hostile values, files and images: each gives a result, or an error that says why."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAN, INFINITY = float("nan"), float("inf")
# For any argument.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**9, 2**80, 0.0, 0.5, -0.5, 1.5, 1e-6, 1e300, NAN, INFINITY, -INFINITY,
    "", " ", "nut", "no/such/file.pth", ".", "x" * 10_000, "\n\t\x07", "\N{PILE OF POO}", "\udcff", "{}",
    "${oc.env:HOME}",
    [], [0], [1], [2, 1], [1, 1], ["a", "b"], ["a", ""], [None], [[1]], (96,), (96, 96), (96, 100), (1, 2, 3),
    {}, {"a": "b"}, {"a": ""}, {"": "b"}, {"a": None}, {"a": ["b"]}, {1: 2}, b"bytes", object(), 1j, range(3),
    np.int64(2), np.float32(0.25), np.array([1, 2]), torch.tensor(1), Path("x"), lambda: None,
]  # fmt: skip
LONGEST = 1.0  # seconds of processor time that a case may take


def outcome(case: Callable[[], object], names: tuple[str, ...]) -> str:
    """``ok``, or ``refused`` where the error names one of these in its text; else what is wrong with it."""
    started = time.process_time()
    try:
        case()
        result = "ok"
    except (ValueError, TypeError, FileNotFoundError, RuntimeError, OSError) as error:
        text = str(error)
        named = any(f"`{name}" in text or (os.sep in name and name in text) for name in names)
        result = "refused" if named else f"{type(error).__name__} that names nothing: {text[:200]}"
    except Exception as error:
        result = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.process_time() - started
    return result if seconds < LONGEST else f"{seconds:.1f} s; {result}"
