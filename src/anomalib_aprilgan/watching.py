"""A folder that is watched: what comes into it is inspected once, whatever happens meanwhile."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import torch
from anomalib.data import ImageBatch
from anomalib.data.utils.image import is_image_file
from filelock import FileLock, Timeout

from .checks import check_choice, check_int
from .csv_text import as_csv, read_csv, safe_path, whole_records
from .data.reading import UnreadableImageError, load_image
from .files import check_writable, is_drawing, unwritable_named, write_atomically
from .lightning_model import AprilGAN
from .results.file_names import marked, png_name
from .results.region_files import REGION_COLUMNS, region_rows, write_map
from .results.regions import regions_of
from .results.run_files import DECISIONS, MAPS, REGIONS, THRESHOLDS, write_thresholds
from .results.table import DecisionsWriter, Row
from .results.visualizer import AprilGANVisualizer
from .single_images import inspect_images

# What tells the version of a file that a row is about, beside the columns of a run.
_STAMP = ("modified", "bytes")
COLUMNS = (*Row._fields[:4], "p_value", "drift", *_STAMP, "inspected", "seconds")
_MAP_SIDE = 1024
_LATENCIES = 1000  # of which the median is told


class Version(NamedTuple):
    """A file as it was: its path, time of change in nanoseconds, and size in bytes."""

    path: str
    modified: int
    size: int


@dataclass
class Counts:
    """What a watcher has done since it started."""

    decisions: Counter[str] = field(default_factory=Counter)
    seconds: deque[float] = field(default_factory=partial(deque, maxlen=_LATENCIES))

    def __str__(self) -> str:
        """One line."""
        total = sum(self.decisions.values())
        found = ", ".join(f"{number} {word}" for word, number in sorted(self.decisions.items()))
        median = sorted(self.seconds)[len(self.seconds) // 2] * 1000.0 if self.seconds else 0.0
        return f"{total} inspected{f': {found}' if found else ''}; {median:.0f} ms an image (median)"


class FolderWatch:
    """Inspects every image of a folder once, and what comes into it.

    A file is inspected when its size and time of change were the same in two looks. A file that is replaced is another
    version, and is inspected again. The row of an image in ``decisions.csv`` is written last, in one piece and to the
    disk: an image with a row is done, and one without is inspected again by the next watcher, which leaves nothing
    twice. Of files that cannot be read, those are given up that stay as they are for ``patience`` seconds.

    Args:
        model: A model that is ready, in evaluation mode.
        folder: What is watched, with all folders in it; files whose names begin with a dot are left alone.
        out: Folder for ``decisions.csv``, ``regions.csv``, ``thresholds.json``, and ``images`` and ``maps``; must not
            lie in the watched one.
        class_name: Class of all images; else the only one, or the one that a folder is named after.
        keep: Of which images drawings and maps are kept: ``"anomalous"``, ``"all"`` or ``"none"``.
        min_area: Regions of fewer pixels are left out.
        batch_size: Images that are inspected together.
        patience: Seconds.

    Raises:
        ValueError: The folders or numbers cannot be, or ``decisions.csv`` is of something else.
        OSError: The folder for the results cannot be written, or another watcher writes there.
    """

    def __init__(
        self,
        model: AprilGAN,
        folder: Path,
        out: Path,
        class_name: str | None = None,
        keep: str = "anomalous",
        min_area: int = 0,
        batch_size: int = 8,
        patience: float = 10.0,
    ) -> None:
        check_choice("keep", keep, ("anomalous", "all", "none"))
        check_int("min_area", min_area, 0, hint=" pixels")
        _check(folder, out, batch_size, patience)
        self.model, self.folder, self.out, self.class_name = model, folder, out, class_name
        self.keep, self.min_area, self.batch_size, self.patience = keep, min_area, batch_size, patience
        if class_name is not None and class_name not in model.classes.names:
            msg = f"`class_name` must be one of {', '.join(model.classes.names)}, got {class_name!r}."
            raise ValueError(msg)
        self.counts = Counts()
        self.lock = FileLock(out / ".watch.lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            msg = f"Another process writes to {out}: stop it, or choose another folder."
            raise OSError(msg) from None
        self._writer, self._visualizer = DecisionsWriter(), AprilGANVisualizer()
        self._before: dict[Version, float] = {}  # versions that wait, and since when
        try:
            self._done = self._recover()
            write_thresholds(out / THRESHOLDS, model.post_processor, model.classes.names)
        except BaseException:
            self.lock.release()
            raise

    def look(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Inspect what is ready, until ``should_stop`` says so; whether something that is there still waits."""
        now, there = time.monotonic(), set(self._scan())
        waiting = {version: self._before.get(version, now) for version in there - self._done}
        ready = sorted((one for one in waiting if one in self._before), key=lambda one: (one.modified, one.path))
        self._before = waiting
        for start in range(0, len(ready), self.batch_size):
            if should_stop():
                break
            self._inspect(ready[start : start + self.batch_size], now)
        return any(one not in self._done for one in waiting)

    def _scan(self) -> Iterator[Version]:
        """The image files in the folder, as they are now."""
        for folder, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                path = Path(folder) / name
                if not name.startswith(".") and is_image_file(path):
                    with suppress(OSError):  # gone meanwhile, or not ours to see
                        if path.is_file():
                            yield _version_of(path)

    def _inspect(self, versions: Sequence[Version], now: float) -> None:
        """Inspect these versions, as far as they can be read and are still there."""
        started, images, read = time.monotonic(), [], []
        for version in versions:
            path = Path(version.path)
            try:
                if is_drawing(path):
                    self._done.add(version)
                    continue
                image = load_image(path)
                if _version_of(path) == version:  # else it is being written
                    images.append(image)
                    read.append(version)
            except UnreadableImageError:
                if now - self._before[version] >= self.patience and path.is_file():
                    self._commit([version], [Row(version.path, "", "", "unreadable")], started)
            except OSError:
                continue  # gone
        together = 1 if self.model.settings.tile_size is not None else len(images)
        for start in range(0, len(images), max(1, together)):
            self._decide(read[start : start + together], images[start : start + together], started)

    @torch.inference_mode()
    def _decide(self, versions: Sequence[Version], images: Sequence[torch.Tensor], started: float) -> None:
        paths = [version.path for version in versions]
        try:
            batch = inspect_images(self.model, images, paths, self.class_name, self.folder)
        except ValueError as error:  # an image that does not fit: of no class, or of another size than its region
            if len(versions) > 1:
                for version, image in zip(versions, images, strict=True):
                    self._decide([version], [image], started)
                return
            warnings.warn(f"No decision on {paths[0]}: {error}", stacklevel=2)
            self._commit(versions, [Row(paths[0], "", "", "undecided")], started)
            return
        regions = regions_of(batch, self.min_area)
        rows = self._writer.rows_of_batch(batch, self.model, drift=True)
        extra: list[list[object]] = []
        for place, (version, row) in enumerate(zip(versions, rows, strict=True)):
            if self.keep == "all" or (self.keep == "anomalous" and row.decision != "good"):
                self._draw(batch, place, version)
            found = region_rows(version.path, row.class_name, regions[place].found)
            extra += [[*one, version.modified, version.size] for one in found]
        _append(self.out / REGIONS, extra)
        self._commit(versions, rows, started)

    def _commit(self, versions: Sequence[Version], rows: Sequence[Row], started: float) -> None:
        """Write the rows of these versions, by which they are done."""
        seconds = (time.monotonic() - started) / len(rows)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines = []
        for version, row in zip(versions, rows, strict=True):
            told = [version.path, row.class_name, row.score, row.decision, row.p_value, row.drift]
            lines.append([*told, version.modified, version.size, when, f"{seconds:.4f}"])
            self.counts.decisions[row.decision] += 1
            self.counts.seconds.append(seconds)
        _append(self.out / DECISIONS, lines)
        self._done |= set(versions)

    def _draw(self, batch: ImageBatch, place: int, version: Version) -> None:
        """Keep the drawing and the map of an image."""
        name = Path(version.path).relative_to(self.folder)
        file = name.parent / png_name(name)
        drawing = self._visualizer.draw_of_batch(batch, place, self.model)
        save = partial(drawing.save, format="PNG", compress_level=1, pnginfo=marked())
        write_atomically(self.out / "images" / file, save)
        if batch.anomaly_map is not None and batch.anomaly_map[place].isfinite().all():
            write_map(self.out / "maps" / file, batch.anomaly_map[place], _MAP_SIDE)
            _append(self.out / MAPS, [[version.path, f"maps/{file.as_posix()}"]])

    def _recover(self) -> set[Version]:
        """Tables without what a killed watcher left unfinished; the versions that are done."""
        for name, columns in (
            (DECISIONS, COLUMNS),
            (REGIONS, (*REGION_COLUMNS, *_STAMP)),
            (MAPS, ("image_path", "map")),
        ):
            path = self.out / name
            before = path.read_bytes() if path.is_file() else b""
            content = whole_records(before) or as_csv([columns])
            if not content.startswith(as_csv([columns])):
                msg = f"{path} is no table of a watched folder: choose another folder for the results."
                raise ValueError(msg)
            if content != before:
                write_atomically(path, partial(_write_bytes, content))
        done = {_version_in(row, self.out / DECISIONS) for row in read_csv(self.out / DECISIONS)}
        known = read_csv(self.out / REGIONS)
        kept = [row for row in known if _version_in(row, self.out / REGIONS) in done]
        if len(kept) < len(known):
            rows = [list(row.values()) for row in kept]
            content = as_csv([(*REGION_COLUMNS, *_STAMP), *rows])
            write_atomically(self.out / REGIONS, partial(_write_bytes, content))
        return done


