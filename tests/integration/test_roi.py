"""What lies outside a region of interest changes nothing: whole runs, tiles, calls, exports, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data import MVTecAD
from PIL import Image, ImageDraw

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.runtime.openvino_core import compiled

from .runs import by_path, category, engine, good, read

Build = Callable[..., AprilGAN]
BOX = [12, 20, 70, 88]

KINDS: dict[str, dict[str, Any]] = {
    "zero-shot": {},
    "few-shot": {"k_shot": 2},
    "calibrated": {"k_shot": 2, "calibration": "references", "false_positive_rate": 0.1},
    "top share": {"k_shot": 2, "top_share": 0.02, "smoothing_sigma": 2.0},
    "tiles": {"k_shot": 2, "tile_size": 64},
    "unlabelled": {"k_shot": 3, "references_unlabelled": True},
}


def size_of(folder: Path) -> tuple[int, int]:
    return Image.open(next(folder.glob("*.png"))).size


def spoil(source: Path, folder: Path, box: list[int]) -> Path:
    """Copies of images with a defect outside a box, up to its border."""
    folder.mkdir(parents=True)
    for file in sorted(source.glob("*.png")):
        image = Image.open(file).convert("RGB")
        spoiled = image.copy()
        pen = ImageDraw.Draw(spoiled)
        pen.rectangle((0, 0, image.width, box[1] - 1), fill=(255, 0, 255))
        pen.rectangle((box[2], 0, image.width, image.height), fill=(0, 255, 0))
        spoiled.save(folder / file.name)
    return folder


def roi_of(folder: Path) -> list[int]:
    width, height = size_of(folder)
    return [width // 5, height // 4, width * 3 // 4, height * 7 // 8]


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_outside_changes_no_bit(april_gan: Build, tmp_path: Path, kind: str) -> None:
    source, box = good("bottle"), roi_of(good("bottle"))
    spoiled = spoil(source, tmp_path / "spoiled", box)
    found = []
    for folder in (source, spoiled):
        references = [str(file) for file in sorted(folder.glob("*.png"))][: KINDS[kind].get("k_shot", 0)] or None
        model = april_gan(class_name="bottle", roi=box, references=references, visualizer=False, **KINDS[kind])
        runner = engine(tmp_path / "runs" / folder.name)
        batches = runner.predict(model, data_path=folder, return_predictions=True)
        found.append(({Path(path).name: one for path, one in by_path(batches).items()}, model))
    (first, one), (second, other) = found
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert all(torch.equal(value, second[name][field]) for field, value in values.items())
        assert values["anomaly_map"].max() > 0
    assert one.post_processor.values() == other.post_processor.values()
    width, height = size_of(source)
    anomaly_map = first[next(iter(first))]["anomaly_map"]
    top = int(box[1] / height * anomaly_map.shape[0])
    right = int(np.ceil(box[2] / width * anomaly_map.shape[1]))
    assert anomaly_map[:top].count_nonzero() == anomaly_map[:, right:].count_nonzero() == 0


def test_without_a_region_the_same_defect_counts(april_gan: Build, tmp_path: Path) -> None:
    spoiled = spoil(good("bottle"), tmp_path / "spoiled", roi_of(good("bottle")))
    model = april_gan(class_name="bottle")
    model.setup("predict")
    name = next(spoiled.glob("*.png")).name
    scores = [model.eval()(read(folder / name)).pred_score.item() for folder in (good("bottle"), spoiled)]
    assert scores[0] != scores[1]


@pytest.mark.thorough
def test_exports_hold_the_region(april_gan: Build, tmp_path: Path) -> None:
    source, box = good("bottle"), roi_of(good("bottle"))
    model = april_gan(class_name="bottle", roi=box, k_shot=2, references=str(source))
    model.eval()
    name = sorted(source.glob("*.png"))[-1].name
    images = [read(source / name), read(spoil(source, tmp_path / "spoiled", box) / name)]
    expected = model(images[0])
    assert torch.equal(expected.pred_score, model(images[1]).pred_score)
    path = model.to_onnx(tmp_path)
    session = onnxruntime.InferenceSession(path)
    graph = compiled(path)
    names = [output.name for output in session.get_outputs()]
    for run in (
        lambda image: dict(zip(names, session.run(None, {session.get_inputs()[0].name: image}), strict=True)),
        lambda image: {output.any_name: values for output, values in graph(image).items()},
    ):
        first, second = (run(image.numpy()) for image in images)
        assert all(np.array_equal(value, second[field]) for field, value in first.items())
        assert np.abs(first["pred_score"].ravel() - expected.pred_score.detach().numpy()).max() < 1e-5
        assert np.abs(first["anomaly_map"].squeeze() - expected.anomaly_map[0].detach().numpy()).max() < 1e-4


def test_each_class_has_its_own_and_others_none(april_gan: Build, tmp_path: Path) -> None:
    box = roi_of(good("bottle"))
    model = april_gan(class_name=["bottle", "tile"], roi={"bottle": box})
    model.eval()
    image = read(next(good("bottle").glob("*.png")))
    together = model(torch.cat([image, image]), ["bottle", "tile"])
    alone = april_gan(class_name="tile").eval()(image)
    assert (together.anomaly_map[0] == 0).sum() > together.anomaly_map[0].numel() // 2
    assert torch.allclose(together.anomaly_map[1], alone.anomaly_map[0], atol=1e-6)


def test_a_checkpoint_brings_the_region_also_where_the_mask_is_gone(april_gan: Build, tmp_path: Path) -> None:
    source, box = good("bottle"), roi_of(good("bottle"))
    mask = Image.new("L", size_of(source))
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    mask.save(tmp_path / "mask.png")
    given = {"class_name": "bottle", "k_shot": 2, "references": str(source), "visualizer": False}
    model, runner = april_gan(roi=str(tmp_path / "mask.png"), **given), engine(tmp_path / "run")
    runner.predict(model, data_path=source, return_predictions=False)
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    (tmp_path / "mask.png").unlink()
    image = read(sorted(source.glob("*.png"))[-1])
    loaded = AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu").eval()
    assert torch.equal(loaded(image).anomaly_map, model.eval()(image).anomaly_map)
    plain = april_gan(**given)  # one that asks for no region takes that of the checkpoint
    engine(tmp_path / "again").predict(plain, data_path=source, ckpt_path=tmp_path / "model.ckpt")
    assert torch.equal(plain.eval()(image).anomaly_map, model(image).anomaly_map)


def test_another_region_makes_the_memory_bank_and_the_bounds_anew(april_gan: Build, tmp_path: Path) -> None:
    source, box = good("bottle"), roi_of(good("bottle"))
    given = {"class_name": "bottle", "k_shot": 2, "references": str(source), "visualizer": False}
    without, runner = april_gan(**given), engine(tmp_path / "run")
    runner.predict(without, data_path=source, return_predictions=False)
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    fresh = april_gan(roi=box, **given)
    engine(tmp_path / "fresh").predict(fresh, data_path=source)
    loaded = april_gan(roi=box, **given)
    engine(tmp_path / "loaded").predict(loaded, data_path=source, ckpt_path=tmp_path / "model.ckpt")
    assert torch.equal(loaded.model.few_shot.features(0), fresh.model.few_shot.features(0))
    assert not torch.equal(loaded.model.few_shot.features(0), without.model.few_shot.features(0))
    assert loaded.post_processor.values() == fresh.post_processor.values() != without.post_processor.values()


def test_labels_and_masks_outside_do_not_count(april_gan: Build, tmp_path: Path) -> None:
    data: MVTecAD = category("bottle")
    data.setup()
    corner = [0, 0, 8, 8]
    model = april_gan(class_name="bottle", roi=corner, visualizer=False)
    runner = engine(tmp_path)
    runner.test(model, datamodule=category("bottle"), verbose=False)
    (table,) = tmp_path.rglob("decisions.csv")
    text = table.read_text()
    masks = [np.asarray(Image.open(path))[:8, :8] for path in data.test_data.samples.mask_path if path]
    defects = sum(bool((mask > 0).any()) for mask in masks)
    assert text.count('"anomalous"\n') == defects < len(masks)


class TestBadInput:
    @pytest.mark.parametrize(
        ("roi", "text"),
        [
            ([0, 0, 5000, 10], r"`roi`: the point \[5000, 0\] lies outside the images"),
            ([3.0, 3.0, 4.0, 4.0], "`roi` is too narrow: at `image_size`"),
            (
                {"bottle": [0, 0, 50, 50], "can": [0, 0, 50, 50]},
                "`roi` is given for 'can', which is none of the classes",
            ),
        ],
    )
    def test_regions_that_fit_no_image(self, april_gan: Build, tmp_path: Path, roi: Any, text: str) -> None:
        model = april_gan(class_name="bottle", roi=roi)
        with pytest.raises(ValueError, match=text):
            engine(tmp_path).predict(model, data_path=good("bottle"))

    def test_images_of_another_size(self, april_gan: Build, tmp_path: Path) -> None:
        for number, size in enumerate([(100, 80), (100, 81)]):
            Image.new("RGB", size, (90, 90, 90)).save(tmp_path / f"{number}.png")
        model = april_gan(class_name="bottle", roi=[0, 0, 60, 60])
        with pytest.raises(ValueError, match=r"`roi` is for images of 100 x 80 pixels, and .*1.png has 100 x 81"):
            engine(tmp_path / "run").predict(model, data_path=tmp_path)
        ready = april_gan(class_name="bottle", roi=[0, 0, 60, 60]).eval()
        ready(torch.rand(1, 3, 80, 100))
        with pytest.raises(ValueError, match="`roi` is for images of 100 x 80 pixels, and an image has 90 x 80"):
            ready(torch.rand(1, 3, 80, 90))

    def test_a_reference_of_another_size(self, april_gan: Build, tmp_path: Path) -> None:
        Image.new("RGB", (33, 44)).save(tmp_path / "reference.png")
        references = [str(tmp_path / "reference.png")]
        model = april_gan(class_name="bottle", roi=roi_of(good("bottle")), k_shot=1, references=references)
        with pytest.raises(ValueError, match=r"`roi` is for images of .* a normal image has 33 x 44"):
            engine(tmp_path / "run").predict(model, data_path=good("bottle"))

    def test_nothing_tells_the_size_of_an_export(self, april_gan: Build, tmp_path: Path) -> None:
        model = april_gan(class_name="bottle", roi=[0, 0, 60, 60])
        with pytest.raises(ValueError, match="nothing tells the size of the images: inspect one first, or give a mask"):
            model.to_onnx(tmp_path)

    def test_a_damaged_region_in_a_checkpoint(self, april_gan: Build, tmp_path: Path) -> None:
        model, runner = april_gan(class_name="bottle", roi=roi_of(good("bottle"))), engine(tmp_path)
        runner.predict(model, data_path=good("bottle"), return_predictions=False)
        runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
        content = torch.load(tmp_path / "model.ckpt", weights_only=False)
        content["state_dict"]["model.roi.of_class.0.inside"] = torch.ones(5, 5, dtype=torch.bool)
        torch.save(content, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match="`ckpt_path`: the region of interest of class 0 must be a mask of"):
            AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt")
