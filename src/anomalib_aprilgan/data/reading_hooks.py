"""Lets anomalib's data sets read their images with :func:`~anomalib_aprilgan.data.reading.load_image` during a run.

The data sets and loaders of the run are changed one by one, and changed back when the run ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataset, PredictDataset
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.tv_tensors import Image

from .display import keep_for_display, note_image
from .listing import datasets_in, entries
from .reading import UnreadableImageError, load_image

logger = logging.getLogger(__name__)


class ReadingHooks(Callback):
    """Changes how the data of a run is read, and puts everything back when the run ends, also by an exception.

    A model holds one, calls :meth:`install` in its ``setup`` and returns the object from ``configure_callbacks``.
    Loaders and datamodule are there by ``setup``, and the loaders' workers are not: the start hooks of the loops come
    too late, since Lightning has started the workers before it calls them.
    """

    def __init__(self) -> None:
        self._undo: dict[Trainer, ExitStack] = {}

    def __reduce__(self) -> tuple[type[ReadingHooks], tuple[()]]:
        """A copy has nothing to put back."""
        return type(self), ()

    def install(self, trainer: Trainer, stage: str) -> None:
        """Read all that a trainer is about to load with :func:`load_image`, until its run ends.

        In prediction, broken files are skipped as by :func:`skip_unreadable`. Where results are drawn, small copies of
        the images are kept for the drawings. ``stage`` is what Lightning gives to ``setup``.
        """
        loops: dict[str, tuple[Any, ...]] = {
            "fit": (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop),
            "validate": (trainer.validate_loop,),
            "test": (trainer.test_loop,),
            "predict": (trainer.predict_loop,),
        }
        undo = self._undo.setdefault(trainer, ExitStack())
        for loop in loops[stage]:
            source = loop._data_source.instance  # noqa: SLF001  # the only way to loaders before they are iterated
            undo.enter_context(read_rightly(source))
            if stage == "predict":
                undo.enter_context(skip_unreadable(source))
        if stage in {"test", "predict"}:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            for callback in callbacks:
                max_side = getattr(callback, "max_side", None)
                if isinstance(callback, Visualizer) and max_side is not None:
                    undo.enter_context(keep_for_display(max_side))

    def restore(self, trainer: Trainer) -> None:
        """Put back what :meth:`install` has changed for a trainer."""
        self._undo.pop(trainer, ExitStack()).close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put everything back."""
        del pl_module, stage
        self.restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        del pl_module, exception
        self.restore(trainer)


@contextmanager
def read_rightly(data: object) -> Iterator[None]:
    """Let the data sets in ``data`` read their images with :func:`load_image` for as long as the context lasts.

    Each instance gets a subclass of its class, in which anomalib's own ``__getitem__`` finds ours under the name
    ``read_image``. Data sets whose ``__getitem__`` does not call anomalib's ``read_image`` keep their own reading.
    Masks are read by anomalib, as they are stored: annotation tools draw them on the image as it is shown.

    Args:
        data: A data set, a ``Subset`` or ``ConcatDataset``, a loader that was not iterated yet, an anomalib datamodule
            after its ``setup``, or a list or dictionary of these. Anything else is left alone.
    """
    with ExitStack() as undo:
        for dataset in datasets_in(data):
            cls: Any = type(dataset)
            undo.enter_context(_changed(dataset, _reading_class(cls), {}))
        yield


def reading_copy(dataset: AnomalibDataset) -> AnomalibDataset:
    """A copy that reads its images with :func:`load_image`; the data set itself stays as it is."""
    twin = copy(dataset)
    twin.__class__ = _reading_class(type(dataset))
    return twin


