"""What a run leaves, through the Engine: results after post-processing, of all loaders and classes, run after run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import MVTecAD, PredictDataset
from anomalib.engine import Engine
from anomalib.models import Padim
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data import MultiCategoryData

from ..conftest import DATASET

Build = Callable[..., AprilGAN]
CATEGORIES = ["bottle", "metal_nut", "tile"]
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False}


def engine(folder: Path, **options: Any) -> Engine:
    return Engine(default_root_dir=folder, **(QUIET | options))


def one(category: str = "bottle") -> MVTecAD:
    return MVTecAD(root=DATASET, category=category, num_workers=0, eval_batch_size=5)


def several(*names: str) -> MultiCategoryData:
    return MultiCategoryData("mvtec", DATASET, list(names or CATEGORIES), eval_batch_size=5, num_workers=0)


def loader_of(category: str) -> DataLoader:
    data = one(category)
    data.prepare_data()
    data.setup()
    return data.test_dataloader()


def table_of(folder: Path) -> pd.DataFrame:
    (path,) = folder.rglob("decisions.csv")
    return pd.read_csv(path, keep_default_na=False)


def drawings_of(folder: Path) -> set[str]:
    """Drawings below the folder of all."""
    return {path.as_posix().partition("/images/")[2] for path in folder.rglob("*.png")}


class Recorder(Callback):
    """A user's callback, which writes down what it sees of every image."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, Any]] = {}

    def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        del trainer, module, rest
        labels = [None] * len(outputs.image_path) if outputs.pred_label is None else outputs.pred_label.tolist()
        self.seen |= dict(zip(outputs.image_path, zip(outputs.pred_score.tolist(), labels, strict=True), strict=True))

    on_predict_batch_end = on_test_batch_end


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_a_users_callback_sees_scores_after_post_processing(april_gan: Build, tmp_path: Path, verb: str) -> None:
    recorder = Recorder()
    model, runner = april_gan(visualizer=False), engine(tmp_path, callbacks=[recorder])
    runner.validate(model, datamodule=one())
    options = {"verbose": False} if verb == "test" else {"return_predictions": True}
    getattr(runner, verb)(model, datamodule=one(), **options)
    table = table_of(tmp_path)
    assert set(table.image_path) == set(recorder.seen)
    scores, labels = zip(*(recorder.seen[path] for path in table.image_path), strict=True)
    np.testing.assert_array_equal(np.float32(table.score), np.float32(scores))
    assert table.decision.tolist() == ["anomalous" if label else "good" for label in labels]
    assert set(labels) == {True, False}


