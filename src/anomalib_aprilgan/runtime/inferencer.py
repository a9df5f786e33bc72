"""Runs an exported model on images of any size, whole or in tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import check_int, shown
from ..tile_layout import axis_weights, tile_positions
from .metadata import Metadata
from .openvino_core import compiled

Array = NDArray[Any]
# From inputs by name to outputs by name.
Run = Callable[[Mapping[str, Array]], dict[str, Array]]
ENGINES = ("openvino", "onnxruntime")


class Prediction(NamedTuple):
    """What a model says of one image.

    Attributes:
        pred_score: From 0 to 1; above 0.5 is anomalous where nothing else was set.
        pred_label: Whether the image is anomalous.
        anomaly_map: ``(h, w)``, float32: at the size of the image in tiles, else at the model's.
        pred_mask: ``(h, w)``, which pixels are anomalous.
    """

    pred_score: float
    pred_label: bool | None
    anomaly_map: Array
    pred_mask: Array | None


class Inferencer:
    """A model that ``Engine.export`` wrote as ONNX or for OpenVINO, with ``metadata.json`` beside it.

    Args:
        path: The ``.xml`` or ``.onnx`` file.
        engine: ``"openvino"`` or ``"onnxruntime"``; by default the first for ``.xml``, the second for ``.onnx``.
        device: Device of OpenVINO.
        config: Options of OpenVINO's device; it computes in fp32 unless they say otherwise.
        tiles_at_once: Tiles of a large image that go through the model together.

    Raises:
        FileNotFoundError: A file is missing.
        ModuleNotFoundError: The engine is not installed.
        ValueError: The file is no export of this package, or the engine cannot read it.
    """

    def __init__(
        self,
        path: str | Path,
        engine: str | None = None,
        device: str = "CPU",
        config: Mapping[str, Any] | None = None,
        tiles_at_once: int = 4,
    ) -> None:
        self.path = Path(path)
        self.tiles_at_once = check_int("tiles_at_once", tiles_at_once, 1)
        if self.path.suffix not in {".xml", ".onnx"}:
            msg = f"`path` must be an .xml or .onnx file, got {shown(str(path))}."
            raise ValueError(msg)
        engine = engine or ("openvino" if self.path.suffix == ".xml" else "onnxruntime")
        if engine not in ENGINES or (engine == "onnxruntime" and self.path.suffix != ".onnx"):
            msg = f"`engine` must be 'openvino', or 'onnxruntime' for .onnx files, got {shown(engine)}."
            raise ValueError(msg)
        self.metadata = Metadata.of(self.path)
        options = (device, config or {})
        decision = self.metadata.decision
        self._run = _load(self.path, engine, options)
        self._decide = None if decision is None else _load(self.path.parent / decision, engine, options)
        if (self._decide is None) != (self.metadata.tile_size is None):
            msg = f"{self.path}: what metadata.json says of `tile_size` and `decision` does not go together."
            raise ValueError(msg)

    def predict(self, image: Array, class_name: str | None = None) -> Prediction:
        """What the model says of an image ``(H, W, 3)``, RGB, ``uint8`` or float in ``[0, 1]``.

        ``class_name`` is needed where the model has several classes. A ValueError for another image or class.
        """
        plane = _checked(image)
        row = {} if "class_index" not in self.metadata.inputs else {"class_index": self._row(class_name)}
        if "class_index" not in self.metadata.inputs and class_name not in {None, *self.metadata.classes}:
            self._row(class_name)  # raises
        if self._decide is None:
            return _prediction(self._run({"input": _batch([plane]), **row}))
        score, raw_map = self._in_tiles(plane, row)
        return _prediction(self._decide({"text_probability": score, "raw_map": raw_map[None], **row}))

    def _row(self, class_name: str | None) -> Array:
        classes = self.metadata.classes
        if class_name not in classes:
            msg = f"`class_name` must be one of {', '.join(classes)}, got {shown(class_name)}."
            raise ValueError(msg)
        return np.array([classes.index(str(class_name))], dtype=np.int64)

    def _in_tiles(self, image: Array, row: Mapping[str, Array]) -> tuple[Array, Array]:
        """Highest text probability ``(1,)`` of the tiles, and their maps as one ``(H, W)``, raw."""
        height, width = image.shape[:2]
        side, overlap = int(self.metadata.tile_size or 1), float(self.metadata.tile_overlap or 0.0)
        positions = tile_positions(height, width, side, overlap)
        shape = min(side, height), min(side, width)
        of_rows = axis_weights(height, shape[0], sorted({top for top, _ in positions}))
        of_columns = axis_weights(width, shape[1], sorted({left for _, left in positions}))
        blended = np.zeros((height, width), dtype=np.float32)
        highest = -np.inf
        for start in range(0, len(positions), self.tiles_at_once):
            some = positions[start : start + self.tiles_at_once]
            tiles = [image[top : top + shape[0], left : left + shape[1]] for top, left in some]
            rows = {name: np.repeat(value, len(some)) for name, value in row.items()}
            found = self._run({"input": _batch(tiles), **rows})
            highest = max(highest, found["text_probability"].max())
            for (top, left), tile_map in zip(some, found["raw_map"], strict=True):
                part = resized(tile_map, shape) * of_rows[top][:, None] * of_columns[left]
                blended[top : top + shape[0], left : left + shape[1]] += part
        return np.array([highest], dtype=np.float32), blended


def resized(plane: Array, size: tuple[int, int]) -> Array:
    """A map ``(h, w)`` at another size, bilinear with half-pixel centres, as torch's ``interpolate`` has it."""
    for axis, length in enumerate(size):
        known = plane.shape[axis]
        if known == length:
            continue
        places = ((np.arange(length) + 0.5) * (known / length) - 0.5).clip(0, known - 1)
        low = places.astype(int)
        high, share = np.minimum(low + 1, known - 1), (places - low).astype(np.float32)
        share = share[:, None] if axis == 0 else share
        plane = plane.take(low, axis) * (1 - share) + plane.take(high, axis) * share
    return plane