@contextmanager
def skip_unreadable(loaders: object) -> Iterator[None]:
    """Let the loaders of unlabelled folders skip files that cannot be read, with a warning that names each.

    A batch is made of its readable images, and a batch without any is left out; positions in a prediction therefore
    say nothing, ``image_path`` does. Where not one file can be read, that is an error. Loaders of other data than
    anomalib's ``PredictDataset`` are left alone: with labels, a file that is left out would change the metrics.

    Args:
        loaders: A loader, or a list or dictionary of them, not iterated yet; changed for as long as the context lasts.
    """
    with ExitStack() as undo:
        for loader in entries(loaders):
            if type(loader) is DataLoader and isinstance(_whole(loader.dataset), PredictDataset):
                undo.enter_context(read_rightly(loader))
                tolerant = _Tolerant(loader.dataset, loader.collate_fn)
                parts = {"dataset": tolerant, "collate_fn": tolerant.collate_readable, "unreadable": []}
                undo.enter_context(_changed(loader, SkippingLoader, parts))
        yield


def unreadable_files(loaders: object) -> list[Path]:
    """Files that the last pass of these loaders skipped, in the order in which they were met.

    Args:
        loaders: What :func:`skip_unreadable` was given, or ``trainer.predict_dataloaders``.
    """
    return [path for loader in entries(loaders) for path in getattr(loader, "unreadable", [])]


class SkippingLoader(DataLoader[Any]):
    """A loader that leaves out what cannot be read; :func:`skip_unreadable` makes one of a plain loader."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own class of iterators
        """Batches of readable images.

        Raises:
            UnreadableImageError: There was not one.
        """
        self.unreadable: list[Path | None] = []
        errors: list[UnreadableImageError] = []
        is_empty = True
        for batch, unread in super().__iter__():
            for error in unread:
                logger.warning("Skipped: %s", error)
                self.unreadable.append(error.path)
            errors += unread
            if batch is not None:
                is_empty = False
                yield batch
        if is_empty and errors:
            msg = f"None of {len(errors)} files can be read. The first: {errors[0]}"
            raise UnreadableImageError(msg, errors[0].path)


class _Tolerant(Subset[Any]):
    """All items of a data set, with the error in place of one that cannot be read."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:  # noqa: ANN401  # any with a length
        super().__init__(dataset, range(len(dataset)))
        self.collate = collate

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Items of a batch, as torch's loaders ask for them."""
        items: list[Any] = []
        for index in indices:
            try:
                items.append(self.dataset[index])
            except UnreadableImageError as error:
                items.append(error)
        return items

    def collate_readable(self, items: Sequence[Any]) -> tuple[Any, list[UnreadableImageError]]:
        """A batch of what could be read, or ``None``, and the errors of the rest."""
        errors = [item for item in items if isinstance(item, UnreadableImageError)]
        readable = [item for item in items if not isinstance(item, UnreadableImageError)]
        return (self.collate(readable) if readable else None), errors


@contextmanager
def _changed(thing: object, cls: type, attributes: Mapping[str, object]) -> Iterator[None]:
    """Another class and other attributes for an object, for as long as the context lasts."""
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


def _whole(dataset: object) -> object:
    """The data set below subsets."""
    return _whole(dataset.dataset) if isinstance(dataset, Subset) else dataset


@cache
def _reading_class(cls: type) -> type:
    """Subclass that reads as here; ``cls`` itself where that is done already, or where it reads in its own way."""
    method = getattr(cls, "__getitem__", None)
    if not isinstance(method, FunctionType) or "read_image" not in method.__code__.co_names:
        return cls
    if method.__globals__["read_image"] is read_image:
        return cls
    names = {**method.__globals__, "read_image": read_image}
    getitem = FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
    getitem.__kwdefaults__ = method.__kwdefaults__
    # anomalib takes the name of a data set from its class.
    members: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__getitem__": getitem}
    members["__reduce__"] = lambda self: (_restored, (cls,), self.__dict__)
    return type(cls.__name__, (cls,), members)


def _restored(cls: type) -> object:
    """An empty instance of the reading subclass of ``cls``, for pickle: a class made at run time has no address."""
    return object.__new__(_reading_class(cls))


def read_image(path: str | Path, as_tensor: bool = False) -> Tensor | np.ndarray[Any, Any]:
    """Stands in for anomalib's ``read_image``, with its arguments; tells the drawings what was read."""
    image = load_image(path)
    note_image(str(path), image)
    if not as_tensor:
        return image.permute(1, 2, 0).numpy()
    wrapped: Tensor = Image(image)
    return wrapped
