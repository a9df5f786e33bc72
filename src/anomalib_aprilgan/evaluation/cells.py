"""Results of a benchmark on disk: one file per cell, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import OmegaConf

from ..files import write_atomically
from ..metrics import METRICS

FULL = -1
"""Number of shots that stands for all training images."""

DONE, FAILED = "done", "failed"
COLUMNS = (
    *("model", "dataset", "category", "k_shot", "seed", "accelerator", "status", "reason", "n_images", "n_anomalous"),
    *METRICS,
    *("seconds", "seconds_per_image", "peak_memory_mb", "datamodule", "evaluation_size", "test_files"),
)
_NUMBERS = ("seconds", "seconds_per_image", "peak_memory_mb")


class Cell(NamedTuple):
    """One entry of the table of results.

    Attributes:
        model: Name in the tables.
        dataset: Name of the datamodule in the tables.
        category: Its category.
        k_shot: Number of reference images; 0 for zero-shot, ``FULL`` for all training images.
        seed: Seed of the draw of references and of everything else that is random, but for the split of the data.
        accelerator: Where it runs.
    """

    model: str
    dataset: str
    category: str
    k_shot: int
    seed: int
    accelerator: str = "auto"

    def __str__(self) -> str:
        """In words."""
        shots = "all images" if self.k_shot == FULL else f"{self.k_shot}-shot"
        data = f"{self.dataset} {self.category}".rstrip()
        return f"{self.model}, {data}, {shots}, seed {self.seed}, {self.accelerator}"


@dataclass(frozen=True)
class CellResult:
    """What became of a cell.

    Args:
        cell: Which.
        status: ``DONE`` or ``FAILED``.
        reason: Why it failed.
        n_images: Number of test images.
        n_anomalous: Number of anomalous ones.
        metrics: By name, NaN where one does not exist.
        seconds: Its duration; settings that share a pass have an equal share of it.
        seconds_per_image: Of the network alone, for one image at a time.
        peak_memory_mb: Of a GPU's memory that the network takes for one image; on a CPU, of the whole process.
        datamodule: Name of the datamodule's class.
        evaluation_size: Size of maps and masks for the metrics of pixels, in words.
        test_files: Digest of the list of test images: figures of different lists do not compare.
        details: Anything else: references, checksums of weights, hardware, versions.
        samples: Every metric of bootstrap samples of the images, ``(B,)``.
    """

    cell: Cell
    status: str = DONE
    reason: str = ""
    n_images: int = 0
    n_anomalous: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    seconds_per_image: float = math.nan
    peak_memory_mb: float = math.nan
    datamodule: str = ""
    evaluation_size: str = ""
    test_files: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The result as a row with ``COLUMNS``."""
        metrics = {name: self.metrics.get(name, math.nan) for name in METRICS}
        return {name: getattr(self, name) for name in COLUMNS if hasattr(self, name)} | self.cell._asdict() | metrics


class Results:
    """A folder of results that belongs to one config.

    Args:
        folder: Created where it is missing.
        config: What the results depend on.

    Raises:
        ValueError: The folder holds the results of another config.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        path = folder / "config.yaml"
        wanted = OmegaConf.to_yaml(OmegaConf.create(config), sort_keys=True)
        if path.exists():
            present = path.read_text(encoding="utf-8")
            if present != wanted:
                ours, theirs = set(wanted.splitlines()), set(present.splitlines())
                changed = next(iter(sorted(ours ^ theirs)), "the order of the entries").strip()
                msg = (
                    f"`results`: {folder} holds the results of another config (they differ in {changed!r}). Choose "
                    f"another folder, or run with the config in {path}."
                )
                raise ValueError(msg)
        elif folder.exists() and any(entry.name != ".gitkeep" for entry in folder.iterdir()):
            msg = f"`results`: {folder} holds files that are not results of a benchmark. Choose an empty folder."
            raise ValueError(msg)
        else:
            write_atomically(path, lambda file: file.write(wanted.encode()))

    @property
    def heatmaps(self) -> Path:
        """Folder of the maps that are shown in pictures."""
        return self.folder / "maps"

    def save(self, result: CellResult) -> None:
        """Keep a result: its samples first, for without them it would not be done."""
        path = self._path_of(result.cell)
        if result.samples:
            arrays: dict[str, Any] = result.samples
            write_atomically(path.with_suffix(".npz"), lambda file: np.savez(file, **arrays))
        text = json.dumps(_without_nan(_as_json(result)), indent=1, sort_keys=True)
        write_atomically(path, lambda file: file.write(text.encode()))

    def load(self, cell: Cell) -> CellResult | None:
        """What is known of a cell."""
        path = self._path_of(cell)
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        metrics = {name: math.nan if value is None else value for name, value in found["metrics"].items()}
        numbers = {name: math.nan if found[name] is None else found[name] for name in _NUMBERS}
        samples = {}
        if path.with_suffix(".npz").exists():
            with np.load(path.with_suffix(".npz")) as arrays:
                samples = dict(arrays)
        return CellResult(**found | numbers | {"cell": Cell(**found["cell"]), "metrics": metrics, "samples": samples})

    def is_done(self, cell: Cell) -> bool:
        """Whether there is nothing left to do; what failed is tried again."""
        result = self.load(cell)
        return result is not None and result.status == DONE

    def frame(self, cells: Iterable[Cell]) -> pd.DataFrame:
        """The results there are, one row per cell with ``COLUMNS``, in the order of ``cells``."""
        return pd.DataFrame([result.row() for result in self.results(cells)], columns=list(COLUMNS))

    def results(self, cells: Iterable[Cell]) -> list[CellResult]:
        """The results there are, in the order of ``cells``."""
        return [result for cell in cells if (result := self.load(cell)) is not None]

    def write_tables(self, cells: Sequence[Cell], provenance: dict[str, Any]) -> None:
        """``results.csv``, tidy, and ``results.json``, with everything that is known of every cell."""
        table = self.frame(cells).to_csv(index=False, float_format="%.10g").encode()
        write_atomically(self.folder / "results.csv", lambda file: file.write(table))
        content = {"provenance": provenance, "cells": [_as_json(result) for result in self.results(cells)]}
        text = json.dumps(_without_nan(content), indent=1).encode()
        write_atomically(self.folder / "results.json", lambda file: file.write(text))

    def _path_of(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{file_stem(*cell)}.json"


def file_stem(*parts: str | int) -> str:
    """A file name for names that may hold any sign: readable, and never that of other names."""
    words = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join(str(part) for part in parts))
    return f"{words}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"


def _as_json(result: CellResult) -> dict[str, Any]:
    found = asdict(replace(result, samples={})) | {"cell": result.cell._asdict()}
    del found["samples"]
    return found


def _without_nan(value: Any) -> Any:  # noqa: ANN401  # JSON
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
