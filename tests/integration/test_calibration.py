"""Thresholds from normal images alone: in the Engine, through checkpoints and exports, for several classes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from PIL import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor

from ..conftest import DATASET

Build = Callable[..., AprilGAN]
SHARE = 0.25  # 4 pictures are enough for it


def engine(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, enable_progress_bar=False)


def good(category: str) -> list[str]:
    return [str(path) for path in sorted((DATASET / category / "train" / "good").iterdir())]


def post_processor(model: AprilGAN) -> AprilGANPostProcessor:
    assert isinstance(model.post_processor, AprilGANPostProcessor)
    return model.post_processor


def images_of(files: list[str]) -> torch.Tensor:
    pictures = [np.array(Image.open(file).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255.0


@pytest.fixture
def calibrated(april_gan: Build) -> AprilGAN:
    model = april_gan(
        class_name="bottle",
        k_shot=2,
        references=good("bottle")[:2],
        calibration="references",
        false_positive_rate=SHARE,
    )
    model.setup("predict")
    return model


def test_flags_the_requested_share(april_gan: Build) -> None:
    """A quarter of the very images that the thresholds come from, to within the interpolation of a quantile."""
    files = good("bottle")
    for shots in ({}, {"k_shot": 1, "references": files[:1]}):
        model = april_gan(class_name="bottle", calibration=files, false_positive_rate=SHARE, **shots)
        model.setup("predict")
        held_out = images_of(files[len(shots) and 1 :])
        result = model(held_out)
        number = len(held_out)
        assert abs(result.pred_label.sum().item() - SHARE * number) <= 1.0
        assert torch.equal(result.pred_label, result.pred_score > 0.5)
        assert abs(result.pred_mask.flatten(1).any(dim=1).sum().item() - SHARE * number) <= 1.0


def test_half_is_the_threshold_and_the_ends_are_fixed(calibrated: AprilGAN) -> None:
    values = post_processor(calibrated).values()
    limit = 4.0 + 0.5 * 4.0  # four stages, each certain, and half the distance of four
    fixed = {"image_min": 0.0, "image_max": 1.0, "pixel_min": 0.0, "pixel_max": limit}
    fixed |= {"map_maximum_min": 0.0, "map_maximum_max": limit}
    assert {name: values[name] for name in fixed} == fixed
    assert 0.0 < values["image_threshold"] < 1.0
    assert 0.0 < values["pixel_threshold"] < limit
    images = images_of(good("bottle"))
    before = calibrated(images)
    # A threshold set by name, just below and above a score, decides about it.
    raw = calibrated.model(calibrated.pre_processor(images))  # type: ignore[misc]
    fusion = post_processor(calibrated).fusion
    fused = fusion(raw.pred_score, fusion.statistic(raw.anomaly_map))
    for offset, label in ((-1e-4, True), (1e-4, False)):
        post_processor(calibrated).set_values(image_threshold=fused[0].item() + offset)
        assert bool(calibrated(images).pred_label[0]) is label
    post_processor(calibrated).set_values(**values)
    torch.testing.assert_close(calibrated(images).pred_score, before.pred_score)


def test_one_image_at_a_time(calibrated: AprilGAN) -> None:
    images = images_of(good("bottle"))
    together = calibrated(images)
    alone = [calibrated(image[None]) for image in images]
    torch.testing.assert_close(torch.cat([one.pred_score for one in alone]), together.pred_score, atol=1e-6, rtol=0)


def test_engine_does_not_learn_other_thresholds(calibrated: AprilGAN, tmp_path: Path) -> None:
    before = post_processor(calibrated).values()
    data, runner = MVTecAD(root=DATASET, category="bottle", num_workers=0), engine(tmp_path)
    runner.validate(calibrated, datamodule=data)
    assert post_processor(calibrated).values() == before
    (metrics,) = runner.test(calibrated, datamodule=data, verbose=False)
    assert post_processor(calibrated).values() == before
    assert 0.0 <= metrics["image_AUROC"] <= 1.0


def test_engine_calibrates_by_itself_and_checkpoints_keep_it(april_gan: Build, tmp_path: Path) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    for file in good("bottle"):
        shutil.copy(file, folder)
    arguments: dict[str, Any] = {
        "class_name": "bottle",
        "k_shot": 2,
        "references": str(folder),
        "calibration": str(folder),
        "false_positive_rate": 0.4,
    }
    model, runner = april_gan(**arguments), engine(tmp_path)
    before = runner.predict(model, data_path=DATASET / "bottle" / "test" / "hole")
    assert before is not None
    values = post_processor(model).values()
    assert values["image_threshold"] != 0.5
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    shutil.rmtree(folder)  # the checkpoint has what is needed

    for fresh in (AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt"), april_gan(class_name="bottle", k_shot=2)):
        path = None if fresh.settings.calibration else tmp_path / "model.ckpt"
        after = engine(tmp_path / "after").predict(
            fresh, data_path=DATASET / "bottle" / "test" / "hole", ckpt_path=path
        )
        assert after is not None
        assert post_processor(fresh).values() == values
        for ours, theirs in zip(after, before, strict=True):
            torch.testing.assert_close(ours.pred_score, theirs.pred_score, atol=1e-6, rtol=0)


def test_other_references_are_calibrated_anew(calibrated: AprilGAN) -> None:
    before = post_processor(calibrated).values()
    calibrated.setup("predict")
    assert post_processor(calibrated).values() == before
    calibrated.settings = replace(calibrated.settings, references=good("bottle")[2:4])
    calibrated.setup("predict")
    assert post_processor(calibrated).values()["image_threshold"] != before["image_threshold"]


def test_classes_are_calibrated_like_models_of_one(april_gan: Build) -> None:
    names = ["bottle", "tile"]
    given = {name: good(name)[:2] for name in names}
    arguments: dict[str, Any] = {"k_shot": 2, "calibration": "references", "false_positive_rate": SHARE}
    many = april_gan(class_name=names, references=given, **arguments)
    many.setup("predict")
    for name in names:
        one = april_gan(class_name=name, references=given[name], **arguments)
        one.setup("predict")
        theirs = post_processor(one).values()
        assert post_processor(many).of_class(name).values() == pytest.approx(theirs, abs=1e-6)
    with pytest.raises(ValueError, match="ask `of_class` for one of bottle, tile"):
        post_processor(many).set_values(image_threshold=0.5)
    with pytest.raises(ValueError, match="`name` must be one of bottle, tile, got 'nut'"):
        post_processor(many).of_class("nut")


def test_tiles(april_gan: Build) -> None:
    arguments: dict[str, Any] = {"class_name": "bottle", "k_shot": 2, "references": good("bottle")[:2]}
    model = april_gan(tile_size=96, calibration="references", false_positive_rate=SHARE, **arguments)
    model.setup("predict")
    assert model.model.few_shot.number(0) > 2
    result = model(images_of(good("bottle")[:1]))
    assert torch.equal(result.pred_label, result.pred_score > 0.5)
    assert post_processor(model).values()["image_threshold"] not in {0.0, 0.5}


def test_exports_carry_the_thresholds(calibrated: AprilGAN, tmp_path: Path) -> None:
    images = images_of(good("bottle"))
    ours, values = calibrated(images), post_processor(calibrated).values()
    exported = torch.load(calibrated.to_torch(tmp_path), weights_only=False)["model"]  # our own file
    torch.testing.assert_close(exported(images).pred_score, ours.pred_score)
    assert exported.post_processor.values() == values
    exported.post_processor.set_values(image_threshold=0.999)
    assert not exported(images).pred_label.any()


def test_bad_input(april_gan: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`calibration='references'` needs `k_shot` and `references`"):
        april_gan(calibration="references")
    with pytest.raises(ValueError, match="`calibration` sets the thresholds of an AprilGANPostProcessor"):
        april_gan(calibration=str(tmp_path), post_processor=False)
    with pytest.raises(ValueError, match=r"has 4 normal images of 'bottle'.* 0.01 needs at least 99"):
        april_gan(class_name="bottle", calibration=good("bottle")[:4]).setup("predict")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"`calibration`: .*broken\.png"):
        april_gan(class_name="bottle", calibration=[str(broken)], false_positive_rate=0.5).setup("predict")
    model = april_gan(class_name="bottle")
    with pytest.raises(ValueError, match=r"finite numbers for some of image_min, .*, got threshold=0\.5"):
        post_processor(model).set_values(threshold=0.5)
    with pytest.raises(ValueError, match="got image_threshold=nan"):
        post_processor(model).set_values(image_threshold=float("nan"))


class TestWhatAScoreMeans:
    def test_p_values_are_in_the_table_and_on_the_batch(self, april_gan: Build, tmp_path: Path) -> None:
        files = good("bottle")
        given = {"class_name": "bottle", "k_shot": 2, "references": files[:2], "calibration": files[2:]}
        model = april_gan(**given, false_positive_rate=SHARE)
        folder = DATASET / "bottle" / "test" / "good"
        batches = engine(tmp_path).predict(model, data_path=folder) or []
        held_out = post_processor(model).of_class(0).good_parts()[0]
        assert len(held_out) == len(files) - 2
        expected = {
            path: (1 + int((held_out >= raw).sum())) / (1 + len(held_out))
            for batch in batches
            for path, raw in zip(batch.image_path, batch.raw_score, strict=True)
        }
        assert {
            path: value
            for batch in batches
            for path, value in zip(batch.image_path, batch.p_value.tolist(), strict=True)
        } == pytest.approx(expected)
        (table,) = tmp_path.rglob("decisions.csv")
        rows = pd.read_csv(table, keep_default_na=False)
        assert list(rows.columns) == ["image_path", "class_name", "score", "decision", "p_value", "drift"]
        assert dict(zip(rows.image_path, rows.p_value.astype(float), strict=True)) == pytest.approx(expected, rel=1e-5)
        assert set(rows.drift) == {""}  # too few images

    def test_a_test_has_p_values_and_labels(self, april_gan: Build, tmp_path: Path) -> None:
        files = good("bottle")
        model = april_gan(class_name="bottle", calibration=files, false_positive_rate=SHARE)
        engine(tmp_path).test(model, datamodule=MVTecAD(root=DATASET, category="bottle", num_workers=0), verbose=False)
        (table,) = tmp_path.rglob("decisions.csv")
        rows = pd.read_csv(table)
        assert list(rows.columns) == ["image_path", "class_name", "score", "decision", "label", "p_value"]
        assert rows.p_value.between(1 / (1 + len(files)) - 1e-6, 1).all()

    @pytest.mark.parametrize("calibration", [None, "references"])
    def test_without_held_out_parts_there_are_none(
        self, april_gan: Build, calibration: str | None, tmp_path: Path
    ) -> None:
        files = good("bottle")
        given = {"class_name": "bottle", "k_shot": 2, "references": files[:2], "calibration": calibration}
        model = april_gan(**given, false_positive_rate=SHARE)
        batches = engine(tmp_path).predict(model, data_path=DATASET / "bottle" / "test" / "good") or []
        assert {batch.p_value for batch in batches} == {None}
        (table,) = tmp_path.rglob("decisions.csv")
        assert list(pd.read_csv(table).columns) == ["image_path", "class_name", "score", "decision"]

    def test_good_parts_travel_in_a_checkpoint(self, april_gan: Build, tmp_path: Path) -> None:
        files = good("bottle")
        model = april_gan(class_name="bottle", calibration=files, false_positive_rate=SHARE)
        runner = engine(tmp_path)
        runner.predict(model, data_path=DATASET / "bottle" / "test" / "good")
        runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
        for other in (
            AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt"),
            april_gan(class_name="bottle", calibration=files, false_positive_rate=SHARE),
        ):
            batches = engine(tmp_path / "again").predict(
                other, data_path=DATASET / "bottle" / "test" / "good", ckpt_path=tmp_path / "model.ckpt"
            )
            assert all(batch.p_value.isfinite().all() for batch in batches or [])
            for ours, theirs in zip(
                post_processor(model).of_class(0).good_parts(),
                post_processor(other).of_class(0).good_parts(),
                strict=True,
            ):
                assert torch.equal(ours, theirs)

    def test_other_light_is_told_once_and_changes_no_decision(self, april_gan: Build, tmp_path: Path) -> None:
        source, draw = np.array(Image.open(good("bottle")[0]).convert("RGB")), np.random.default_rng(0)
        for name, light, number in (("held out", 1.0, 40), ("new", 1.0, 60), ("new", 0.8, 60)):
            (tmp_path / name).mkdir(exist_ok=True)
            for _ in range(number):
                pixels = source * light * draw.normal(1.0, 0.03) + draw.normal(0, 4, source.shape)
                file = tmp_path / name / f"{len(list((tmp_path / name).iterdir())):03}.png"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
        given = {"class_name": "bottle", "calibration": str(tmp_path / "held out"), "false_positive_rate": 0.05}
        with pytest.warns(UserWarning, match="Drift of 'bottle' at image ") as warned:
            batches = engine(tmp_path / "runs").predict(
                april_gan(**given, visualizer=False), data_path=tmp_path / "new"
            )
        assert len([one for one in warned if "Drift of" in str(one.message)]) == 1
        (table,) = (tmp_path / "runs").rglob("decisions.csv")
        rows = pd.read_csv(table, keep_default_na=False)
        assert set(rows.drift[:49]) == {""}
        assert set(rows.drift[49:60]) == {"no"}
        assert all("light" in word for word in rows.drift[110:])
        labels = [label for batch in batches or [] for label in batch.pred_label.tolist()]
        assert [decision == "anomalous" for decision in rows.decision] == labels
