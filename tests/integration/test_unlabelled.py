"""References that may be defective, and images that serve each other as such: Engine, checkpoints, exports."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib import LearningType
from anomalib.data import PredictDataset
from torch.utils.data import DataLoader, Subset

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data import MultiCategoryData
from anomalib_aprilgan.runtime.openvino_core import compiled

from ..conftest import DATASET
from .runs import by_path, category, engine, good, read

Build = Callable[..., AprilGAN]
RAW: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
UNLABELLED: dict[str, Any] = {"class_name": "bottle", "references_unlabelled": True}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of eight bottles, two of them defective."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    files = sorted(good("bottle").iterdir()) + sorted((DATASET / "bottle" / "test" / "good").iterdir())
    for number, file in enumerate(files[:6]):
        shutil.copy(file, folder / f"good {number}.png")
    for number, file in enumerate(sorted((DATASET / "bottle" / "test" / "hole").iterdir())[:2]):
        shutil.copy(file, folder / f"hole {number}.png")
    assert len(list(folder.iterdir())) == 8
    return folder


def raw_maps(model: AprilGAN, folder: Path, runs: Path, **options: Any) -> dict[str, torch.Tensor]:
    """By file name, the raw map of each image of a folder."""
    found = engine(runs).predict(model, dataset=PredictDataset(folder), **options)
    return {Path(path).name: image["anomaly_map"] for path, image in by_path(found or []).items()}


class TestUnlabelledReferences:
    def test_an_image_of_the_bank_is_judged_by_the_others(self, april_gan: Build, mixed: Path, tmp_path: Path) -> None:
        model = april_gan(**UNLABELLED, k_shot=8, references=str(mixed), **RAW)
        found = raw_maps(model, mixed, tmp_path / "runs")
        assert len(found) == 8
        for file in sorted(mixed.iterdir())[:3]:
            others = [str(other) for other in sorted(mixed.iterdir()) if other != file]
            alone = april_gan(**UNLABELLED, k_shot=7, references=others, **RAW).eval()
            with torch.no_grad():
                torch.testing.assert_close(found[file.name], alone(read(file)).anomaly_map[0], atol=1e-5, rtol=0)

    def test_one_image_and_no_trim_is_the_one_shot_bank(self, april_gan: Build, mixed: Path) -> None:
        """The same image three times is one; the model takes no fewer than three."""
        file = sorted(mixed.iterdir())[0]
        once = april_gan(class_name="bottle", k_shot=1, references=[str(file)], **RAW)
        thrice = april_gan(**UNLABELLED, k_shot=3, references=[str(file)] * 3, lowest_share=1.0, **RAW)
        for model in (once, thrice):
            model.setup("predict")
        other = read(sorted(mixed.iterdir())[1])
        with torch.no_grad():
            torch.testing.assert_close(
                thrice.predict(other).anomaly_map, once.predict(other).anomaly_map, atol=1e-6, rtol=0
            )

    def test_pixels_are_cut_above_the_maps_of_those_taken_for_good(self, april_gan: Build, mixed: Path) -> None:
        model = april_gan(**UNLABELLED, k_shot=8, references=str(mixed), contamination=0.25)
        model.setup("predict")
        files = [Path(file) for file in model.made.references["bottle"]]
        with torch.no_grad():
            maxima = [model.predict(read(file), without=[n]).anomaly_map.amax().item() for n, file in enumerate(files)]
        assert model.post_processor.values()["pixel_threshold"] == pytest.approx(sorted(maxima)[5], abs=1e-5)

    def test_another_stated_share_is_calibrated_anew_and_keeps_the_bank(
        self, april_gan: Build, mixed: Path, tmp_path: Path
    ) -> None:
        given = {**UNLABELLED, "k_shot": 8, "references": str(mixed), "false_positive_rate": 0.05}
        runner, model = engine(tmp_path / "runs"), april_gan(**given, calibration="references")
        runner.predict(model, dataset=PredictDataset(mixed))
        runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
        other = AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt", contamination=0.0)
        bank = other.model.few_shot.features(0)
        raw_maps(other, mixed, tmp_path / "again")
        assert other.model.few_shot.features(0) is bank
        assert other.post_processor.values() != model.post_processor.values()
        for name, value in {"lowest_share": 0.5, "memory_dtype": "float16"}.items():
            with pytest.raises(ValueError, match=f"`{name}` of the checkpoint is"):
                AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt", **{name: value})

    def test_fewer_images_than_asked_for_are_refused(self, april_gan: Build, mixed: Path) -> None:
        with pytest.raises(ValueError, match="`k_shot` must be at most the 8 normal images in"):
            april_gan(**UNLABELLED, k_shot=9, references=str(mixed)).setup("predict")


class TestBatchZeroShot:
    def test_images_are_compared_with_each_other_in_whatever_order(
        self, april_gan: Build, mixed: Path, tmp_path: Path
    ) -> None:
        model = april_gan(class_name="bottle", batch_zero_shot=True, **RAW)
        assert model.learning_type == LearningType.ZERO_SHOT
        found = raw_maps(model, mixed, tmp_path / "runs")
        fixed = april_gan(**UNLABELLED, k_shot=8, references=str(mixed), **RAW)
        expected = raw_maps(fixed, mixed, tmp_path / "fixed")
        data, order = PredictDataset(mixed), [5, 2, 7, 0, 1, 6, 4, 3]
        again = april_gan(class_name="bottle", batch_zero_shot=True, **RAW)
        loader = DataLoader(Subset(data, order), batch_size=3, collate_fn=data.collate_fn)
        turned = by_path(engine(tmp_path / "turned").predict(again, dataloaders=loader) or [])
        turned_maps = {Path(path).name: image["anomaly_map"] for path, image in turned.items()}
        assert found.keys() == expected.keys() == turned_maps.keys()
        for name, one in found.items():
            torch.testing.assert_close(one, expected[name], atol=1e-6, rtol=0)
            torch.testing.assert_close(one, turned_maps[name], atol=1e-5, rtol=0)

    def test_the_bank_is_bounded_and_drawn_by_the_seed(self, april_gan: Build, mixed: Path, tmp_path: Path) -> None:
        drawn = []
        for seed in (0, 0, 1):
            model = april_gan(class_name="bottle", batch_zero_shot=True, k_shot=4, seed=seed, **RAW)
            raw_maps(model, mixed, tmp_path / "runs")
            assert model.model.few_shot.number(0) == 4
            drawn.append(model.made.references["bottle"])
        assert drawn[0] == drawn[1] != drawn[2]

    def test_every_run_has_its_own_bank_and_thresholds_stay(
        self, april_gan: Build, mixed: Path, tmp_path: Path
    ) -> None:
        model, runner = april_gan(batch_zero_shot=True, k_shot=6), engine(tmp_path / "runs")
        runner.validate(model, datamodule=category("bottle"), verbose=False)
        learned, files = model.post_processor.values(), model.made.references["bottle"]
        runner.test(model, datamodule=category("bottle"), verbose=False)
        runner.predict(model, dataset=PredictDataset(mixed))
        assert model.post_processor.values() == learned
        assert {Path(file).parent for file in model.made.references["bottle"]} == {mixed}
        assert {Path(file).parent for file in files} != {mixed}
        bank = model.model.few_shot.features(0)
        runner.predict(model, dataset=PredictDataset(mixed))
        assert model.model.few_shot.features(0) is bank  # the same images

    def test_a_checkpoint_holds_no_images_under_inspection(self, april_gan: Build, mixed: Path, tmp_path: Path) -> None:
        model, runner = april_gan(class_name="bottle", batch_zero_shot=True), engine(tmp_path / "runs")
        runner.predict(model, dataset=PredictDataset(mixed))
        runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
        content = torch.load(tmp_path / "model.ckpt", weights_only=False)
        assert not [name for name in content["state_dict"] if "few_shot" in name]
        loaded = AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt")
        found = engine(tmp_path / "again").predict(loaded, dataset=PredictDataset(mixed))
        expected = by_path(runner.predict(model, dataset=PredictDataset(mixed)) or [])
        for path, image in by_path(found or []).items():
            torch.testing.assert_close(image["pred_score"], expected[path]["pred_score"], atol=1e-5, rtol=0)

    def test_several_classes_are_compared_within_themselves(self, april_gan: Build, tmp_path: Path) -> None:
        model = april_gan(class_name=["bottle", "tile"], batch_zero_shot=True, k_shot=3, **RAW)
        runner = engine(tmp_path / "runs")
        runner.test(
            model, datamodule=MultiCategoryData("mvtec", DATASET, ["bottle", "tile"], num_workers=0), verbose=False
        )
        folders = {name: {Path(file).parts[-4] for file in files} for name, files in model.made.references.items()}
        assert folders == {"bottle": {"bottle"}, "tile": {"tile"}}

    def test_damaged_files_do_not_count(self, april_gan: Build, mixed: Path, tmp_path: Path) -> None:
        (mixed / "a broken.png").write_bytes(b"broken")
        model = april_gan(class_name="bottle", batch_zero_shot=True)
        engine(tmp_path / "runs").predict(model, dataset=PredictDataset(mixed))
        assert model.model.few_shot.number(0) == 8
        (table,) = (tmp_path / "runs").rglob("decisions.csv")
        with table.open(newline="") as file:
            decisions = {Path(row["image_path"]).name: row["decision"] for row in csv.DictReader(file)}
        assert decisions["a broken.png"] == "unreadable"
        assert len(decisions) == 9

    def test_bad_input(self, april_gan: Build, mixed: Path, tmp_path: Path) -> None:
        model = april_gan(class_name="bottle", batch_zero_shot=True)
        with pytest.raises(ValueError, match="`batch_zero_shot` compares the image files of a test or prediction"):
            model(torch.rand(1, 3, 96, 96))
        few = tmp_path / "few"
        few.mkdir()
        for file in sorted(mixed.iterdir())[:2]:
            shutil.copy(file, few)
        with pytest.raises(ValueError, match=r"`batch_zero_shot` .* images of 'bottle' .* at least 3 .*; got 2"):
            engine(tmp_path / "runs").predict(model, dataset=PredictDataset(few))


BANKS: dict[str, dict[str, Any]] = {
    "unlabelled": {"k_shot": 5, "references_unlabelled": True, "lowest_share": 0.5},
    "coreset": {"k_shot": 3, "memory_size": 60},
    "half precision": {"k_shot": 3, "memory_dtype": "float16"},
    "bounded in half precision": {"k_shot": 3, "memory_size": 60, "memory_dtype": "float16"},
    "with accepted parts": {"k_shot": 2},
}
PARTLY = {"coreset", "half precision"}  # "bounded in half precision" is both


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in PARTLY else kind for kind in BANKS]
)
def test_exports_agree_with_torch(april_gan: Build, kind: str, tmp_path: Path) -> None:
    model = april_gan(class_name="bottle", references=str(good("bottle")), **BANKS[kind])
    model.setup("predict")
    if kind == "with accepted parts":
        model.accept(str(sorted((DATASET / "bottle" / "test" / "good").iterdir())[0]))
    model.post_processor.enable_normalization = False  # the tolerances are about raw numbers
    onnx = model.eval().to_onnx(tmp_path)
    session = onnxruntime.InferenceSession(onnx)
    names = [output.name for output in session.get_outputs()]
    graph = compiled(onnx)
    reference = read(sorted(good("bottle").iterdir())[0])  # itself in the bank, perhaps
    accepted = read(sorted((DATASET / "bottle" / "test" / "good").iterdir())[0])
    images = torch.cat([reference, accepted, read(sorted((DATASET / "bottle" / "test" / "hole").iterdir())[0])])
    with torch.no_grad():
        expected = model(images)
    for found in (
        dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True)),
        {name: graph(images.numpy())[name] for name in names},
    ):
        np.testing.assert_allclose(found["pred_score"], expected.pred_score.numpy(), atol=1e-5)
        np.testing.assert_allclose(found["anomaly_map"].squeeze(), expected.anomaly_map.numpy().squeeze(), atol=1e-4)


def test_a_bounded_bank_travels_in_a_checkpoint(april_gan: Build, tmp_path: Path) -> None:
    given = {"class_name": "bottle", "references": str(good("bottle")), **BANKS["bounded in half precision"]}
    model, runner = april_gan(**given), engine(tmp_path / "runs")
    runner.test(model, datamodule=category("bottle"), verbose=False)
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    content = torch.load(tmp_path / "model.ckpt", weights_only=False)
    tensors = {name: value for name, value in content["state_dict"].items() if "few_shot" in name}
    assert {name.rpartition(".")[2]: value.dtype for name, value in tensors.items()} == {
        "features": torch.float16,
        "coreset": torch.float16,
        "coreset_images": torch.int32,
    }
    assert sum(value.nbytes for value in tensors.values()) == 60 * 4 * (64 * 2 + 4)
    loaded = AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt")
    image = read(sorted(good("bottle").iterdir())[0])
    loaded.setup("predict")
    with torch.no_grad():
        torch.testing.assert_close(loaded.predict(image).anomaly_map, model.predict(image).anomaly_map)
    with pytest.raises(ValueError, match="`memory_size` of the checkpoint is 60, of the model 61"):
        AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt", memory_size=61)
    with pytest.raises(ValueError, match=r"`memory_size` must be at most the 432 patches .*, got 433"):
        april_gan(**given | {"memory_size": 433}).setup("predict")
