"""The results of a run as a table."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeGuard, TypeVar

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ..checks import check_text
from ..classes import names_of, rows_of
from ..csv_text import as_csv
from ..data.listing import listed_files
from ..data.reading_hooks import unreadable_files
from ..decision.post_processing import AprilGANPostProcessor
from ..files import check_writable, unwritable_named, write_atomically
from ..running import all_gather_object
from .callback import ResultWriter, loaders_of
from .drift import DriftMonitor

_UNREADABLE, _UNDECIDED = "unreadable", "undecided"


class Row(NamedTuple):
    """One image; empty what is not known."""

    image_path: str
    class_name: str
    score: str
    decision: str
    label: str = ""
    p_value: str = ""
    drift: str = ""


_HEADER = Row(*Row._fields)
# A prediction has no labels, a test has defects on purpose, and p-values and drift need good parts to compare with.
_ALWAYS, _IN_TESTS, _IN_PREDICTIONS = Row._fields[:4], {"label", "p_value"}, {"p_value", "drift"}


class DecisionsWriter(ResultWriter):
    """Writes ``decisions.csv`` during a prediction or test: a row per image.

    Columns are ``image_path``, ``class_name``, ``score``, ``decision`` ("good", "anomalous", "undecided",
    "unreadable"), and in a test ``label``; every field is quoted. The score is the post-processed one, with the digits
    that give its float back; without a post-processor it is raw and there is no decision. A score that is not a number
    leaves an image undecided. A file that could not be read has no score.

    Where thresholds were calibrated with held-out good parts, two columns follow. ``p_value`` is the share of those
    parts that score at least this; see ``anomalib_aprilgan.decision.good_parts.GoodParts.p_values``. In a prediction
    ``drift`` tells whether the latest images are like those parts; see
    ``anomalib_aprilgan.results.drift.DriftMonitor``. What has changed is warned of once for each class, and told when
    the run ends. No decision hangs on it.

    The table grows batch by batch, so that a run that is ended keeps what it got to; an older table goes with the first
    batch. When the run ends, the rows come into the order of the data. The first of several processes writes those of
    all; until then the others have tables of their own beside it, ``decisions.rank1.csv``. Every ``AprilGAN``
    brings a writer; another one that the trainer is given takes its place.

    Args:
        path: File to write; else ``decisions.csv`` in the trainer's ``default_root_dir``.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        super().__init__()
        self.path = None if path is None else Path(check_text("path", path, "a file to write"))
        self._rows: list[Row] = []
        self._monitors: dict[int, DriftMonitor] = {}

    def start(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Begin a table; an OSError where its folder cannot be written."""
        del pl_module, loaders
        check_writable(self.path_of(trainer).parent)
        self._rows, self._monitors = [], {}

    def write_batch(self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch) -> None:
        """Add the rows of a batch, and of the files before it that could not be read."""
        rows = self.rows_of_batch(batch, pl_module, drift=not trainer.testing)
        self._append(trainer, _columns(trainer, pl_module), [*self._new_unreadable(loaders_of(trainer)), *rows])

    def rows_of_batch(self, batch: ImageBatch, pl_module: LightningModule, *, drift: bool) -> list[Row]:
        """The rows of a batch; ``drift`` says whether its images are watched for drift."""
        scores = _scores(batch.pred_score, batch.batch_size)
        rows = map(
            Row,
            batch.image_path or [""] * batch.batch_size,
            class_names_of(batch, pl_module),
            scores,
            map(_decision, scores, _words(batch.pred_label, batch.batch_size)),
            _words(batch.gt_label, batch.batch_size),
            _p_values(batch),
            self._drift(batch, pl_module) if drift else [""] * batch.batch_size,
        )
        return list(rows)

    def finish(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Put the rows of all processes into the order of the data."""
        names = names_of(pl_module)
        self._rows += self._new_unreadable(loaders)
        rows = in_order([row for rows in all_gather_object(self._rows) for row in rows], listed_files(loaders))
        path, columns = self.path_of(trainer), _columns(trainer, pl_module)
        if not trainer.is_global_zero:
            path.unlink(missing_ok=True)
            return
        write_atomically(path, lambda file: file.write(_as_csv(columns, [_HEADER, *rows])))
        rank_zero_info(f"Decisions on {len(rows)} images: {path}")
        for row, monitor in sorted(self._monitors.items()):
            rank_zero_info(f"Drift of {names[row]!r} in {monitor.seen} images: {monitor.summary}")

    def _drift(self, batch: ImageBatch, pl_module: LightningModule) -> list[str]:
        """What has changed at each image of a batch, where good parts are known; see ``DriftMonitor``."""
        post_processor = getattr(pl_module, "post_processor", None)
        scores, appearances = (getattr(batch, name, None) for name in ("raw_score", "appearance"))
        if not _knows_good_parts(post_processor) or scores is None or appearances is None:
            return [""] * batch.batch_size
        found = []
        for place, row in enumerate(rows_of(pl_module, batch).tolist()):
            monitor = self._monitors.get(row)
            if monitor is None:
                good = [part.cpu().numpy() for part in post_processor.of_class(row).good_parts()]
                monitor = self._monitors.setdefault(row, DriftMonitor(*good))
            known = monitor.first
            found.append(monitor.update(scores[place].item(), appearances[place].cpu().numpy()))
            if known is None and monitor.first is not None:
                rank_zero_warn(f"Drift of {names_of(pl_module)[row]!r} at {monitor.first}. Decisions are unchanged.")
        return found

    def _append(self, trainer: Trainer, columns: Sequence[int], rows: list[Row]) -> None:
        path = self.path_of(trainer)
        if not self._rows:
            write_atomically(path, lambda file: file.write(_as_csv(columns, [_HEADER, *rows])))
        else:
            with unwritable_named(path), path.open("ab", buffering=0) as file:
                file.write(_as_csv(columns, rows))
        self._rows += rows

    def _new_unreadable(self, loaders: object) -> list[Row]:
        known = sum(row.decision == _UNREADABLE for row in self._rows)
        return [Row(str(path), "", "", _UNREADABLE) for path in unreadable_files(loaders)[known:]]

    def path_of(self, trainer: Trainer) -> Path:
        """Where the table of a run is written, by this process."""
        path = self.path or Path(trainer.default_root_dir) / "decisions.csv"
        return path.with_suffix(f".rank{trainer.global_rank}{path.suffix}") if trainer.global_rank else path


class OfFile(Protocol):
    """Anything that is told of one image file."""

    @property
    def image_path(self) -> str:
        """Its path, empty for none."""
        ...


One = TypeVar("One", bound=OfFile)


def in_order(rows: Sequence[One], files: Sequence[str]) -> list[One]:
    """Rows in the order of the data's files, without those that a sampler repeated to give every process as many.

    A file without a row was not looked at. Rows of other images come last.
    """
    of_file: dict[str, deque[One]] = defaultdict(deque)
    for row in rows:
        of_file[row.image_path].append(row)
    known = set(files)
    listed = [of_file[file].popleft() for file in files if of_file.get(file)]
    return listed + [row for row in rows if row.image_path not in known]


def _scores(scores: torch.Tensor | None, number: int) -> list[str]:
    # The shortest texts that give the scores back.
    return [""] * number if scores is None else [str(score) for score in scores.float().cpu().numpy()]


def _p_values(batch: ImageBatch) -> list[str]:
    values: torch.Tensor | None = getattr(batch, "p_value", None)
    if values is None:
        return [""] * batch.batch_size
    return [f"{value:.6g}" if math.isfinite(value) else "" for value in values.tolist()]


def _decision(score: str, word: str) -> str:
    return _UNDECIDED if word and not math.isfinite(float(score or "nan")) else word


def _words(labels: torch.Tensor | None, number: int) -> list[str]:
    return [""] * number if labels is None else ["anomalous" if label else "good" for label in labels.tolist()]


def class_names_of(batch: ImageBatch, pl_module: LightningModule) -> Sequence[str]:
    """Names of the classes of a batch: those by which the model judged, or else those that the data name."""
    known = names_of(pl_module)
    if len(known) > 1:
        return [known[row] for row in rows_of(pl_module, batch).tolist()]
    named: Sequence[str] | None = getattr(batch, "class_name", None)
    return named or [known[0] if known else ""] * batch.batch_size


def _knows_good_parts(post_processor: object) -> TypeGuard[AprilGANPostProcessor]:
    return isinstance(post_processor, AprilGANPostProcessor) and post_processor.good_parts.scores is not None


def _columns(trainer: Trainer, pl_module: LightningModule) -> list[int]:
    """Places of the fields of a row that a table has."""
    chosen = {*_ALWAYS, *(_IN_TESTS if trainer.testing else _IN_PREDICTIONS)}
    if not _knows_good_parts(getattr(pl_module, "post_processor", None)):
        chosen -= {"p_value", "drift"}
    return [place for place, name in enumerate(Row._fields) if name in chosen]


def _as_csv(columns: Sequence[int], rows: Iterable[Row]) -> bytes:
    return as_csv([row[place] for place in columns] for row in rows)
