"""The results of a run as a table."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ..classes import names_of, rows_of
from ..data.listing import listed_files
from ..data.reading_hooks import unreadable_files
from ..files import write_atomically
from ..running import all_gather_object
from .callback import ResultWriter


class Row(NamedTuple):
    """One image; empty what is not known."""

    image_path: str
    class_name: str
    score: str
    decision: str
    label: str


class DecisionsWriter(ResultWriter):
    """Writes ``decisions.csv`` at the end of a prediction or test: a row per image, in the order of the data.

    Columns are ``image_path``, ``class_name``, ``score``, ``decision`` ("good", "anomalous", "unreadable"), and in a
    test ``label``. The score is the post-processed one, with the digits that give its float back; without a
    post-processor it is raw and there is no decision. A file that could not be read has no score. The first of several
    processes writes the rows of all. A prediction that fails leaves an older table as it is. Every :class:`AprilGAN`
    brings a writer; another one that the trainer is given takes its place.

    Args:
        path: File to write; else ``decisions.csv`` in the trainer's ``default_root_dir``.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        self._rows: list[Row] = []

    def start(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Begin a table."""
        del trainer, pl_module, loaders
        self._rows = []

    def write_batch(self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch) -> None:
        """Add the rows of a batch."""
        del trainer
        self._rows += map(
            Row,
            batch.image_path or [""] * batch.batch_size,
            _class_names(batch, pl_module),
            _scores(batch.pred_score, batch.batch_size),
            _words(batch.pred_label, batch.batch_size),
            _words(batch.gt_label, batch.batch_size),
        )

    def finish(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Write the table, with labels in a test, and with the files that could not be read."""
        del pl_module
        self._rows += [Row(str(path), "", "", "unreadable", "") for path in unreadable_files(loaders)]
        rows = in_order([row for rows in all_gather_object(self._rows) for row in rows], listed_files(loaders))
        if not trainer.is_global_zero:
            return
        table = pd.DataFrame(rows, columns=Row._fields)
        columns = Row._fields if trainer.testing else Row._fields[:-1]
        path = self.path or Path(trainer.default_root_dir) / "decisions.csv"
        # File names need not be valid Unicode.
        write_atomically(path, partial(table.to_csv, columns=columns, index=False, mode="wb", errors="surrogateescape"))
        rank_zero_info(f"Decisions on {len(rows)} images: {path}")


def in_order(rows: Sequence[Row], files: Sequence[str]) -> list[Row]:
    """Rows in the order of the data's files, without those that a sampler repeated to give every process as many.

    A file without a row was not looked at. Rows of other images come last.
    """
    of_file: dict[str, deque[Row]] = defaultdict(deque)
    for row in rows:
        of_file[row.image_path].append(row)
    known = set(files)
    listed = [of_file[file].popleft() for file in files if of_file.get(file)]
    return listed + [row for row in rows if row.image_path not in known]


def _scores(scores: torch.Tensor | None, number: int) -> list[str]:
    # The shortest texts that give the scores back.
    return [""] * number if scores is None else [str(score) for score in scores.float().cpu().numpy()]


def _words(labels: torch.Tensor | None, number: int) -> list[str]:
    return [""] * number if labels is None else ["anomalous" if label else "good" for label in labels.tolist()]


def _class_names(batch: ImageBatch, pl_module: LightningModule) -> Sequence[str]:
    # Those by which the model judged, or else those that the data name.
    known = names_of(pl_module)
    if len(known) > 1:
        return [known[row] for row in rows_of(pl_module, batch).tolist()]
    named: Sequence[str] | None = getattr(batch, "class_name", None)
    return named or [known[0] if known else ""] * batch.batch_size
