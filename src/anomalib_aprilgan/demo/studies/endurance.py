"""Whether long predictions stay small and ended ones lose nothing, with the built-in model.

``python -m anomalib_aprilgan.demo.studies.endurance`` inspects 5,000 images of 520 pixels with ``anomalib predict`` and
tells how much resident memory grows after the first 200. Then it ends 20 predictions at random moments, by SIGKILL,
SIGTERM and SIGINT in turn, and compares the images that were finished with the rows of ``decisions.csv``.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from rich.console import Console

from .. import built_in
from ..drawing import draw_good

_DISTINCT = 8  # images; the others are further names of them
_SETTLED = 200  # images after which memory must not grow
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Watch(Callback):
    """Writes down every image that was finished, with the resident memory in bytes at that time.

    Args:
        path: File to append to, a line per image.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._last: Sequence[str] = ()

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, *_: int) -> None:
        """Write down the batch before this one: everything has been done with it."""
        del trainer, pl_module
        lines = "".join(f"{psutil.Process().memory_info().rss} {path}\n" for path in self._last)
        with self.path.open("ab", buffering=0) as file:
            file.write(lines.encode())
        self._last = list(batch.image_path or ())


class Interruption(NamedTuple):
    """How a prediction that was ended compares with its table: numbers of images."""

    by: str
    finished: int
    in_table: int
    missing: int


def write_images(folder: Path, count: int, size: int) -> Path:
    """A folder of ``count`` drawn images of ``size`` pixels."""
    folder.mkdir(parents=True)
    for number in range(count):
        path, first = folder / f"{number:05d}.png", folder / f"{number % _DISTINCT:05d}.png"
        if number < _DISTINCT:
            Image.fromarray(draw_good("leather", 0, number, size)).save(path)
        else:
            path.hardlink_to(first)
    return folder


def predict(images: Path, results: Path, log: Path) -> None:
    """``anomalib predict`` on a folder of images."""
    options: dict[str, Any] = {
        "--model": "AprilGAN",
        "--model.backbone": built_in.ARCHITECTURE,
        "--model.pretrained": built_in.PRETRAINED,
        "--model.image_size": built_in.IMAGE_SIZE,
        "--model.stages": list(built_in.STAGES),
        "--data": images,
        "--default_root_dir": results,
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
        "--trainer.callbacks": f"{__name__ if __name__ != '__main__' else __spec__.name}.Watch",
        "--trainer.callbacks.init_args.path": log,
    }
    AnomalibCLI(args=["predict", *(f"{name}={value}" for name, value in options.items())])


def growth(log: Path) -> tuple[int, int]:
    """Resident memory in bytes after the first 200 images, and the most after that."""
    memory = [int(line.partition(" ")[0]) for line in log.read_text().splitlines()]
    return memory[_SETTLED - 1], max(memory[_SETTLED:])


def interrupt(images: Path, folder: Path, number: int, seed: int) -> Interruption:
    """Predict in a process of its own, end it at a random moment, and compare what is there."""
    folder.mkdir()
    log, of_signal = folder / "log", _SIGNALS[number % len(_SIGNALS)]
    log.touch()
    context = multiprocessing.get_context("fork")  # what is imported already need not be imported again
    process = context.Process(target=_quietly, args=(images, folder / "results", log))
    process.start()
    while process.is_alive() and not log.stat().st_size:
        time.sleep(0.01)
    time.sleep(random.Random(seed * 1000 + number).uniform(0.0, 2.0))  # noqa: S311  # no secret
    os.kill(process.pid or 0, of_signal)
    process.join(20)
    process.kill()  # where a signal only asks for an end
    process.join()
    finished = {line.partition(" ")[2] for line in log.read_text().splitlines()}
    rows = [row for table in folder.rglob("decisions.csv") for row in _rows(table)]
    decided = {row["image_path"] for row in rows if row["decision"] in {"good", "anomalous"}}
    return Interruption(of_signal.name, len(finished), len(rows), len(finished - decided))


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def _quietly(images: Path, results: Path, log: Path) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # noqa: PTH123  # no file
        predict(images, results, log)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description="Memory of a long prediction, and tables of ended ones.")
    parser.add_argument("--images", type=int, default=5000, help="images of the long prediction")
    parser.add_argument("--size", type=int, default=520, help="their side in pixels")
    parser.add_argument("--interruptions", type=int, default=20, help="predictions to end")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which they are ended")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images", options.images, options.size)
        if options.images > _SETTLED:
            predict(images, folder / "long", folder / "log")
            settled, most = growth(folder / "log")
            console.print(f"{options.images} images of {options.size} px: {settled / 1e6:.0f} MB after {_SETTLED},")
            console.print(f"at most {most / 1e6:.0f} MB later: {(most - settled) / 1e6:+.0f} MB.")
            shutil.rmtree(folder / "long")
        for number in range(options.interruptions):
            found = interrupt(images, folder / f"run{number}", number, options.seed)
            console.print(f"{found.by}: {found.finished} finished, {found.in_table} rows, {found.missing} missing")


if __name__ == "__main__":
    main()
