"""The results of a run as a table."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ..files import write_atomically
from ..data.listing import listed_files
from ..data.reading_hooks import unreadable_files

FILE_NAME = "decisions.csv"
_WORDS = {True: "anomalous", False: "good", None: ""}
_UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Row:
    """One image: its file, class, score, decision and label, empty where not known."""

    image_path: str
    class_name: str
    score: str
    decision: str
    label: str


class DecisionsWriter(Callback):
    """Writes ``decisions.csv`` at the end of a prediction or test: a row per image, in the order of the data.

    Columns are ``image_path``, ``class_name``, ``score``, ``decision`` ("good", "anomalous", "unreadable"), and in a
    test ``label``. The score is the post-processed one, written with the digits that give its float back; without a
    post-processor it is the raw one and there is no decision. A file of a folder that could not be read has a row
    without score. Where several processes run, the first writes the rows of all. A prediction that fails writes
    nothing, and leaves an older table as it is.

    Among the callbacks of an :class:`AprilGAN` one of these is always there; another one that the trainer is given
    takes its place.

    Args:
        path: File to write; else ``decisions.csv`` in the trainer's ``default_root_dir``.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self._rows: list[Row] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del trainer, pl_module
        self._rows = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del trainer, pl_module
        self._rows = []

    def on_test_batch_end(  # type: ignore[override]  # the steps return batches
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        *args: Any,  # noqa: ANN401  # Lightning's batch and numbers
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take the rows of a batch, which was post-processed before."""
        del trainer, args, kwargs
        self._rows += _rows_of(outputs, pl_module)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        *args: Any,  # noqa: ANN401  # Lightning's batch and numbers
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take the rows of a batch, which was post-processed before."""
        del trainer, args, kwargs
        self._rows += _rows_of(outputs, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, with labels."""
        del pl_module
        self._write(trainer, trainer.test_dataloaders, unreadable=[])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, with the files that could not be read."""
        del pl_module
        loaders = trainer.predict_dataloaders
        self._write(trainer, loaders, unreadable=[str(path) for path in unreadable_files(loaders)])

    def _write(self, trainer: Trainer, loaders: object, unreadable: list[str]) -> None:
        rows = self._rows + [Row(path, "", "", _UNREADABLE, "") for path in unreadable]
        rows = in_order(_gathered(rows), listed_files(loaders))
        self._rows = []
        if not trainer.is_global_zero:
            return
        columns = ["image_path", "class_name", "score", "decision", *(["label"] if trainer.testing else [])]
        table = pd.DataFrame([asdict(row) for row in rows], columns=columns)
        path = self.path or Path(trainer.default_root_dir) / FILE_NAME
        # File names need not be valid Unicode.
        write_atomically(path, partial(table.to_csv, index=False, mode="wb", errors="surrogateescape"))
        rank_zero_info(f"Decisions on {len(rows)} images: {path}")


def in_order(rows: Sequence[Row], files: Sequence[str]) -> list[Row]:
    """Rows in the order of the data, without those that a sampler repeated to give every process as many.

    Args:
        rows: Rows of all processes.
        files: Images of the data; one that has no row was not looked at. Rows of other images come last.
    """
    of_file: dict[str, deque[Row]] = defaultdict(deque)
    for row in rows:
        of_file[row.image_path].append(row)
    known = set(files)
    listed = [of_file[file].popleft() for file in files if of_file.get(file)]
    return listed + [row for row in rows if row.image_path not in known]


def _gathered(rows: list[Row]) -> list[Row]:
    """Rows of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    of_rank: list[list[Row]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(of_rank, rows)
    return [row for of_one in of_rank for row in of_one]


def _rows_of(batch: ImageBatch, pl_module: LightningModule) -> list[Row]:
    number = batch.batch_size
    scores = ["" if score is None else str(score) for score in _values(batch.pred_score, number)]
    decisions, labels = _values(batch.pred_label, number), _values(batch.gt_label, number)
    return [
        Row(path, class_name, score, _WORDS[decision], _WORDS[label])
        for path, class_name, score, decision, label in zip(
            batch.image_path or [""] * number,
            _class_names(batch, pl_module),
            scores,
            decisions,
            labels,
            strict=True,
        )
    ]


def _values(values: torch.Tensor | None, number: int) -> list[Any]:
    """Python's bools, or numpy's floats, whose text is the shortest that gives them back."""
    if values is None:
        return [None] * number
    if values.dtype == torch.bool:
        return values.tolist()
    return list(values.float().cpu().numpy())


def _class_names(batch: ImageBatch, pl_module: LightningModule) -> Sequence[str]:
    """Classes by which the model judged, or else those that the data tell."""
    number = batch.batch_size
    known: Sequence[str] = getattr(getattr(pl_module, "model", None), "class_names", ())
    index = getattr(batch, "class_index", None)
    if index is not None:
        return [known[place] for place in index.tolist()]
    told: Sequence[str] | None = getattr(batch, "class_name", None)
    if told is not None:
        return told
    return [known[0] if len(known) == 1 else ""] * number