def _checked(image: Array) -> Array:
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        got = shown(image.shape) if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        msg = f"`image` must be an array (H, W, 3), RGB, got {got}."
        raise ValueError(msg)
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating) or not (image.min() >= 0.0 and image.max() <= 1.0):
        msg = f"`image` must be uint8, or floats in [0, 1], got {image.dtype} with other values."
        raise ValueError(msg)
    return image


def _batch(tiles: list[Array]) -> Array:
    """``(B, 3, h, w)``, float32 in ``[0, 1]``."""
    stacked = np.stack([tile.transpose(2, 0, 1) for tile in tiles])
    return stacked.astype(np.float32) / np.float32(255.0 if stacked.dtype == np.uint8 else 1.0)


def _prediction(outputs: Mapping[str, Array]) -> Prediction:
    label, mask = outputs.get("pred_label"), outputs.get("pred_mask")
    return Prediction(
        float(outputs["pred_score"].reshape(-1)[0]),
        None if label is None else bool(label.reshape(-1)[0]),
        outputs["anomaly_map"][0],
        None if mask is None else mask[0],
    )


def _load(path: Path, engine: str, options: tuple[str, Mapping[str, Any]]) -> Run:
    """A function that runs a graph; errors are those of ``Inferencer``."""
    if not path.is_file():
        msg = f"There is no {path}."
        raise FileNotFoundError(msg)
    try:
        return _load_openvino(path, *options) if engine == "openvino" else _load_onnxruntime(path)
    except ModuleNotFoundError as error:
        msg = f"{error.name} is not installed: pip install {error.name}"
        raise ModuleNotFoundError(msg, name=error.name) from error
    except Exception as error:  # whatever an engine says of a damaged file
        msg = f"{path} cannot be read by {engine}: {shown(str(error), 300)}"
        raise ValueError(msg) from error


def _load_openvino(path: Path, device: str, config: Mapping[str, Any]) -> Run:
    model = compiled(path, device, config)
    names = [next(iter(sorted(output.get_names()))) for output in model.outputs]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        found = model(dict(inputs))
        return {name: np.asarray(found[place]) for place, name in enumerate(names)}

    return run


def _load_onnxruntime(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run
