"""What is known of an exported graph: the entry of its file in ``metadata.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_entries, shown
from ..files import read_json

METADATA = "metadata.json"
_ENTRIES: dict[str, Any] = {
    "classes": [str],
    "inputs": [str],
    "image_size": [int],
    "tile_size": (int, None),
    "tile_overlap": (float, int, None),
    "decision": (str, None),
}


@dataclass(frozen=True)
class Metadata:
    """What ``metadata.json`` says of a graph.

    Attributes:
        classes: Names of the classes; the place of each is its row, the ``class_index`` of its images.
        inputs: Names of the inputs of the graph.
        image_size: Height and width in pixels of its maps.
        tile_size: Side in pixels of the tiles that it is for; ``None`` for whole images.
        tile_overlap: Least share of a tile's side that its neighbour covers too.
        decision: File of the graph that decides on images put together of tiles.
    """

    classes: tuple[str, ...]
    inputs: tuple[str, ...]
    image_size: tuple[int, ...]
    tile_size: int | None
    tile_overlap: float | None
    decision: str | None

    @classmethod
    def of(cls, path: Path) -> Metadata:
        """What is said of the graph in this file.

        Raises:
            FileNotFoundError: There is no ``metadata.json`` beside it.
            ValueError: It says nothing of this file, or something else than an export of this package does.
        """
        file = path.parent / METADATA
        if not file.is_file():
            msg = f"There is no {file}. Export the model with anomalib-aprilgan, and keep the files together."
            raise FileNotFoundError(msg)
        entry = read_entries(file).get(path.name)
        if entry is None:
            msg = f"{file} says nothing of {path.name}: it is no export of anomalib-aprilgan, or was renamed."
            raise ValueError(msg)
        check_entries(f"{file}, {path.name}", entry, _ENTRIES)
        decision = entry["decision"]
        if decision is not None and Path(decision).name != decision:
            msg = f"{file}: `decision` must be the name of a file beside it, got {shown(decision)}."
            raise ValueError(msg)
        return cls(
            tuple(entry["classes"]),
            tuple(entry["inputs"]),
            tuple(entry["image_size"]),
            entry["tile_size"],
            entry["tile_overlap"],
            decision,
        )


def read_entries(file: Path) -> dict[str, Any]:
    """Entries of a ``metadata.json`` by file, none where there is no such file; a ValueError where it is no such."""
    if not file.is_file():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        msg = f"{file} must hold an entry for each exported file."
        raise ValueError(msg)
    return content
