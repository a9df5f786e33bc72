"""Scores, thresholds and labels, class by class: what a user sets stays, whatever post-processor decides."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.post_processing import PostProcessor
from sklearn.metrics import roc_auc_score

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data import MultiCategoryData

from ..conftest import DATASET
from .runs import by_path, category, engine, good

Build = Callable[..., AprilGAN]
CLASSES = ["bottle", "tile"]
LIMIT = 4 + 4 * 0.5  # what a map is expected to reach: certainty in four stages, half the range of four distances


def categories() -> MultiCategoryData:
    return MultiCategoryData("mvtec", DATASET, CLASSES, eval_batch_size=5, num_workers=0)


@pytest.fixture
def post_processor(april_gan: Build) -> Callable[..., PostProcessor]:
    """Builds a post-processor of the kind that the model has."""
    return type(april_gan().post_processor)


def tested_files() -> Path:
    return DATASET / "bottle" / "test"


# -- what a user has set -----------------------------------------------------------------------------

GIVEN = {"image_threshold": 0.73, "pixel_threshold": 1.1}


def given_values(model: AprilGAN, name: int | str = 0) -> dict[str, float]:
    values = model.post_processor.of_class(name).values()
    return {key: values[key] for key in GIVEN}


@pytest.mark.parametrize("k_shot", [0, 2])
def test_values_of_a_given_post_processor_stay(
    april_gan: Build, post_processor: Callable[..., PostProcessor], tmp_path: Path, k_shot: int
) -> None:
    own = post_processor()
    own.set_values(**GIVEN)
    model = april_gan(k_shot=k_shot, post_processor=own, visualizer=False)
    assert model.post_processor is own
    assert given_values(model) == pytest.approx(GIVEN)
    runner = engine(tmp_path)
    for name in CLASSES:  # another class, other references
        runner.test(model, datamodule=category(name), verbose=False)
        assert given_values(model) == pytest.approx(GIVEN)
    batches = by_path(runner.predict(model, datamodule=category("bottle")))
    assert given_values(model) == pytest.approx(GIVEN)
    model.post_processor.enable_normalization = False
    raw = by_path(runner.predict(model, datamodule=category("bottle")))
    for path, image in batches.items():
        assert image["pred_label"].item() == (raw[path]["pred_score"].item() > GIVEN["image_threshold"])
        assert torch.equal(image["pred_mask"].squeeze(), raw[path]["anomaly_map"].squeeze() > GIVEN["pixel_threshold"])


def test_values_of_a_given_post_processor_stay_without_a_trainer(
    april_gan: Build, post_processor: Callable[..., PostProcessor]
) -> None:
    own = post_processor()
    own.set_values(**GIVEN)
    model = april_gan(post_processor=own, class_name="bottle", k_shot=2, references=str(good("bottle")))
    model.setup("predict")
    assert given_values(model) == pytest.approx(GIVEN)
    model(torch.rand(1, 3, 96, 96))
    assert given_values(model) == pytest.approx(GIVEN)


def test_values_of_a_given_post_processor_hold_for_every_class(
    april_gan: Build, post_processor: Callable[..., PostProcessor], tmp_path: Path
) -> None:
    own = post_processor()
    own.set_values(**GIVEN)
    model = april_gan(post_processor=own, visualizer=False)
    engine(tmp_path).test(model, datamodule=categories(), verbose=False)
    for name in CLASSES:
        assert given_values(model, name) == pytest.approx(GIVEN)


def test_thresholds_hold_without_the_scale(april_gan: Build, post_processor: Callable[..., PostProcessor]) -> None:
    own = post_processor(enable_normalization=False)
    model = april_gan(class_name="bottle", post_processor=own).eval()
    images = torch.rand(6, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = model(images)
        score = raw.pred_score.sort().values
        cut = {"image_threshold": (score[2] + score[3]).item() / 2, "pixel_threshold": raw.anomaly_map.median().item()}
        model.post_processor.set_values(**cut)
        found = model(images)
        model.post_processor.set_values(image_threshold=2.0, pixel_threshold=5.0)
        nothing = model(images)
    assert torch.equal(found.pred_score, raw.pred_score)
    assert torch.equal(found.pred_label, raw.pred_score > cut["image_threshold"])
    assert found.pred_label.sum() == 3
    assert torch.equal(found.pred_mask, raw.anomaly_map > cut["pixel_threshold"])
    assert 0.4 < found.pred_mask.float().mean() < 0.6
    assert not nothing.pred_label.any()
    assert not nothing.pred_mask.any()


def test_learned_thresholds_hold_without_the_scale(april_gan: Build, tmp_path: Path) -> None:
    """Labels are the same, whether or not scores are put on the scale."""
    labels = []
    for is_on in (True, False):
        model = april_gan(k_shot=2, visualizer=False)
        model.post_processor.enable_normalization = is_on
        runner = engine(tmp_path / str(is_on))
        runner.test(model, datamodule=category("bottle"), verbose=False)
        found = by_path(runner.predict(model, datamodule=category("bottle")))
        labels.append({path: (bool(image["pred_label"]), image["pred_mask"]) for path, image in found.items()})
    on_scale, raw = labels
    assert {label for label, _ in raw.values()} == {True, False}
    for path, (label, mask) in raw.items():
        assert label == on_scale[path][0]
        assert torch.equal(mask, on_scale[path][1])


@pytest.mark.parametrize("level", ["image", "pixel"])
def test_sensitivities_by_class_stay(april_gan: Build, tmp_path: Path, level: str) -> None:
    model = april_gan(class_name=CLASSES, visualizer=False)
    runner = engine(tmp_path)
    runner.test(model, datamodule=categories(), verbose=False)
    before = by_path(runner.predict(model, datamodule=categories()))
    setattr(model.post_processor.of_class("tile"), f"{level}_sensitivity", 0.9)
    decided, values = {"image": ("pred_label", "pred_score"), "pixel": ("pred_mask", "anomaly_map")}[level]
    runner.trainer.save_checkpoint(tmp_path / "own.ckpt")
    for again in (model, AprilGAN.load_from_checkpoint(tmp_path / "own.ckpt", visualizer=False)):
        found = by_path(engine(tmp_path / "again").predict(again, datamodule=categories()))
        sensitivities = {name: getattr(again.post_processor.of_class(name), f"{level}_sensitivity") for name in CLASSES}
        assert sensitivities == {"bottle": 0.5, "tile": 0.9}
        for path, image in found.items():
            cut = 0.1 if "/tile/" in path else 0.5
            assert torch.equal(image[decided].squeeze(), image[values].squeeze() > cut)
            assert torch.equal(image[values], before[path][values])
        assert any(not torch.equal(found[path][decided], before[path][decided]) for path in found if "/tile/" in path)


# -- few-shot scores are fused whoever post-processes them -------------------------------------------


def fused_by_hand(build: Build, folder: Path) -> dict[str, tuple[float, bool]]:
    """``0.5 * (text + map maximum / limit)`` from the raw output of a zero-shot and of a one-shot model; and labels.

    The map maximum of a single reference held out is not known, so the scale starts at 0.
    """
    options = {"post_processor": False, "visualizer": False, "evaluator": False}
    text = by_path(engine(folder / "text").predict(build(**options), datamodule=category("bottle")))
    maps = by_path(engine(folder / "map").predict(build(k_shot=1, **options), datamodule=category("bottle")))
    return {
        path: (
            0.5 * (image["pred_score"].item() + maps[path]["anomaly_map"].amax().item() / LIMIT),
            bool(image["gt_label"]),
        )
        for path, image in text.items()
    }


def test_scores_are_fused_without_a_post_processor(april_gan: Build, tmp_path: Path) -> None:
    expected = fused_by_hand(april_gan, tmp_path)
    model = april_gan(k_shot=1, post_processor=False, visualizer=False, evaluator=False)
    found = by_path(engine(tmp_path / "both").predict(model, datamodule=category("bottle")))
    assert found.keys() == expected.keys()
    for path, image in found.items():
        assert image["pred_score"].item() == pytest.approx(expected[path][0], abs=1e-5)


def test_scores_are_fused_for_the_post_processor_of_anomalib(april_gan: Build, tmp_path: Path) -> None:
    scores, labels = zip(*fused_by_hand(april_gan, tmp_path).values(), strict=True)
    model = april_gan(k_shot=1, post_processor=PostProcessor(), visualizer=False)
    (printed,) = engine(tmp_path / "both").test(model, datamodule=category("bottle"), verbose=False)
    assert printed["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    text = april_gan(post_processor=PostProcessor(), visualizer=False)
    (of_text,) = engine(tmp_path / "one").test(text, datamodule=category("bottle"), verbose=False)
    assert printed["image_AUROC"] != of_text["image_AUROC"]  # else nothing would be shown


def test_held_out_references_bound_the_scale_without_a_post_processor(april_gan: Build, tmp_path: Path) -> None:
    """With two references the map is scaled from what they reach, each held out in turn."""
    files = sorted(good("bottle").iterdir())[:2]
    options: dict[str, Any] = {"post_processor": False, "visualizer": False, "evaluator": False, "class_name": "bottle"}

    def predict(model: AprilGAN, path: Path) -> dict[str, dict[str, torch.Tensor]]:
        return by_path(engine(tmp_path).predict(model, data_path=path))

    held_out = [
        next(iter(predict(april_gan(k_shot=1, references=[str(other)], **options), file).values()))[
            "anomaly_map"
        ].amax()
        for file, other in (files, files[::-1])
    ]
    low = min(value.item() for value in held_out)
    text = predict(april_gan(**options), tested_files())
    found = predict(april_gan(k_shot=2, references=[str(file) for file in files], **options), tested_files())
    for path, image in found.items():
        statistic = (image["anomaly_map"].amax().item() - low) / (LIMIT - low)
        expected = 0.5 * (text[path]["pred_score"].item() + statistic)
        assert image["pred_score"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("given", [PostProcessor, lambda: False], ids=["anomalib", "none"])
def test_several_classes_are_fused_as_each_alone(
    april_gan: Build, tmp_path: Path, given: Callable[[], PostProcessor | bool]
) -> None:
    options: dict[str, Any] = {"k_shot": 2, "visualizer": False, "evaluator": False}
    data = tmp_path / "new"
    for name in CLASSES:
        shutil.copytree(DATASET / name / "test", data / name)
    references = {name: str(good(name)) for name in CLASSES}
    model = april_gan(class_name=CLASSES, references=references, post_processor=given(), **options)
    together = by_path(engine(tmp_path / "all").predict(model, data_path=data))
    for name in CLASSES:
        alone = april_gan(class_name=name, references=references[name], post_processor=given(), **options)
        found = by_path(engine(tmp_path / name).predict(alone, data_path=data / name))
        assert len(found) == 11
        for path, image in found.items():
            torch.testing.assert_close(together[path]["pred_score"], image["pred_score"], atol=1e-6, rtol=0)


# -- which class an image is of ----------------------------------------------------------------------


@pytest.mark.parametrize("k_shot", [0, 2])
def test_an_empty_batch_is_of_no_class(april_gan: Build, k_shot: int) -> None:
    references = {"references": {name: str(good(name)) for name in CLASSES}} if k_shot else {}
    model = april_gan(class_name=CLASSES, default_class="tile", k_shot=k_shot, **references).eval()
    for names in ([], "tile", None):
        found = model(torch.empty(0, 3, 70, 90), names)
        assert found.pred_score.shape == found.pred_label.shape == (0,)
        assert found.anomaly_map.shape == found.pred_mask.shape == (0, 96, 96)
    one = april_gan(class_name="tile").eval()(torch.empty(0, 3, 70, 90))
    assert one.pred_score.shape == (0,)
    tiled = april_gan(class_name=CLASSES, tile_size=96).eval()(torch.empty(0, 3, 200, 120), [])
    assert tiled.pred_score.shape == (0,)
    assert tiled.anomaly_map.shape == (0, 200, 120)


def test_the_name_of_a_folder_stands_in_the_prompts(april_gan: Build, tmp_path: Path) -> None:
    """As in training, where the same name is what the datamodule's images are called."""
    folder = Folder(
        name="metal_nut",
        root=DATASET / "metal_nut",
        normal_dir="train/good",
        abnormal_dir="test/hole",
        normal_test_dir="test/good",
        num_workers=0,
    )
    model = april_gan(visualizer=False)
    engine(tmp_path).test(model, datamodule=folder, verbose=False)
    named = april_gan(class_name="metal_nut")
    named.setup("predict")
    assert torch.equal(model.model.text_features, named.model.text_features)


@pytest.mark.parametrize("above", ["tile", "bottle"])
def test_folders_above_the_data_tell_no_class(april_gan: Build, tmp_path: Path, above: str) -> None:
    """Such as a home folder that happens to be called like a class."""
    data = tmp_path / above / "data"
    shutil.copytree(DATASET / "bottle" / "test", data / "parts")
    shutil.copytree(DATASET / "tile" / "test" / "good", data / "tile")
    model = april_gan(class_name=CLASSES, visualizer=False)
    with pytest.raises(ValueError, match=r"parts.*\.png belongs to none of the classes \('bottle', 'tile'\)"):
        engine(tmp_path).predict(model, data_path=data)
    (data / "parts").rename(data / "bottle")
    found = by_path(engine(tmp_path).predict(model, data_path=data))
    alone = april_gan(class_name="bottle", visualizer=False)
    expected = by_path(engine(tmp_path).predict(alone, data_path=data / "bottle"))
    assert len(expected) == 11
    for path, image in expected.items():
        np.testing.assert_allclose(found[path]["pred_score"], image["pred_score"], atol=1e-6)
