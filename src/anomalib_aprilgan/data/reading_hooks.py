"""Lets anomalib's data sets read their images with ``anomalib_aprilgan.data.reading.load_image`` during a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule, PredictDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import Resize

from ..files import is_drawing
from .data_sets import changed, read_rightly
from .listing import datasets_in, entries
from .reading import UnreadableImageError, keep_for_display

logger = logging.getLogger(__name__)


class ReadingHooks(Callback):
    """Changes how the data of a run is read, and puts everything back when the run ends, also by an exception.

    A model calls ``install`` in its ``setup``, because workers of loaders start before the loops' hooks are called,
    and returns this object from ``configure_callbacks``. Its callbacks, too, leave the trainer when the run ends:
    Lightning would run them with the next model.
    """

    def __init__(self) -> None:
        self._undo: dict[Trainer, ExitStack] = {}

    def __reduce__(self) -> tuple[type[ReadingHooks], tuple[()]]:
        """A copy has nothing to put back."""
        return type(self), ()

    def install(self, trainer: Trainer, stage: str, own: Collection[object] = ()) -> None:
        """Read all of a trainer's ``stage``, as ``setup`` gets it, with ``load_image``, until its run ends.

        Predictions skip broken files as ``skip_unreadable`` does; runs that draw keep small copies of the images.
        ``own`` are the callbacks that the model has brought.
        """
        undo = self._undo.setdefault(trainer, ExitStack())
        undo.callback(_remove_callbacks, trainer, [*own, self])
        undo.enter_context(_each_image_once(trainer))
        pre_processor = getattr(trainer.lightning_module, "pre_processor", None)
        tiled = getattr(pre_processor, "tiled", False)
        resize = next(iter(extract_transforms_by_type(getattr(pre_processor, "transform", None), Resize)), None)
        loops = [
            getattr(trainer, f"{TrainerFn(stage).value}_loop"),
            *([trainer.fit_loop.epoch_loop.val_loop] if stage == "fit" else []),
        ]
        for loop in loops:
            source = loop._data_source.instance  # noqa: SLF001  # the only way to loaders before they are iterated
            if isinstance(source, AnomalibDataModule) and not hasattr(source, "val_data"):
                # `val_split_mode: none`; the Engine validates all the same, with nothing.
                undo.enter_context(changed(source, type(source), {"val_dataloader": _no_loaders}))
            undo.enter_context(read_rightly(source, None if stage == "fit" else resize, of_one_size=tiled))
            if stage == "predict":
                undo.enter_context(leave_out_drawings(source))
                undo.enter_context(skip_unreadable(source))
        if stage in {"test", "predict"}:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
                if isinstance(callback, Visualizer) and hasattr(callback, "max_side"):
                    undo.enter_context(keep_for_display(callback.max_side))

    def at_end(self, trainer: Trainer, call: Callable[[], object]) -> None:
        """Have something called when the run of a trainer ends, also by an exception."""
        self._undo.setdefault(trainer, ExitStack()).callback(call)

    def restore(self, trainer: Trainer) -> None:
        """Put back what ``install`` has changed for a trainer."""
        self._undo.pop(trainer, ExitStack()).close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name once more the files that could not be read."""
        del pl_module
        skipped = unreadable_files(trainer.predict_dataloaders)
        if skipped:
            names = ", ".join(path.name for path in skipped)
            warnings.warn(f"{len(skipped)} files could not be read and have no prediction: {names}.", stacklevel=2)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put everything back."""
        del pl_module, stage
        self.restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        del pl_module, exception
        self.restore(trainer)


def _no_loaders() -> list[object]:
    return []


def _remove_callbacks(trainer: Trainer, own: Collection[object]) -> None:
    ids, attributes = {id(callback) for callback in own}, vars(trainer)
    # A new list: Lightning may be going through the old one.
    attributes["callbacks"] = [callback for callback in attributes["callbacks"] if id(callback) not in ids]


@contextmanager
def _each_image_once(trainer: Trainer) -> Iterator[None]:
    """Let several processes share the images of validations and tests without repeats, as Lightning shares predictions.

    Its sampler for tests repeats images until every process has as many, and they would count twice.
    """
    connector = trainer._data_connector  # noqa: SLF001  # the only way to the samplers that Lightning adds
    resolve, evaluating = connector._resolve_sampler, {RunningStage.VALIDATING, RunningStage.TESTING}  # noqa: SLF001

    def once(loader: DataLoader[Any], shuffle: bool, mode: RunningStage | None = None) -> object:
        return resolve(loader, shuffle, RunningStage.PREDICTING if mode in evaluating else mode)

    vars(connector)["_resolve_sampler"] = once
    try:
        yield
    finally:
        del vars(connector)["_resolve_sampler"]


@contextmanager
def leave_out_drawings(loaders: object) -> Iterator[None]:
    """Let anomalib's ``PredictDataset``s of a folder leave out drawings of earlier results, while the context lasts.

    A ValueError where a folder holds nothing else. A drawing that is asked for by its own path stays.
    """
    with ExitStack() as undo:
        for dataset in datasets_in(loaders):
            if isinstance(dataset, PredictDataset) and len(files := dataset.image_filenames) > 1:
                kept = [file for file in files if not is_drawing(file)]
                if not kept:
                    msg = f"`data` holds only drawings of earlier results, such as {files[0]}. Give a folder of images."
                    raise ValueError(msg)
                if len(kept) < len(files):
                    logger.info("Left out %s drawings of earlier results.", len(files) - len(kept))
                    undo.enter_context(changed(dataset, type(dataset), {"image_filenames": kept}))
        yield


@contextmanager
def skip_unreadable(loaders: object) -> Iterator[None]:
    """Let loaders, not iterated yet, skip files that cannot be read, for as long as the context lasts.

    A batch without any readable image is left out; positions in a prediction therefore say nothing. Loaders of other
    data than anomalib's ``PredictDataset`` are left alone: a labelled file that is left out would change the metrics.
    """
    with ExitStack() as undo:
        for loader in entries(loaders):
            if type(loader) is DataLoader and isinstance(_whole(loader.dataset), PredictDataset):
                undo.enter_context(read_rightly(loader))
                tolerant = _Tolerant(loader.dataset, loader.collate_fn)
                parts = {"dataset": tolerant, "collate_fn": tolerant.collate_readable, "unreadable": []}
                undo.enter_context(changed(loader, SkippingLoader, parts))
        yield


def unreadable_files(loaders: object) -> list[Path]:
    """Files that the last pass of loaders, such as ``trainer.predict_dataloaders``, skipped, as they were met."""
    return [error.path for loader in entries(loaders) for error in getattr(loader, "unreadable", [])]


class SkippingLoader(DataLoader[Any]):
    """A loader that leaves out what cannot be read; ``skip_unreadable`` makes one of a plain loader."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises its own class of iterators
        """Batches of readable images; an UnreadableImageError where there is not one."""
        self.unreadable: list[UnreadableImageError] = []
        is_empty = True
        for batch, errors in super().__iter__():
            for error in errors:
                logger.warning("Skipped: %s", error)
            self.unreadable += errors
            if batch is not None:
                is_empty = False
                yield batch
        if is_empty and self.unreadable:
            first = self.unreadable[0]
            msg = f"None of {len(self.unreadable)} files can be read. The first: {first}"
            raise UnreadableImageError(msg, first.path)


class _Tolerant(Subset[Any]):
    """All items of a data set, with the error in place of one that cannot be read."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:  # noqa: ANN401  # any with a length
        super().__init__(dataset, range(len(dataset)))
        self.collate = collate

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The items of a batch, or their errors."""
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


def _whole(dataset: object) -> object:
    return _whole(dataset.dataset) if isinstance(dataset, Subset) else dataset
