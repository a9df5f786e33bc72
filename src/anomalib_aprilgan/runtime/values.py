"""Bounds and thresholds in exported files and checkpoints: read and replaced.

They lie in one table of a graph, and in buffers of what torch writes. Nothing else of a file is touched, nothing in it
is run, and a change replaces the file as a whole.
"""

from __future__ import annotations

import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from ..checks import shown
from ..files import write_atomically
from ..value_names import BUFFERS, COLUMNS, TABLE
from .metadata import Metadata
from .torch_files import Content, Place, copy_with, read_bytes, read_content

Values = dict[str, dict[str, float]]  # by class, by name


class ValueFile(ABC):
    """A file with bounds and thresholds of its classes.

    ``names`` are those that can be set in it.
    """

    names: Sequence[str] = tuple(BUFFERS)

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        self.path, self.classes = path, tuple(classes)

    @abstractmethod
    def read(self) -> Values:
        """All values; a ValueError where the file is not as this package writes it."""

    @abstractmethod
    def write(self, class_name: str, values: Mapping[str, float]) -> None:
        """Replace some values of a class, the file as a whole."""


class TableFile(ValueFile):
    """A graph, whose table of values lies in a file at ``start``, which subclasses find."""

    @abstractmethod
    def _find(self) -> tuple[Path, int]:
        """File of the table, and bytes before it."""

    def _table(self, place: tuple[Path, int]) -> NDArray[np.float32]:
        file, start = place
        shape = len(self.classes), len(COLUMNS)
        with file.open("rb") as opened:
            opened.seek(start)
            content = opened.read(4 * math.prod(shape))
        if len(content) != 4 * math.prod(shape):
            self._refuse(f"{file.name} ends before its table of thresholds does")
        table = np.frombuffer(content, dtype="<f4").reshape(shape)
        if not np.isfinite(table).all():
            self._refuse("a threshold in it is not a number")
        return table

    def read(self) -> Values:
        """See the base class."""
        table = self._table(self._find())
        return {
            name: {column: float(row[place]) for place, column in enumerate(BUFFERS)}
            for name, row in zip(self.classes, table, strict=True)
        }

    def write(self, class_name: str, values: Mapping[str, float]) -> None:
        """See the base class."""
        file, start = self._find()
        table = self._table((file, start)).copy()
        for name, value in values.items():
            table[self.classes.index(class_name), COLUMNS.index(name)] = value

        def copy(target: IO[bytes]) -> None:
            with file.open("rb") as source:
                shutil.copyfileobj(source, target, 2**20)
            target.seek(start)
            target.write(table.astype("<f4").tobytes())

        write_atomically(file, copy)

    def _refuse(self, reason: str) -> NoReturn:
        msg = f"{self.path} is no export of anomalib-aprilgan, or was edited by hand: {reason}."
        raise ValueError(msg)


class IRFile(TableFile):
    """OpenVINO's ``.xml`` and ``.bin``."""

    def _find(self) -> tuple[Path, int]:
        try:
            layers = ElementTree.parse(self.path).getroot().iter("layer")  # noqa: S314  # expat limits expansions
        except ElementTree.ParseError as error:
            self._refuse(f"it is no XML ({error})")
        found = [one for one in layers if one.get("type") == "Const" and str(one.get("name")).endswith(TABLE)]
        data = found[0].find("data") if len(found) == 1 else None
        if data is None:
            self._refuse(f"it has {len(found)} tables of thresholds, and not one")
        shape, number = f"{len(self.classes)}, {len(COLUMNS)}", len(self.classes) * len(COLUMNS)
        if data.get("element_type") != "f32" or data.get("shape", "").replace(" ", "") != shape.replace(" ", ""):
            self._refuse(f"its table is {data.get('element_type')} [{data.get('shape')}], and not f32 [{shape}]")
        offset, size = data.get("offset", ""), data.get("size", "")
        if not offset.isdecimal() or size != str(4 * number):
            self._refuse(f"its table lies at {shown(offset)} and takes {shown(size)} bytes, not {4 * number}")
        binary = self.path.with_suffix(".bin")
        if not binary.is_file():
            msg = f"There is no {binary}, which belongs to {self.path.name}."
            raise FileNotFoundError(msg)
        return binary, int(offset)


class OnnxFile(TableFile):
    """An ``.onnx`` file, whose table lies in it or in a file of weights beside."""

    def _find(self) -> tuple[Path, int]:
        try:
            import onnx
        except ModuleNotFoundError as error:
            msg = "To change an ONNX file, onnx is needed: pip install onnx"
            raise ValueError(msg) from error
        try:
            model = onnx.load(self.path, load_external_data=False)
        except Exception as error:  # whatever protobuf says of a damaged file
            self._refuse(f"it cannot be read ({shown(str(error), 200)})")
        found = [tensor for tensor in model.graph.initializer if str(tensor.name).endswith(TABLE)]
        if len(found) != 1:
            self._refuse(f"it has {len(found)} tables of thresholds, and not one")
        (tensor,), shape = found, [len(self.classes), len(COLUMNS)]
        if list(tensor.dims) != shape or tensor.data_type != onnx.TensorProto.FLOAT:
            self._refuse(f"its table is {list(tensor.dims)}, and not {shape}")
        if tensor.external_data:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            file = self.path.parent / Path(entries.get("location", "")).name
            if not file.is_file() or not entries.get("offset", "0").isdecimal():
                self._refuse(f"its weights are not in {file.name}")
            return file, int(entries.get("offset", "0"))
        content = self.path.read_bytes()
        if not tensor.raw_data or content.count(tensor.raw_data) != 1:
            self._refuse("its table is not stored as plain numbers")
        return self.path, content.index(tensor.raw_data)


