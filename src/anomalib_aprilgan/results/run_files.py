"""The files of a run, read back: decisions, regions, maps, thresholds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checks import check_entries
from ..csv_text import read_csv, safe_path
from ..decision.post_processing import AprilGANPostProcessor
from ..decision.scale import Bounds, scaled
from ..files import is_file, read_json, write_atomically
from .regions import Region

DECISIONS, REGIONS, MAPS, THRESHOLDS = "decisions.csv", "regions.csv", "maps.csv", "thresholds.json"
_ENTRIES: dict[str, Any] = {"name": str, "image_cut": (float, int), "knots": [[(float, int)]]}


@dataclass(frozen=True)
class ClassThreshold:
    """Where scores of a class are cut.

    Scores above ``image_cut`` are anomalous. ``knots`` are pairs of raw and post-processed scores, between which
    the scale is linear.
    """

    name: str
    image_cut: float = 0.5
    knots: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class InspectedImage:
    """What the files of a run say of one image; empty or ``None`` what they do not."""

    image_path: str
    class_name: str = ""
    score: float | None = None
    decision: str = ""
    label: str = ""
    p_value: str = ""
    drift: str = ""
    regions: Sequence[Region] = ()
    map_file: Path | None = None


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run say."""

    images: list[InspectedImage]
    thresholds: list[ClassThreshold] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, table: Path | None = None) -> RunFiles:
        """The files in the folder of a run.

        Args:
            folder: Where ``decisions.csv`` lies, and the others where they were asked for.
            table: Another place of ``decisions.csv``.

        Raises:
            FileNotFoundError: There is no ``decisions.csv``.
            ValueError: A file is no such table.
        """
        path = table or folder / DECISIONS
        if not is_file(path):
            msg = f"There is no {path}: give the folder of a run, such as results/AprilGAN/latest."
            raise FileNotFoundError(msg)
        regions: defaultdict[str, list[Region]] = defaultdict(list)
        for row in _rows(folder / REGIONS, ("image_path", *Region._fields)):
            regions[row["image_path"]].append(_region(row, folder / REGIONS))
        maps = {row["image_path"]: folder / row["map"] for row in _rows(folder / MAPS, ("image_path", "map"))}
        images = [
            InspectedImage(
                row["image_path"],
                row["class_name"],
                _score(row["score"], path),
                row["decision"],
                row.get("label", ""),
                row.get("p_value", ""),
                row.get("drift", ""),
                regions[safe_path(row["image_path"])],
                _within(maps.get(safe_path(row["image_path"])), folder),
            )
            for row in _rows(path, ("image_path", "class_name", "score", "decision"))
        ]
        return cls(images, _read_thresholds(folder / THRESHOLDS))


def write_thresholds(path: Path, post_processor: object, names: Sequence[str]) -> None:
    """Write where scores of each class are cut; nothing where the post-processor is not ours."""
    if not isinstance(post_processor, AprilGANPostProcessor):
        return
    found = [thresholds_of(post_processor, row, name) for row, name in enumerate(names)]
    content = json.dumps([{**vars(one), "knots": [list(pair) for pair in one.knots]} for one in found], indent=1)
    write_atomically(path, lambda file: file.write(content.encode()))


def thresholds_of(post_processor: AprilGANPostProcessor, row: int, name: str) -> ClassThreshold:
    """Where scores of a class are cut, and how raw scores become those that are written."""
    values = post_processor.of_class(row).values()
    floor, ceiling = 0.0, 1.0
    if post_processor.fuse_map_maximum:
        floor, ceiling = (end[row].item() for end in post_processor.fusion.range(post_processor.map_ceiling))
    low, threshold, high = (values[f"image_{bound}"] for bound in ("min", "threshold", "max"))
    cut = post_processor.normalized_image_threshold[row].item()
    inner = [end for end in (low, threshold, high) if min(floor, threshold) < end < max(ceiling, threshold)]
    knots = torch.tensor(sorted({min(floor, threshold), *inner, max(ceiling, threshold)}), dtype=torch.float64)
    bounds = Bounds(*(knots.new_tensor(value) for value in (low, threshold, high, floor, ceiling)))
    on_scale = scaled(knots, bounds) if post_processor.enable_normalization else knots
    return ClassThreshold(name, cut, list(zip(knots.tolist(), on_scale.tolist(), strict=True)))


def _read_thresholds(path: Path) -> list[ClassThreshold]:
    if not is_file(path):
        return []
    content = read_json(path)
    if not isinstance(content, list):
        msg = f"{path} must hold a list with an entry for each class."
        raise ValueError(msg)
    for entry in content:
        check_entries(str(path), entry, _ENTRIES)
    return [ClassThreshold(entry["name"], entry["image_cut"], entry["knots"]) for entry in content]


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a table, none where there is none; a ValueError where it lacks a column."""
    rows = read_csv(path) if is_file(path) else []
    missing = [name for name in needed if rows and name not in rows[0]]
    if missing:
        msg = f"{path} has no column {', '.join(missing)}: something else wrote it."
        raise ValueError(msg)
    return rows


def _score(text: str, path: Path) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        msg = f"{path}: a score must be a number, got {text!r}."
        raise ValueError(msg) from None


def _region(row: Mapping[str, str], path: Path) -> Region:
    try:
        whole = [int(row[name]) for name in Region._fields[:5]]
        return Region(*whole, *(float(row[name]) for name in Region._fields[5:]))
    except ValueError as error:
        msg = f"{path}: a region must be numbers ({error})."
        raise ValueError(msg) from error


def _within(path: Path | None, folder: Path) -> Path | None:
    """The file of a map; ``None`` where it is gone, or the table names one elsewhere."""
    if path is None or not path.resolve().is_relative_to(folder.resolve()) or not is_file(path):
        return None
    return path
