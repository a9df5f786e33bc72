"""anomalib's data sets, which read, resize and collate their images as here for as long as a run lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import anomalib.data.utils
import numpy as np
from anomalib.data import AnomalibDataset, ImageItem
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Image

from .listing import datasets_in, entries, listed_files
from .pre_processing import fitting_mask
from .reading import BROKEN, UnreadableImageError, load_image, note_image, raise_if_out_of_memory

T = TypeVar("T")


@contextmanager
def read_rightly(data: object, resize: Transform | None = None, *, of_one_size: bool = False) -> Iterator[None]:
    """Let the data sets in ``data`` read their images with ``load_image`` for as long as the context lasts.

    Each instance gets a subclass of its class, in which anomalib's own ``__getitem__`` finds ours under the names
    ``read_image`` and ``read_mask``; data sets that read in another way go on so. Masks are read by anomalib, as they
    are stored: annotation tools draw them on the image as it is shown. Loaders must not be iterated yet, datamodules be
    set up.

    Args:
        data: Loaders, data sets or datamodules, in collections of any depth.
        resize: What brings every image to the model's size before a batch is made of them: anomalib resizes images of
            different sizes to the largest of the batch, so that scores would depend on the neighbours.
        of_one_size: Whether batches of different sizes are an error instead, for a model that wants images as they are.
    """
    with ExitStack() as undo:
        for dataset in datasets_in(data):
            cls: Any = type(dataset)
            if "finish" not in vars(dataset):  # not for a run already
                ours = {"finish": partial(_finished, resize=resize), "of_one_size": of_one_size}
                undo.enter_context(changed(dataset, _reading_class(cls), ours))
        for loader in entries(data):
            if of_one_size and isinstance(loader, DataLoader):
                checked = {"collate_fn": partial(_collate_one_size, loader.collate_fn)}
                undo.enter_context(changed(loader, type(loader), checked))
        yield


def reading_copy(dataset: AnomalibDataset) -> AnomalibDataset:
    """A copy that reads its images with ``load_image``."""
    twin = copy(dataset)
    twin.__class__ = _reading_class(type(dataset))
    return twin


@contextmanager
def changed(thing: object, cls: type, attributes: Mapping[str, object]) -> Iterator[None]:
    """Give a thing another class and other attributes for as long as the context lasts."""
    before, values = type(thing), vars(thing)
    replaced = {name: values[name] for name in attributes if name in values}
    thing.__class__ = cls
    values.update(attributes)  # past DataLoader's own check
    try:
        yield
    finally:
        thing.__class__ = before
        for name in attributes:
            del values[name]
        values.update(replaced)


@cache
def _reading_class(cls: type) -> type:
    """Subclass that reads as here; ``cls`` itself where that is done already, or where it reads in its own way."""
    method = getattr(cls, "__getitem__", None)
    if not isinstance(method, FunctionType) or "read_image" not in method.__code__.co_names:
        return cls
    names = {**method.__globals__, "read_image": read_image, "read_mask": read_mask}
    read = FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
    read.__kwdefaults__ = method.__kwdefaults__
    inherited: Any = getattr(cls, "collate_fn", None)

    def getitem(self: object, index: int) -> object:
        try:
            return vars(self).get("finish", _finished)(read(self, index))
        except (MemoryError, RuntimeError) as error:
            raise_if_out_of_memory(error, Path(listed_files(self)[index]))
            raise

    def collate_fn(self: object) -> Callable[..., Any]:
        collate: Callable[..., Any] = inherited.__get__(self)
        return partial(_collate_one_size, collate) if vars(self).get("of_one_size") else collate

    # anomalib takes the name of a data set from its class.
    members: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__getitem__": getitem}
    members |= {"collate_fn": property(collate_fn), "__reduce__": lambda self: (_restored, (cls,), self.__dict__)}
    return type(cls.__name__, (cls,), members)


def _restored(cls: type) -> object:
    """An empty instance of the reading subclass of ``cls``, for pickle: a class made at run time has no address."""
    return object.__new__(_reading_class(cls))


def read_image(path: str | Path, as_tensor: bool = False) -> Tensor | np.ndarray[Any, Any]:
    """Stands in for anomalib's ``read_image``, with its arguments; tells the drawings what was read."""
    image = load_image(path)
    note_image(str(path), image)
    read: Tensor | np.ndarray[Any, Any] = Image(image) if as_tensor else image.permute(1, 2, 0).numpy()
    return read


def read_mask(path: str | Path, as_tensor: bool = False) -> Tensor | np.ndarray[Any, Any]:
    """Stands in for anomalib's ``read_mask``, with its arguments; the error for a damaged file names it."""
    try:
        mask: Tensor | np.ndarray[Any, Any] = anomalib.data.utils.read_mask(path, as_tensor)
    except BROKEN as error:
        raise UnreadableImageError.of(Path(path), f"as the mask of a defect: {error}") from error
    return mask


def _finished(item: ImageItem, resize: Transform | None = None) -> ImageItem:
    """An item whose mask has the size of its image, both resized."""
    image: Any = item.image
    mask = None if item.gt_mask is None else fitting_mask(item.gt_mask, image)
    if resize is not None:
        image, mask = resize(image), None if mask is None else resize(mask)
    item.image, item.gt_mask = image, mask
    return item


def _collate_one_size(collate: Callable[[Any], T], items: Sequence[ImageItem]) -> T:
    sizes = {tuple(item.image.shape[-2:]) for item in items if item.image is not None}
    if len(sizes) > 1:
        msg = (
            "`eval_batch_size` must be 1 for images of different sizes that are inspected in tiles, at their own size; "
            f"this batch has {', '.join(f'{height} x {width}' for height, width in sorted(sizes))} pixels."
        )
        raise ValueError(msg)
    return collate(items)
