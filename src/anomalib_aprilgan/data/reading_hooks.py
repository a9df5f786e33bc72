"""Let anomalib's data sets read pictures as :mod:`~anomalib_aprilgan.data.reading` does, and skip what cannot be read.

The data sets that a trainer is about to use are told, one by one. Nobody else's data sets change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import numpy as np
from anomalib.data import AnomalibDataModule, PredictDataset
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.tv_tensors import Image

from .reading import UnreadableImageError, read_picture

logger = logging.getLogger(__name__)


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
    return cast("Tensor", Image(picture)) if as_tensor else picture.permute(1, 2, 0).numpy()
