"""Images as a viewer shows them, whatever their pixel type, and small copies of those that a run has read."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision.transforms.v2.functional import to_dtype

# Images of more pixels are not decoded, unless the variable says another number. To read and resize one of so many
# takes 6 GB, 19 bytes a pixel. Pillow stops at less, which line-scan images exceed.
MAX_PIXELS = 300_000_000  # 17320 x 17320
MAX_PIXELS_VARIABLE = "ANOMALIB_APRILGAN_MAX_PIXELS"
_FULL_16_BIT = 65535
_FULL_12_BIT = 4095
_PHOTOMETRIC, _MIN_IS_WHITE = 262, 0  # a tag of TIFF, which Pillow heeds in 8-bit images alone
# What Pillow's readers raise on broken files.
BROKEN = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
    struct.error, zlib.error,
)  # fmt: skip
# Bounds of the copies for drawings: enough for a batch of 32 at 1024 x 1024 pixels.
MAX_IMAGES, MAX_BYTES = 64, 2**27

_LIFTING, _KEEPING = Lock(), Lock()
_KEPT: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
_SIDES: list[int] = []  # of the runs that draw


class UnreadableImageError(ValueError):
    """A file cannot be read as an image; ``path`` is ``None`` where a loader's worker has told it in words alone."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path

    @classmethod
    def of(cls, path: Path, reason: str) -> UnreadableImageError:
        """The error that names the file, the reason and the remedy."""
        remedy = "Replace or remove it, or save it as PNG, JPEG or TIFF with 8 or 16 bits"
        return cls(f"{path} cannot be read as an image ({reason}). {remedy}.", path)


def load_image(path: str | os.PathLike[str]) -> Tensor:
    """An image as a viewer shows it, ``(3, H, W)``, float32 in ``[0, 1]``; anomalib's reader makes 16-bit images white.

    - 8-bit and 1-bit gray, RGB, palette, CMYK: as Pillow converts them; colour profiles are not applied.
    - 16-bit gray: divided by 65535. An image saved with 16 bits (``257 * v``) has the values of the 8-bit one. Cameras
      that store 10 or 12 bits without scaling give nearly black images; a warning says so.
    - 16 bits a channel: the upper 8 bits of each, which is what Pillow reads and what CLIP is fed.
    - 32-bit integers: read as 16-bit ones; a value out of ``[0, 65535]`` is an error.
    - Float: must lie in ``[0, 1]``; a range is never guessed, or two images of one camera would differ in scale.
    - Transparency: laid on black, in proportion to the opacity, so that colours under transparent pixels do not count.
    - EXIF orientation: applied; ``H`` and ``W`` are those of the turned image.
    - Several pages: the first.

    A file that is missing, broken, no image, of more than ``MAX_PIXELS`` pixels, or too large for the memory is an
    UnreadableImageError. The environment variable ``ANOMALIB_APRILGAN_MAX_PIXELS`` sets another number of pixels.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UnreadableImageError.of(path, "no regular file")  # a pipe would be waited for
    most = max_pixels()
    try:
        try:
            return _read(path, most)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            with _without_limit():
                return _read(path, most)
    except UnidentifiedImageError as error:
        raise UnreadableImageError.of(path, "no format and pixel type that Pillow knows") from error
    except BROKEN as error:
        raise UnreadableImageError.of(path, getattr(error, "strerror", None) or str(error)) from error
    except (MemoryError, RuntimeError) as error:
        raise_if_out_of_memory(error, path)
        raise


def raise_if_out_of_memory(error: BaseException, path: Path) -> None:
    """Raise an UnreadableImageError for a file that is too large for the memory; torch's error is a RuntimeError."""
    if isinstance(error, MemoryError) or "memory" in str(error):
        raise UnreadableImageError.of(path, "there is not enough memory for it; cut it into pieces") from error


def max_pixels() -> int:
    """Most pixels of an image; a ValueError where the environment says no number from 1 up."""
    given = os.environ.get(MAX_PIXELS_VARIABLE)
    if given is None:
        return MAX_PIXELS
    if not given.isdecimal() or int(given) < 1:
        msg = f"`{MAX_PIXELS_VARIABLE}` must be a number of pixels from 1 up, such as {MAX_PIXELS}, got {given!r}."
        raise ValueError(msg)
    return int(given)


@contextmanager
def _without_limit() -> Iterator[None]:
    with _LIFTING:  # Pillow's own limit is lower, and a global
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _read(path: Path, most: int) -> Tensor:
    with Image.open(path) as image:
        if image.width * image.height > most:
            msg = (
                f"{image.width} x {image.height} is more than {most} pixels; cut it into pieces, or set "
                f"{MAX_PIXELS_VARIABLE}"
            )
            raise ValueError(msg)
        ImageOps.exif_transpose(image, in_place=True)
        return _to_tensor(image)


def _to_tensor(image: Image.Image) -> Tensor:
    if image.mode == "F":
        return _gray(np.asarray(image), 1.0, "float values must lie in [0, 1]")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _MIN_IS_WHITE:
            values = _FULL_16_BIT - values
        if 0 < values.max() <= _FULL_12_BIT:
            warnings.warn(
                f"A 16-bit image has no value above {_FULL_12_BIT} of {_FULL_16_BIT} and is nearly black. If the "
                "camera gives 10 or 12 bits, scale its images to the full 16 bits.",
                stacklevel=3,
            )
        return _gray(values, _FULL_16_BIT, "integer values must lie in [0, 65535]")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    pixels = torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))
    loaded = torch.empty(3, *pixels.shape[:2])
    for channel, plane in enumerate(loaded):  # no second copy as floats
        plane.copy_(pixels[..., channel]).mul_(1.0 / 255.0)
    return loaded


def _gray(values: np.ndarray[Any, Any], full: float, rule: str) -> Tensor:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= full):  # also where one is not a number
        msg = f"{rule}, these lie in [{low:g}, {high:g}]"
        raise ValueError(msg)
    return torch.from_numpy(values.astype(np.float32) / np.float32(full)).repeat(3, 1, 1)


def display_image(path: str, max_side: int) -> Tensor:
    """The image ``(3, h, w)``, uint8, of a path in a batch, at most ``max_side`` wide and high, with antialias."""
    kept = _KEPT.get((path, max_side))
    return _small(load_image(path), max_side) if kept is None else kept


@contextmanager
def keep_for_display(max_side: int) -> Iterator[None]:
    """Keep small copies of the images that ``note_image`` is told of, for as long as the context lasts."""
    _SIDES.append(max_side)
    try:
        yield
    finally:
        with _KEEPING:
            _SIDES.remove(max_side)
            if not _SIDES:
                _KEPT.clear()


def note_image(path: str, image: Tensor) -> None:
    """Keep a small copy of an image ``(3, H, W)`` in ``[0, 1]`` for a run that draws; the oldest make room."""
    if get_worker_info() is not None:  # the drawing happens in another process
        return
    for max_side in set(_SIDES):
        small = _small(image, max_side)
        with _KEEPING:
            _KEPT[path, max_side] = small
            _KEPT.move_to_end((path, max_side))
            while len(_KEPT) > MAX_IMAGES or sum(kept.nbytes for kept in _KEPT.values()) > MAX_BYTES:
                _KEPT.popitem(last=False)


def _small(image: Tensor, max_side: int) -> Tensor:
    scale = max_side / max(image.shape[-2:])
    if scale < 1.0:
        size = [max(1, round(side * scale)) for side in image.shape[-2:]]
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    eight_bit: Tensor = to_dtype(image.clamp(0.0, 1.0), torch.uint8, scale=True)
    return eight_bit
