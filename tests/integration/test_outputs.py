"""What a run writes beside decisions and drawings, in all modes, where the map is the defect itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from skimage.measure import label, regionprops
from torch import Tensor
from torchvision.transforms.v2 import CenterCrop

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.csv_text import read_csv
from anomalib_aprilgan.network.model import RawPredictions
from anomalib_aprilgan.results.region_files import RegionsWriter

from .runs import engine, good

Build = Callable[..., AprilGAN]
SIZES = [(101, 77), (131, 200), (96, 96), (63, 150)]
MODES: dict[str, dict[str, Any]] = {
    "square": {},
    "height and width": {"image_size": (80, 112)},
    "aspect": {"aspect_ratio": 1.5},
    "tiles": {"tile_size": 64},
}


@pytest.fixture
def defects(tmp_path: Path) -> Path:
    """Black images with white defects far from each other, larger than a pixel of any map."""
    folder = tmp_path / "defects"
    folder.mkdir()
    for number, (height, width) in enumerate(SIZES):
        image = Image.new("RGB", (width, height))
        pen = ImageDraw.Draw(image)
        pen.rectangle((width // 8, height // 8, width // 3, height // 3), fill="white")
        pen.ellipse((width * 5 // 8, height // 2, width * 7 // 8, height * 7 // 8), fill="white")
        image.save(folder / f"{number}.png")
    return folder


def seeing_white(model: AprilGAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the map of a model be the brightness of the image it is given."""

    def predict(
        images: Tensor, rows: Tensor | None = None, without: Collection[int] = (), output: Any = None, **_: Any
    ) -> RawPredictions:
        mean, std = model.pre_processor.mean, model.pre_processor.std
        bright = (images if model.settings.tile_size is not None else images * std + mean).mean(dim=1)
        return RawPredictions(bright.amax(dim=(1, 2)), bright.clamp(0.0, 1.0) * model.model.map_ceiling)

    monkeypatch.setattr(model, "predict", predict)


@pytest.mark.parametrize("mode", MODES)
def test_boxes_are_those_of_the_defects_within_a_pixel_of_the_map(
    april_gan: Build, defects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    model = april_gan(class_name="nut", outputs=["regions", "coco", "masks"], min_area=2, **MODES[mode])
    seeing_white(model, monkeypatch)
    (one,) = [batches for batches in [engine(tmp_path / "run").predict(model, data_path=defects)] if batches]
    folder = next((tmp_path / "run").rglob("regions.csv")).parent
    rows, coco = read_csv(folder / "regions.csv"), COCO(str(folder / "regions.json"))
    for number, batch in enumerate(one):
        (path,), (regions,) = batch.image_path, batch.regions
        truth = np.asarray(Image.open(path).convert("L")) > 127
        wanted = sorted(one.bbox for one in regionprops(label(truth, connectivity=2)))
        mine = [row for row in rows if row["image_path"] == path]
        boxes = sorted(
            (top, left, top + height, left + width)
            for left, top, width, height in (
                [int(row[name]) for name in ("left", "top", "width", "height")] for row in mine
            )
        )
        of_map = batch.anomaly_map.shape[-2:]
        pixel = [max(1.0, length / of) for length, of in zip(truth.shape, of_map, strict=True)] * 2
        assert len(boxes) == len(wanted) == len(regions) == 2
        for box, expected in zip(boxes, wanted, strict=True):
            assert all(abs(ours - theirs) <= step for ours, theirs, step in zip(box, expected, pixel, strict=True))
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=number + 1))
        whole = np.maximum.reduce([coco.annToMask(annotation) for annotation in annotations])
        assert whole.shape == truth.shape
        (mask,) = (folder / "masks").rglob(Path(path).name)
        assert np.array_equal(np.asarray(Image.open(mask)) > 0, whole > 0)
        assert [annotation["area"] for annotation in annotations] == [int(row["area"]) for row in mine]


def test_without_outputs_nothing_more_is_written_or_kept(april_gan: Build, tmp_path: Path) -> None:
    batches = engine(tmp_path).predict(april_gan(class_name="bottle"), data_path=good("bottle"))
    assert not hasattr(batches[0], "regions")
    written = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {".csv", ".png"}
    assert [path.name for path in tmp_path.rglob("*.csv")] == ["decisions.csv"]


def test_a_writer_of_the_user_takes_the_place_of_the_models(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(class_name="bottle", outputs=["regions", "coco"])
    runner = engine(tmp_path / "run", callbacks=[RegionsWriter(tmp_path / "own", min_area=5)])
    for _ in range(2):  # the model leaves nothing behind in the trainer
        runner.predict(model, data_path=good("bottle"))
        assert [path.parent.name for path in tmp_path.rglob("regions.csv")] == ["own"]
        assert len(list((tmp_path / "run").rglob("regions.json"))) >= 1
    assert all(int(row["area"]) >= 5 for row in read_csv(tmp_path / "own" / "regions.csv"))


def test_data_that_change_their_files_are_refused(april_gan: Build, tmp_path: Path) -> None:
    data = Folder(
        name="nut",
        root=good("bottle").parent,
        normal_dir="good",
        test_augmentations=CenterCrop(60),
        val_augmentations=CenterCrop(60),
        num_workers=0,
    )
    model = april_gan(class_name="nut", outputs=["report"])
    with pytest.raises(ValueError, match="Regions are told in pixels of the image files"):
        engine(tmp_path).test(model, datamodule=data, verbose=False)
    fixed = april_gan(class_name="nut", roi=[0, 0, 20, 20])
    with pytest.raises(ValueError, match="`roi` is in pixels of the image files, which the augmentations"):
        engine(tmp_path).test(fixed, datamodule=data, verbose=False)


def test_an_image_without_a_number_has_neither_map_nor_regions(
    april_gan: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = april_gan(class_name="bottle", outputs=["report", "coco"], visualizer=False)
    plain = model.predict

    def predict(images: Tensor, *rest: Any, **options: Any) -> RawPredictions:
        raw = plain(images, *rest, **options)
        nothing = torch.full_like(raw.anomaly_map, torch.nan)
        return raw._replace(text_probability=torch.full_like(raw.text_probability, torch.nan), anomaly_map=nothing)

    monkeypatch.setattr(model, "predict", predict)
    engine(tmp_path).predict(model, data_path=good("bottle"))
    (report,) = tmp_path.rglob("report.html")
    assert read_csv(report.parent / "regions.csv") == read_csv(report.parent / "maps.csv") == []
    assert {row["decision"] for row in read_csv(report.parent / "decisions.csv")} == {"undecided"}
    assert '"undecided"' in report.read_text(encoding="utf-8")