class TorchFile(ValueFile):
    """What torch wrote: a checkpoint, or an export for ``TorchInferencer``."""

    def __init__(self, path: Path) -> None:
        content = read_content(path)
        if path.suffix == ".ckpt":
            self._places, classes = _of_checkpoint(path, content)
            # Scores of good parts, which it holds too, are those of one fusion.
            self.names = tuple(name for name in BUFFERS if not name.startswith("map_maximum"))
        else:
            self._places, classes = _of_export(path, content)
        super().__init__(path, classes)
        wrong = [name for name, place in self._places.items() if place.number != len(classes)]
        if wrong:
            msg = f"{path} has {self._places[wrong[0]].number} values of {wrong[0]} for {len(classes)} classes."
            raise ValueError(msg)

    def read(self) -> Values:
        """See the base class."""
        known = {name: place for name, place in self._places.items() if name in BUFFERS}
        columns = {name: np.frombuffer(read_bytes(self.path, place, 4), "<f4") for name, place in known.items()}
        wrong = [name for name, column in columns.items() if not np.isfinite(column).all()]
        if wrong:
            msg = f"{self.path}: {wrong[0]} is not a number. It is damaged, or was edited by hand."
            raise ValueError(msg)
        return {
            class_name: {name: float(columns[name][row]) for name in columns}
            for row, class_name in enumerate(self.classes)
        }

    def write(self, class_name: str, values: Mapping[str, float]) -> None:
        """See the base class. From then on validation changes none of this class."""
        row = self.classes.index(class_name)
        changes = {}
        for name, value in values.items():
            record, start, _ = self._places[name]
            changes[Place(record, start + 4 * row, 1)] = np.array(value, "<f4").tobytes()
        record, start, _ = self._places["fixed"]
        changes[Place(record, start + row, 1)] = b"\x01"
        write_atomically(self.path, lambda target: copy_with(self.path, target, changes))


def open_values(path: Path) -> ValueFile:
    """The bounds and thresholds of an exported file or checkpoint.

    Raises:
        FileNotFoundError: The file, or one that belongs to it, is missing.
        ValueError: It is none that this package wrote.
    """
    kinds = {".xml": IRFile, ".onnx": OnnxFile}
    if path.suffix not in {*kinds, ".ckpt", ".pt"}:
        msg = f"MODEL must be an .xml, .onnx, .pt or .ckpt file, got {shown(str(path))}."
        raise ValueError(msg)
    if not path.is_file():
        msg = f"There is no {path}."
        raise FileNotFoundError(msg)
    if path.suffix not in kinds:
        return TorchFile(path)
    metadata = Metadata.of(path)
    file = path if metadata.decision is None else path.parent / metadata.decision
    if not file.is_file():
        msg = f"There is no {file}, which belongs to {path.name}."
        raise FileNotFoundError(msg)
    return kinds[path.suffix](file, metadata.classes)


def _of_checkpoint(path: Path, content: Content) -> tuple[dict[str, Place], list[str]]:
    tensors = content.get("state_dict") if isinstance(content, dict) else None
    entry = content.get("anomalib_aprilgan") if isinstance(content, dict) else None
    classes = entry.get("classes") if isinstance(entry, dict) else None
    names = {**{name: f"post_processor.{buffer}" for name, buffer in BUFFERS.items()}, "fixed": "post_processor.fixed"}
    if isinstance(entry, dict) and "format" not in entry:
        msg = f"{path} was written by 0.1.0. Run AprilGAN with it once, and save a checkpoint of today's form."
        raise ValueError(msg)
    if not isinstance(tensors, dict) or not isinstance(classes, list) or not all(map(_is_class, classes)):
        msg = f"{path} is no checkpoint of an AprilGAN."
        raise ValueError(msg)
    places = _places(path, {name: tensors.get(buffer) for name, buffer in names.items()})
    return places, [name for name, _ in classes]


def _is_class(pair: Content) -> bool:
    """Whether it is the name of a class and its word."""
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)


def _of_export(path: Path, content: Content) -> tuple[dict[str, Place], list[str]]:
    def part(module: Content, *names: str) -> dict[str, Any]:
        for name in names:
            module = module.state["_modules"][name]
        state: dict[str, Any] = module.state
        return state

    try:
        model = content["model"]
        post_processor = part(model, "post_processor")["_buffers"]
        fusion = part(model, "post_processor", "fusion")["_buffers"]
    except (KeyError, TypeError, AttributeError) as error:
        msg = f"{path} is no export of an AprilGAN with its own post-processor."
        raise ValueError(msg) from error
    buffers = {**post_processor, **{f"fusion.{name}": place for name, place in fusion.items()}}
    found = {**{name: buffers.get(buffer) for name, buffer in BUFFERS.items()}, "fixed": buffers.get("fixed")}
    return _places(path, found), list(Metadata.of(path).classes)


def _places(path: Path, found: Mapping[str, Any]) -> dict[str, Place]:
    missing = [name for name, place in found.items() if not isinstance(place, Place)]
    if missing:
        msg = f"{path} holds no {missing[0]} of an AprilGAN's post-processor."
        raise ValueError(msg)
    return dict(found)
