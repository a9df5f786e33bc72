"""Labels, scores, masks and maps as the metrics take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.floating[Any]]
Arrays = NDArray[Any] | Sequence[NDArray[Any]]


def checked_images(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Values]:
    """Labels and scores as arrays; a ValueError where shapes differ or a value cannot be."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    for name, given in (("labels", labels), ("scores", scores)):
        if given.ndim != 1 or len(given) != len(labels):
            msg = f"`{name}` must have one value for each of the N images, got {_shapes(labels=labels, scores=scores)}."
            raise ValueError(msg)
    _check_binary("labels", labels, "pass 1 for an anomalous image and 0 for a normal one")
    _check_finite("scores", scores, "leave such images out or repair their scores")
    return labels.astype(bool), scores


def checked_pixels(masks: Arrays, maps: Arrays, images: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Masks and maps as arrays, one for each image.

    Raises:
        ValueError: Shapes differ, a mask is not binary, or a map is not finite.
    """
    pixels: dict[str, Any] = {
        name: given if isinstance(given, list | tuple) else np.asarray(given)
        for name, given in (("masks", masks), ("maps", maps))
    }
    for name, given in pixels.items():
        if len(given) != images or any(np.ndim(one) != 2 or 0 in np.shape(one) for one in given):
            got = f"shape {given.shape}" if isinstance(given, np.ndarray) else f"shapes {[*map(np.shape, given)]}"
            msg = f"`{name}` must be (N, H, W) for the N = {images} labels, got {got}: drop other axes."
            raise ValueError(msg)
    are_arrays = all(isinstance(given, np.ndarray) for given in pixels.values())
    for index, (mask, anomaly_map) in enumerate(zip(*pixels.values(), strict=True)):  # of a memory map, one at a time
        if mask.shape != anomaly_map.shape:
            got = _shapes(**pixels) if are_arrays else _shapes(masks=mask, maps=anomaly_map)
            msg = f"`masks` must have the shape of `maps`, got {got}: resize one of them."
            raise ValueError(msg)
        _check_binary("masks", mask, f"in image {index}, divide by 255 or compare with a threshold")
        with np.errstate(over="ignore"):  # doubles beyond single precision become infinite and are found so
            _check_finite("maps", anomaly_map.astype(np.float32, copy=False), f"look at image {index}")
    return pixels["masks"], pixels["maps"]


def _check_binary(name: str, given: NDArray[Any], remedy: str) -> None:
    if given.dtype != np.bool_:
        wrong = given[(given != 0) & (given != 1)]
        if wrong.size:
            msg = f"`{name}` must hold 0 and 1 alone, got {wrong.flat[0]}: {remedy}."
            raise ValueError(msg)


def _check_finite(name: str, given: Values, remedy: str) -> None:
    for extreme in (given.min(), given.max()) if given.size else ():  # both are NaN if any value is
        if not np.isfinite(extreme):
            msg = f"`{name}` must be finite numbers, got {extreme}: {remedy}."
            raise ValueError(msg)


def _shapes(**arrays: NDArray[Any]) -> str:
    return " and ".join(f"`{name}` {array.shape}" for name, array in arrays.items())
