"""Pictures as they come: any bit depth, palette, transparency and orientation; and what to do with broken files.

anomalib reads a picture with ``Image.open(path).convert("RGB")``: 16-bit pictures come out white, turned ones lie on
their side, and one broken file ends a prediction. Here the same pictures are read as a viewer shows them, and the data
sets that a trainer is about to use are told, one by one, to read them so. Nobody else's data sets change.
"""

from __future__ import annotations

import logging
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, PredictDataset
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2.functional import to_dtype, to_image
from torchvision.tv_tensors import Image as TensorImage

logger = logging.getLogger(__name__)

MAX_PIXELS = 2**29  # 23170 x 23170, 6.4 GB as float32; Pillow stops at a third of it, line-scan pictures do not
_FULL_16_BIT = 65535
_FULL_12_BIT = 4095
_PHOTOMETRIC, _MIN_IS_WHITE = 262, 0  # a tag of TIFF, which Pillow heeds in 8-bit pictures alone
# What Pillow's readers raise on broken files.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
_LIFTING = Lock()


class UnreadableImageError(ValueError):
    """A file that cannot be read as a picture; the text names it, the reason and the remedy.

    Args:
        message: The text.
        path: The file; ``None`` where a worker process of a loader has reported it in words alone.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path

    @classmethod
    def of(cls, path: Path, reason: str) -> UnreadableImageError:
        """The error for one file and its reason."""
        remedy = "Replace or remove it, or save it as PNG, JPEG or TIFF with 8 or 16 bits"
        return cls(f"{path} cannot be read as an image ({reason}). {remedy}.", path)


def read_picture(path: str | os.PathLike[str]) -> Tensor:
    """A picture as a viewer shows it, ``(3, H, W)``, float32 in ``[0, 1]``.

    - 8-bit and 1-bit gray, RGB, palette, CMYK: as Pillow converts them; colour profiles are not applied.
    - 16-bit gray: divided by 65535. A picture saved with 16 bits (``257 * v``) has the values of the 8-bit one. Cameras
      that store 10 or 12 bits without scaling give nearly black pictures; that is warned of.
    - 16 bits a channel: the upper 8 bits of each, which is what Pillow reads and what CLIP is fed.
    - 32-bit integers: read as 16-bit ones; a value out of ``[0, 65535]`` is an error.
    - Float: must lie in ``[0, 1]``; a range is never guessed, or two pictures of one camera would differ in scale.
    - Transparency: laid on black, in proportion to the opacity, so that colours under transparent pixels do not count.
      An opaque picture equals the one without alpha.
    - EXIF orientation: applied; ``H`` and ``W`` are those of the turned picture.
    - Several pages: the first.

    Args:
        path: The file, of at most ``MAX_PIXELS`` pixels. For a picture past Pillow's own, lower limit, that limit is
            lifted while the picture is read, and put back.

    Raises:
        UnreadableImageError: The file is missing, broken, too large, or no picture.
    """
    path = Path(path)
    try:
        try:
            return _read(path)
        except Image.DecompressionBombError:
            with _without_limit():
                return _read(path)
    except UnidentifiedImageError as error:
        raise UnreadableImageError.of(path, "no format and pixel type that Pillow knows") from error
    except _BROKEN as error:
        raise UnreadableImageError.of(path, getattr(error, "strerror", None) or str(error)) from error


@contextmanager
def _without_limit() -> Iterator[None]:
    """Pillow's limit is a global: it is lifted for the one picture that is larger, and put back."""
    with _LIFTING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            msg = f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels; cut it into pieces"
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
                f"A 16-bit picture has no value above {_FULL_12_BIT} of {_FULL_16_BIT} and is nearly black. If the "
                "camera gives 10 or 12 bits, scale its pictures to the full 16 bits.",
                stacklevel=3,
            )
        return _gray(values, _FULL_16_BIT, "integer values must lie in [0, 65535]")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, (0, 0, 0, 255))
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    # anomalib's own conversion, so that plain pictures keep their values to the last bit.
    picture = to_dtype(to_image(image.convert("RGB")), torch.float32, scale=True)
    return cast("Tensor", picture.as_subclass(Tensor))


