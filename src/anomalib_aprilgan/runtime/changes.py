"""Changes of bounds and thresholds in a file, which can be taken back: they are noted in ``NAME.thresholds.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_entries, shown
from ..files import read_json, write_atomically
from .values import ValueFile, Values, open_values

SHORT = {"image": "image_threshold", "pixel": "pixel_threshold"}
_MOST = 1e6  # that a map may reach
_HISTORY: dict[str, Any] = {"when": str, "class_name": str, "before": {str: float}, "after": {str: float}}


def change(path: Path, given: Mapping[str, float], class_name: str | None = None) -> tuple[Values, Values]:
    """Set some values of a class, by their names or ``image`` and ``pixel``; returns those before and after.

    A ValueError names what is unknown or out of range; nothing is changed then. Errors are those of ``open_values``
    too.
    """
    file = open_values(path)
    values = {SHORT.get(name, name): value for name, value in given.items()}
    row = _class_of(file, class_name)
    before = file.read()
    _check(file, values, before[row])
    history = _history(path, before)
    rounded = {name: float(np.float32(value)) for name, value in values.items()}
    entry = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "class_name": row,
        "before": {name: before[row][name] for name in rounded},
        "after": rounded,
    }
    # First what was before: a run that is killed in between has changed nothing, and the entry is dropped later.
    _write_history(path, [*history, entry])
    try:
        file.write(row, rounded)
    except Exception:
        _write_history(path, history)
        raise
    return before, file.read()


def undo(path: Path) -> tuple[Values, Values]:
    """Take the last change back; a ValueError where there is none, or the values are not those that it left."""
    file = open_values(path)
    before = file.read()
    history = _history(path, before)
    if not history:
        msg = f"There is no change of {path} to take back."
        raise ValueError(msg)
    last = history[-1]
    now = before.get(last["class_name"], {})
    if any(now.get(name) != value for name, value in last["after"].items()):
        msg = f"{path} was written anew since its last change. Nothing is taken back."
        raise ValueError(msg)
    file.write(last["class_name"], last["before"])
    _write_history(path, history[:-1])
    return before, file.read()


def _class_of(file: ValueFile, class_name: str | None) -> str:
    if class_name is None and len(file.classes) == 1:
        return file.classes[0]
    if class_name not in file.classes:
        msg = f"`class_name` must be one of {', '.join(file.classes)}, got {shown(class_name)}."
        raise ValueError(msg)
    return str(class_name)


def _check(file: ValueFile, values: Mapping[str, float], known: Mapping[str, float]) -> None:
    if not values:
        msg = f"Nothing to set: give some of {', '.join([*SHORT, *file.names])}."
        raise ValueError(msg)
    for name, value in values.items():
        if name not in file.names or name not in known:
            msg = f"`{name}` cannot be set in {file.path}; it must be one of {', '.join([*SHORT, *file.names])}."
            raise ValueError(msg)
        highest = 1.0 if name.startswith("image") else _MOST
        if not 0.0 <= value <= highest:  # also where it is not a number
            msg = f"`{name}` must be a number from 0 to {highest:g}, got {value}. Thresholds are raw scores."
            raise ValueError(msg)
    new = {**known, **values}
    for low, high in (("image_min", "image_max"), ("pixel_min", "pixel_max"), ("map_maximum_min", "map_maximum_max")):
        if {low, high} & set(values) and not new[low] < new[high]:
            msg = f"`{low}` must be below `{high}`, got {new[low]:g} and {new[high]:g}."
            raise ValueError(msg)


def _history_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.thresholds.json")


def _history(path: Path, values: Values) -> list[dict[str, Any]]:
    """Changes so far, without a last one that a killed run did not make."""
    file = _history_file(path)
    if not file.is_file():
        return []
    entries = read_json(file)
    found: list[Any] = entries if isinstance(entries, list) else [entries]
    for entry in found:
        check_entries(str(file), entry, _HISTORY)
    if found:
        last, now = found[-1], values.get(found[-1]["class_name"], {})
        if last["before"] != last["after"] and all(now.get(name) == value for name, value in last["before"].items()):
            return found[:-1]
    return found


def _write_history(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    if not entries:
        _history_file(path).unlink(missing_ok=True)
        return
    content = json.dumps(list(entries), indent=1, ensure_ascii=False)
    write_atomically(_history_file(path), lambda file: file.write(content.encode()))
