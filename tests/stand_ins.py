"""Generated stand-ins for MVTec AD and VisA: their directory layouts, category names and splits, a few tiny images."""

from __future__ import annotations

import csv
import json
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


def write_data_sets(root: Path) -> dict[str, tuple[str, str]]:
    """A category of each of anomalib's other data sets: by its name, the folder below ``root`` and the category."""
    generator = np.random.default_rng(0)
    layouts = {
        # by data set: folder, category, good images of training and test, an anomalous image, its mask
        "MPDD": (
            "MPDD", "tubes", "train/good/{}.png", "test/good/{}.png", "test/hole/7.png", "ground_truth/hole/7_mask.png",
        ),
        "BTAD": ("BTech", "01", "train/ok/{}.png", "test/ok/{}.png", "test/ko/7.png", "ground_truth/ko/7.png"),
        "MVTec LOCO AD": (
            "LOCO", "pushpins", "train/good/{}.png", "test/good/{}.png",
            "test/logical_anomalies/7.png", "ground_truth/logical_anomalies/7/000.png",
        ),
        "MVTec AD 2": (
            "AD2", "can", "train/good/{}.png", "test_public/good/{}.png",
            "test_public/bad/7.png", "test_public/ground_truth/bad/7_mask.png",
        ),
        "Real-IAD": (
            "RealIAD/realiad_256", "mint", "OK/{}.png", "OK/1{}.png", "NG/7.png", "NG/7_mask.png",
        ),
        "VAD": ("VAD", "vad", "train/good/{}.png", "test/good/{}.png", "test/bad/7.png", "ground_truth/bad/7.png"),
    }  # fmt: skip
    for folder, category, train, test, bad, mask in layouts.values():
        home = root / folder / category
        for pattern in (train, test):
            for number in range(2):
                _write(_picture(generator), home / pattern.format(number))
        picture, truth = _with_defect(generator)
        _write(picture, home / bad)
        _write(truth, home / mask)
    _write(truth, root / "LOCO" / "pushpins" / "ground_truth" / "logical_anomalies" / "7" / "001.png")
    _write(_picture(generator), root / "LOCO" / "pushpins" / "validation" / "good" / "0.png")
    _write(_picture(generator), root / "AD2" / "can" / "validation" / "good" / "0.png")
    listed = [{"anomaly_class": "OK", "image_path": f"OK/{number}.png"} for number in (0, 1, 10, 11)]
    bad_one = {"anomaly_class": "NG", "image_path": "NG/7.png", "mask_path": "NG/7_mask.png"}
    metadata = root / "RealIAD" / "realiad_jsons" / "realiad_jsons" / "mint.json"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(json.dumps({"train": listed[:2], "test": [*listed[2:], bad_one]}), encoding="utf-8")
    for number in range(8):
        picture, truth = _with_defect(generator)
        _write(picture, root / "kolektor" / "kos01" / f"Part{number}.jpg")
        _write(truth if number < 2 else 0 * truth, root / "kolektor" / "kos01" / f"Part{number}_label.bmp")
    found = {name: (folder.split("/")[0], category) for name, (folder, category, *_) in layouts.items()}
    return found | {"Kolektor SDD": ("kolektor", "")}