def _check(folder: Path, out: Path, batch_size: int, patience: float) -> None:
    if not folder.is_dir():
        msg = f"`folder`: {folder} is no folder."
        raise ValueError(msg)
    if out.resolve().is_relative_to(folder.resolve()):
        msg = f"`out`: {out} lies in the watched folder; results would be inspected. Choose another place."
        raise ValueError(msg)
    if batch_size < 1 or not 0.0 <= patience < 1e9:
        msg = f"`batch_size` must be at least 1 and `patience` 0 or more, got {batch_size} and {patience}."
        raise ValueError(msg)
    check_writable(out)


def _version_of(path: Path) -> Version:
    state = path.stat()
    return Version(safe_path(str(path)), state.st_mtime_ns, state.st_size)


def _version_in(row: dict[str, str], path: Path) -> Version:
    try:
        return Version(row["image_path"], int(row["modified"]), int(row["bytes"]))
    except ValueError:
        msg = f"{path} is damaged: `modified` and `bytes` must be whole numbers, got {row}."
        raise ValueError(msg) from None


def _write_bytes(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def _append(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Add rows to a table, in one piece, and wait until they are on the disk."""
    if not rows:
        return
    with unwritable_named(path), path.open("ab", buffering=0) as file:
        file.write(as_csv(rows))
        os.fsync(file.fileno())