def _gray(values: np.ndarray[Any, Any], full: float, rule: str) -> Tensor:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= full):  # also where one is not a number
        msg = f"{rule}, these lie in [{low:g}, {high:g}]"
        raise ValueError(msg)
    return torch.from_numpy(values.astype(np.float32) / np.float32(full)).repeat(3, 1, 1)


# -- anomalib's data sets -----------------------------------------------------------------------------------------


def read_rightly(data: object) -> None:
    """Let the data sets in ``data`` read their pictures with :func:`read_picture`, in place.

    Each instance gets a subclass of its class, in which anomalib's own ``__getitem__`` finds ours under the name
    ``read_image``; anomalib itself and other instances stay as they are. To be called before a loader is iterated, as
    its workers hold copies. Once or many times is the same. Data sets whose ``__getitem__`` does not call anomalib's
    ``read_image`` keep their own reading.

    Masks are read by anomalib, as they are stored: a mask belongs to the picture as it is shown, after its orientation
    was applied, which is how annotation tools draw them.

    Args:
        data: A data set, a ``Subset`` or ``ConcatDataset``, a loader, an anomalib datamodule after its ``setup``, or a
            list or dictionary of these. Anything else is left alone.
    """
    for dataset in _datasets(data):
        dataset.__class__ = _reading_class(dataset.__class__)


def skip_unreadable(loaders: object) -> None:
    """Let the loaders of unlabelled folders skip files that cannot be read, in place, with a warning that names each.

    A batch is made of its readable pictures, and a batch without any is left out; positions in a prediction therefore
    say nothing, ``image_path`` does. Where not one file can be read, that is an error. :func:`unreadable_files` lists
    what was skipped. Loaders of other data than anomalib's ``PredictDataset`` are left alone: with labels, a file that
    is left out would change the metrics.

    Args:
        loaders: A loader, or a list or dictionary of them, not iterated yet.
    """
    for loader in _entries(loaders):
        if type(loader) is DataLoader and isinstance(_whole(loader.dataset), PredictDataset):
            read_rightly(loader)
            loader.collate_fn = _CollateReadable(loader.collate_fn)
            loader.__class__ = SkippingLoader


def unreadable_files(loaders: object) -> list[Path]:
    """Files that the last pass of these loaders skipped, in the order in which they were met.

    Args:
        loaders: What :func:`skip_unreadable` was given, or ``trainer.predict_dataloaders`` after a prediction.
    """
    return [path for dataset in _datasets(loaders) for path in getattr(dataset, "unreadable", [])]


def read_data_of(trainer: Trainer, stage: str) -> None:
    """Let everything that a trainer is about to load be read by :func:`read_picture`.

    To be called in ``setup`` of a module: loaders and datamodule are there by then, and workers are not. The start
    hooks of the loops come too late, since Lightning has started the workers before it calls them. In prediction,
    broken files of unlabelled folders are skipped as by :func:`skip_unreadable`.

    Args:
        trainer: Lightning's trainer.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
    """
    loops: dict[str, tuple[Any, ...]] = {
        "fit": (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop),
        "validate": (trainer.validate_loop,),
        "test": (trainer.test_loop,),
        "predict": (trainer.predict_loop,),
    }
    for loop in loops[stage]:
        source = loop._data_source.instance  # noqa: SLF001  # there is no public way to loaders before they are iterated
        read_rightly(source)
        if stage == "predict":
            skip_unreadable(source)


