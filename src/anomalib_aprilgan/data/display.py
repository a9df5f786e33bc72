"""Small copies of the images that a run has read, so that drawing its results does not decode them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import get_worker_info
from torchvision.transforms.v2.functional import to_dtype

from .reading import load_image

# Bounds of what is kept: enough for a batch of 32 at 1024 x 1024 pixels.
MAX_IMAGES = 64
MAX_BYTES = 2**27

_LOCK = Lock()
_KEPT: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
_SIDES: list[int] = []  # of the runs that draw


def display_image(path: str, max_side: int) -> Tensor:
    """The image of a file at the size of a drawing, from what the current run has read, or else from the file.

    Args:
        path: The file, named as in ``image_path`` of a batch.
        max_side: Longest side in pixels; a larger image is made smaller, with antialias.

    Returns:
        ``(3, h, w)``, uint8, on the CPU.

    Raises:
        UnreadableImageError: The file cannot be read.
    """
    with _LOCK:
        kept = _KEPT.get((path, max_side))
    return _small(load_image(path), max_side) if kept is None else kept


@contextmanager
def keep_for_display(max_side: int) -> Iterator[None]:
    """Keep small copies of the images that :func:`note_image` is told of, for as long as the context lasts."""
    _SIDES.append(max_side)
    try:
        yield
    finally:
        with _LOCK:
            _SIDES.remove(max_side)
            if not _SIDES:
                _KEPT.clear()


def note_image(path: str, image: Tensor) -> None:
    """Keep a small copy of an image ``(3, H, W)`` in ``[0, 1]`` for a run that draws; the oldest make room.

    Worker processes of loaders keep nothing: the drawing happens in another process.
    """
    if not _SIDES or get_worker_info() is not None:
        return
    for max_side in set(_SIDES):
        small = _small(image, max_side)
        with _LOCK:
            _KEPT[path, max_side] = small
            _KEPT.move_to_end((path, max_side))
            while len(_KEPT) > MAX_IMAGES or sum(kept.nbytes for kept in _KEPT.values()) > MAX_BYTES:
                _KEPT.popitem(last=False)


def _small(image: Tensor, max_side: int) -> Tensor:
    height, width = image.shape[-2:]
    scale = max_side / max(height, width)
    if scale < 1.0:
        size = max(1, round(height * scale)), max(1, round(width * scale))
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    eight_bit: Tensor = to_dtype(image.clamp(0.0, 1.0), torch.uint8, scale=True)
    return eight_bit