def test_a_barebones_test_of_several_classes_returns_its_metrics(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(visualizer=False)
    (expected,) = engine(tmp_path / "full").test(model, datamodule=several(), verbose=False)
    assert {"image_AUROC", *(f"pixel_AUPRO/{name}" for name in CATEGORIES)} < expected.keys()
    options = {"barebones": True, "accelerator": "cpu", "devices": 1}
    runner = Engine(default_root_dir=tmp_path / "bare", **options)
    for _ in range(2):
        (metrics,) = runner.test(model, datamodule=several(), verbose=False)
        assert metrics == pytest.approx(expected, abs=1e-6)
    (alone,) = runner.test(april_gan(visualizer=False), datamodule=one(), verbose=False)
    names = {name.partition("/")[0] for name in expected}
    assert alone == pytest.approx({name: expected[f"{name}/bottle"] for name in names}, abs=1e-6)


@pytest.mark.parametrize("order", [("one", "several"), ("several", "one"), ("one", "several", "one")])
def test_one_engine_tests_one_category_and_several(april_gan: Build, tmp_path: Path, order: tuple[str, ...]) -> None:
    data = {"one": one, "several": several}
    expected = {
        name: engine(tmp_path / name).test(april_gan(visualizer=False), datamodule=make(), verbose=False)[0]
        for name, make in data.items()
    }
    model, runner = april_gan(visualizer=False), engine(tmp_path / "both")
    for name in order:
        (metrics,) = runner.test(model, datamodule=data[name](), verbose=False)
        assert metrics == pytest.approx(expected[name], abs=1e-6)


def test_an_interrupted_test_leaves_nothing_behind(april_gan: Build, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_test_batch_end(self, *arguments: Any) -> None:
            if arguments[-1] == 1:  # the number of the batch
                raise ConnectionError

    model = april_gan(visualizer=False)
    with pytest.raises(ConnectionError):
        engine(tmp_path / "stopped", callbacks=[Stop()]).test(model, datamodule=several(), verbose=False)
    (metrics,) = engine(tmp_path / "after").test(model, datamodule=several("tile", "bottle"), verbose=False)
    (expected,) = engine(tmp_path / "new").test(
        april_gan(visualizer=False), datamodule=several("tile", "bottle"), verbose=False
    )
    assert metrics == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("class_name", ["part", ["bottle", "tile"]])
def test_a_test_with_two_loaders_is_of_all_their_images(april_gan: Build, tmp_path: Path, class_name: Any) -> None:
    loaders = [loader_of("bottle"), loader_of("tile")]
    files = [str(path) for loader in loaders for path in loader.dataset.samples.image_path]
    model = april_gan(class_name=class_name)
    found = engine(tmp_path / "two").test(model, dataloaders=loaders, verbose=False)
    assert len(found) == 2  # Lightning's dictionary of each loader; what is of all of them is in both
    table = table_of(tmp_path / "two")
    assert table.image_path.tolist() == files
    assert set(table.label) == {"good", "anomalous"}
    assert drawings_of(tmp_path / "two") == {Path(file).relative_to(DATASET).as_posix() for file in files}
    joined = DataLoader(
        torch.utils.data.ConcatDataset([loader.dataset for loader in loaders]),
        batch_size=5,
        collate_fn=loaders[0].collate_fn,
    )
    (expected,) = engine(tmp_path / "one").test(april_gan(class_name=class_name), dataloaders=joined, verbose=False)
    assert {"image_AUROC", "pixel_AUPRO"} <= expected.keys()
    assert ("image_AUROC/tile" in expected) == (class_name != "part")
    for metrics in found:
        assert metrics == pytest.approx(expected, abs=1e-6)


def test_a_prediction_with_two_loaders_is_of_all_their_images(april_gan: Build, tmp_path: Path) -> None:
    folders = [DATASET / "bottle" / "test" / "good", DATASET / "tile" / "test" / "good"]
    sets = [PredictDataset(folder) for folder in folders]
    loaders = [DataLoader(dataset, batch_size=3, collate_fn=dataset.collate_fn) for dataset in sets]
    model = april_gan(class_name=["bottle", "tile"])
    batches = engine(tmp_path).predict(model, dataloaders=loaders)
    assert [{path for batch in part for path in batch.image_path} for part in batches] == [
        {str(path) for path in dataset.image_filenames} for dataset in sets
    ]
    table = table_of(tmp_path)
    assert table.image_path.tolist() == [str(path) for dataset in sets for path in dataset.image_filenames]
    assert table.class_name.tolist() == [Path(path).parents[2].name for path in table.image_path]
    assert drawings_of(tmp_path) == {Path(path).relative_to(DATASET).as_posix() for path in table.image_path}


def test_a_class_without_defects_has_no_metric_and_does_not_count(april_gan: Build, tmp_path: Path) -> None:
    data = several("bottle", "tile")
    data.setup()
    table = data.test_data.samples
    data.test_data.samples = table[(table.class_name == "bottle") | (table.label_index == 0)]
    model = april_gan(visualizer=False, class_name=["bottle", "tile"])
    (metrics,) = engine(tmp_path).test(model, dataloaders=data.test_dataloader(), verbose=False)
    assert not {name for name in metrics if name.endswith("/tile")}
    assert {name.partition("/")[0] for name in metrics} >= {"image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_AUPRO"}
    for name, value in metrics.items():
        assert value == metrics[f"{name.partition('/')[0]}/bottle"]


def test_the_next_model_of_an_engine_is_left_alone(april_gan: Build, tmp_path: Path) -> None:
    """Lightning keeps a model's callbacks: ours would resize and scale the next model's images and scores too."""

    def trained(runner: Engine) -> Any:
        seed_everything(0)
        model = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=20, visualizer=False)
        runner.fit(model, datamodule=one())
        return runner.predict(model, datamodule=one())

    alone, shared = engine(tmp_path / "alone", max_epochs=1), engine(tmp_path / "shared", max_epochs=1)
    shared.test(april_gan(), datamodule=one(), verbose=False)
    assert not [callback for callback in shared.trainer.callbacks if type(callback).__module__.startswith("anomalib_")]
    for ours, theirs in zip(trained(shared), trained(alone), strict=True):
        assert ours.image.shape == theirs.image.shape
        torch.testing.assert_close(ours.pred_score, theirs.pred_score)