class SkippingLoader(DataLoader[Any]):
    """A loader that leaves out what cannot be read; see :func:`skip_unreadable`, which makes one of a plain loader."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own class of iterators
        """Batches of readable pictures.

        Raises:
            UnreadableImageError: There was not one.
        """
        dataset = _whole(self.dataset)
        dataset.unreadable = []
        dataset.collects_errors = True  # while this runs; another loader of the same data set gets the error
        errors: list[UnreadableImageError] = []
        is_empty = True
        try:
            for batch, unread in super().__iter__():
                for error in unread:
                    logger.warning("Skipped: %s", error)
                    dataset.unreadable.append(error.path)
                errors += unread
                if batch is not None:
                    is_empty = False
                    yield batch
        finally:
            dataset.collects_errors = False
        if is_empty and errors:
            msg = f"None of {len(errors)} files can be read. The first: {errors[0]}"
            raise UnreadableImageError(msg, errors[0].path)


class _CollateReadable:
    """A batch of what could be read, or ``None``, and the errors of the rest."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> tuple[Any, list[UnreadableImageError]]:
        errors = [item for item in items if isinstance(item, UnreadableImageError)]
        readable = [item for item in items if not isinstance(item, UnreadableImageError)]
        return (self.collate(readable) if readable else None), errors


def _whole(dataset: object) -> Any:  # noqa: ANN401  # PredictDataset with our attributes
    """The data set below subsets."""
    return _whole(dataset.dataset) if isinstance(dataset, Subset) else dataset


def _entries(data: object) -> Iterator[object]:
    """What collections of any depth hold."""
    if isinstance(data, CombinedLoader):
        data = data.flattened
    elif isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        for entry in data:
            yield from _entries(entry)
    else:
        yield data


def _datasets(data: object) -> Iterator[Any]:
    """Data sets at the bottom of loaders, subsets, concatenations and datamodules."""
    for entry in _entries(data):
        if isinstance(entry, (DataLoader, Subset)):
            yield from _datasets(entry.dataset)
        elif isinstance(entry, AnomalibDataModule):
            yield from _datasets([getattr(entry, name, None) for name in ("train_data", "val_data", "test_data")])
        elif isinstance(parts := getattr(entry, "datasets", None), list):  # ConcatDataset, and ours of many categories
            yield from _datasets(parts)
        elif isinstance(entry, Dataset):
            yield entry


@cache
def _reading_class(cls: Any) -> Any:  # noqa: ANN401  # classes of any data sets
    """Subclass that reads as here; ``cls`` itself where that is done already, or where it reads in its own way."""
    method = getattr(cls, "__getitem__", None)
    if not isinstance(method, FunctionType) or "read_image" not in method.__code__.co_names:
        return cls
    if method.__globals__["read_image"] is _read_image:
        return cls
    names = {**method.__globals__, "read_image": _read_image}
    getitem = FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
    getitem.__kwdefaults__ = method.__kwdefaults__
    # anomalib takes the name of a data set from its class.
    members: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__getitem__": getitem}
    members["__reduce__"] = lambda self: (_restored, (cls,), self.__dict__)
    if issubclass(cls, PredictDataset):
        members["__getitems__"] = _get_items
    return type(cls.__name__, (cls,), members)


def _restored(cls: type) -> object:
    """An empty instance of the reading subclass of ``cls``, for pickle: a class made at run time has no address."""
    return object.__new__(_reading_class(cls))


def _get_items(dataset: Any, indices: Sequence[int]) -> list[Any]:  # noqa: ANN401  # PredictDataset with our attributes
    """Items of a batch, as torch's loaders ask for them; an error in place of an item where these are collected."""
    if not getattr(dataset, "collects_errors", False):
        return [dataset[index] for index in indices]
    items: list[Any] = []
    for index in indices:
        try:
            items.append(dataset[index])
        except UnreadableImageError as error:
            items.append(error)
    return items


def _read_image(path: str | Path, as_tensor: bool = False) -> Tensor | np.ndarray[Any, Any]:
    """What stands in for anomalib's ``read_image``, with its signature."""
    picture = read_picture(path)
    return cast("Tensor", TensorImage(picture)) if as_tensor else picture.permute(1, 2, 0).numpy()
