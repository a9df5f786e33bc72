"""Generated stand-ins for MVTec AD and VisA: their directory layouts, category names and splits, a few tiny images."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_mvtec_ad(root: Path, categories: Sequence[str], train: int = 2) -> None:
    """``category/{train,test,ground_truth}/kind/000.png``, one good and one bad test image."""
    generator = np.random.default_rng(0)
    for category in categories:
        for number in range(train):
            _write(_picture(generator), root / category / "train" / "good" / f"{number:03d}.png")
        _write(_picture(generator), root / category / "test" / "good" / "000.png")
        picture, mask = _with_defect(generator)
        _write(picture, root / category / "test" / "broken" / "000.png")
        _write(mask, root / category / "ground_truth" / "broken" / "000_mask.png")


def write_visa(root: Path, categories: Sequence[str], train: int = 2) -> None:
    """``category/Data/{Images,Masks}`` and ``split_csv/1cls.csv``, as it is downloaded; masks hold small numbers."""
    generator = np.random.default_rng(0)
    rows = []
    for category in categories:
        data = Path(category) / "Data"
        for number in range(train + 1):
            path = data / "Images" / "Normal" / f"{number:04d}.JPG"
            _write(_picture(generator), root / path)
            rows.append((category, "train" if number < train else "test", "normal", path.as_posix(), ""))
        image, mask = data / "Images" / "Anomaly" / "000.JPG", data / "Masks" / "Anomaly" / "000.png"
        picture, defect = _with_defect(generator)
        _write(picture, root / image)
        _write(defect // 255 * 3, root / mask)
        rows.append((category, "test", "anomaly", image.as_posix(), mask.as_posix()))
    split = root / "split_csv" / "1cls.csv"
    split.parent.mkdir(parents=True)
    with split.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])


def _picture(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(96, 160, (64, 64, 3)).astype(np.uint8)


def _with_defect(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    picture, mask = _picture(generator), np.zeros((64, 64), np.uint8)
    row, column = generator.integers(8, 40, 2)
    window = slice(row, row + 12), slice(column, column + 12)
    picture[window], mask[window] = 250, 255
    return picture, mask


def _write(picture: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
