"""A page of all results of a run, to be looked at, sorted and corrected in any browser, without a network."""

from __future__ import annotations

import base64
import io
import json
import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from shutil import rmtree
from typing import Any

import matplotlib as mpl
import numpy as np
from anomalib.data import ImageBatch
from jinja2 import Environment, PackageLoader
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from ..checks import check_int, check_text
from ..classes import names_of
from ..data.reading import UnreadableImageError, display_image
from ..data.roi import image_size_of
from ..files import check_writable, write_atomically
from .callback import ResultWriter
from .drawing import COLOUR_MAP, OPACITY
from .region_files import MAP_LEVELS
from .run_files import DECISIONS, THRESHOLDS, ClassThreshold, InspectedImage, RunFiles, write_thresholds
from .table import DecisionsWriter

REPORT, PAGES = "report.html", "report_files"
# Up to so many images lie within the page; of more, so many in each file beside it.
_IN_PAGE, _IN_FILE = 1000, 500
# Longest sides in pixels, and most bytes, of the copies of an image and of its map.
_IMAGE_SIDE, _IMAGE_BYTES = 384, 24_000
_MAP_SIDE, _MAP_BYTES = 192, 8_000
_QUALITIES = (80, 60, 40, 20)


class ReportWriter(ResultWriter):
    """Writes ``report.html`` when a run ends, from the files beside it; see ``write_report``.

    Args:
        folder: Folder of the run's files; else the trainer's ``default_root_dir``.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        super().__init__()
        self.folder = None if folder is None else Path(check_text("folder", folder, "a folder of results"))

    def start(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Raise an OSError where the folder cannot be written."""
        del pl_module, loaders
        check_writable(self._folder(trainer))

    def write_batch(self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch) -> None:
        """Wait for the end: other callbacks write the files."""

    def finish(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Write the thresholds and the page."""
        del loaders
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        folder = self._folder(trainer)
        names = names_of(pl_module)
        write_thresholds(folder / THRESHOLDS, getattr(pl_module, "post_processor", None), names)
        tables = [one for one in vars(trainer)["callbacks"] if isinstance(one, DecisionsWriter)]
        table = tables[0].path_of(trainer) if tables else folder / DECISIONS
        path = write_report(folder, RunFiles.read(folder, table), title=", ".join(names))
        rank_zero_info(f"Report: {path}")

    def _folder(self, trainer: Trainer) -> Path:
        return self.folder or Path(trainer.default_root_dir)


def write_report(
    folder: Path,
    run: RunFiles,
    title: str = "",
    track: Callable[[Sequence[InspectedImage]], Iterable[InspectedImage]] = iter,
    in_page: int = _IN_PAGE,
) -> Path:
    """Write ``report.html``: a gallery with thresholds to move, regions, heatmaps and marks.

    The page asks nothing of any network. Up to ``in_page`` images lie within it; of more, the copies of the images lie
    in files of ``report_files`` beside it. It shows copies of the images, 384 pixels wide or high.

    Args:
        folder: Where to write, and where the files of the run lie.
        run: What they say.
        title: What was inspected.
        track: Gives the images one by one; a progress bar, for example.
        in_page: Number of images from 1 up.

    Returns:
        The path of the page.

    Raises:
        OSError: The folder cannot be written.
    """
    check_int("in_page", in_page, 1)
    check_writable(folder)
    ordered = sorted(run.images, key=_order)
    known = {one.name: one for one in run.thresholds}
    names = list(dict.fromkeys([*known, *(one.class_name for one in ordered if one.class_name or not known)]))
    rows, shown = [], []
    copies = _Copies(folder, len(ordered) > in_page)
    for one in track(ordered):
        size, copy = _copies_of(one)
        rows.append(_row(one, names, size))
        shown.append(copy)
        if copies.is_beside and len(shown) == _IN_FILE:
            copies.write(shown)
            shown = []
    if copies.is_beside:
        copies.write(shown)
        shown = []
    data = {
        "id": secrets.token_hex(8),  # under which a browser keeps the marks
        "classes": [_threshold(known.get(name, ClassThreshold(name))) for name in names],
        "images": rows,
        "copies": shown,
        "perFile": _IN_FILE if copies.is_beside else 0,
        "files": copies.name,
    }
    page = Environment(loader=PackageLoader("anomalib_aprilgan", "results/report_page"), autoescape=True)
    text = page.get_template("page.html").render(
        data=data, title=title or "Inspection", made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    )
    path = folder / REPORT
    write_atomically(path, lambda file: file.write(text.encode()))
    copies.remove_others()
    return path


class _Copies:
    """Files with the copies of images, beside a page; of every page in a folder of its own, so that none is mixed."""

    def __init__(self, folder: Path, is_beside: bool) -> None:
        self.is_beside = is_beside
        self._parent = folder / PAGES
        self.name = f"{PAGES}/{secrets.token_hex(4)}" if is_beside else ""
        self._folder, self._number = folder / self.name, 0

    def write(self, shown: Sequence[Sequence[str]]) -> None:
        """Write the copies of the next images."""
        if shown:
            text = f"aprilganCopies({self._number}, {json.dumps(shown)});\n"
            write_atomically(self._folder / f"{self._number}.js", lambda file: file.write(text.encode()))
            self._number += 1

    def remove_others(self) -> None:
        """Remove the files of earlier pages."""
        if self._parent.is_dir():
            for old in self._parent.iterdir():
                if old != self._folder:
                    rmtree(old, ignore_errors=True)
            with suppress(OSError):
                self._parent.rmdir()


def _order(one: InspectedImage) -> tuple[bool, float, str]:
    """The highest score first, what has none last."""
    known = one.score is not None and math.isfinite(one.score)
    return (not known, -(one.score or 0.0) if known else 0.0, one.image_path)


def _row(one: InspectedImage, names: Sequence[str], size: tuple[int, int] | None) -> list[Any]:
    score = one.score if one.score is not None and math.isfinite(one.score) else None
    regions = [[r.left, r.top, r.width, r.height, r.area, round(r.peak, 4)] for r in one.regions]
    height, width = size or (0, 0)
    row = names.index(one.class_name) if one.class_name in names else 0
    return [one.image_path, row, score, one.decision, one.label, one.p_value, one.drift, regions, width, height]


def _threshold(one: ClassThreshold) -> dict[str, Any]:
    return {"name": one.name, "cut": one.image_cut, "knots": [list(pair) for pair in one.knots]}


def _copies_of(one: InspectedImage) -> tuple[tuple[int, int] | None, list[str]]:
    """Height and width of an image, and small copies of it and its map as data, empty for what is not there."""
    size, image, heat = None, "", ""
    with suppress(UnreadableImageError, OSError):
        path = Path(one.image_path)
        size = image_size_of(path)
        pixels = display_image(str(path), _IMAGE_SIDE).permute(1, 2, 0).numpy()
        image = _as_data(Image.fromarray(pixels), _IMAGE_BYTES)
    if one.map_file is not None:
        with suppress(OSError, ValueError):
            heat = _as_data(_heat(one.map_file), _MAP_BYTES)
    return size, [image, heat]


def _heat(path: Path) -> Image.Image:
    """The colours of a map, transparent where it is cold, as in the drawings."""
    with Image.open(path) as file:
        values = np.asarray(file).astype(np.float32) / MAP_LEVELS
    scale = min(1.0, _MAP_SIDE / max(values.shape))
    opacity = OPACITY * (2.0 * values).clip(0.0, 1.0) ** 2
    colours = Image.fromarray(mpl.colormaps[COLOUR_MAP](values, alpha=opacity, bytes=True))
    return colours.resize([max(1, round(side * scale)) for side in colours.size], Image.Resampling.BOX)


def _as_data(image: Image.Image, most: int) -> str:
    """An image as a ``data:`` address of at most so many bytes before base64."""
    while True:
        for quality in _QUALITIES:
            file = io.BytesIO()
            image.save(file, "WEBP", quality=quality, method=2)
            if file.tell() <= most:
                return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
        image = image.resize([max(1, side // 2) for side in image.size], Image.Resampling.BOX)
