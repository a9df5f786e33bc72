"""What metrics see: the same in validation as in tests, whatever the batch; and metrics that cannot exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder, MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from lightning.pytorch import Callback

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.results.evaluator import ClassEvaluator

from ..conftest import DATASET

Build = Callable[..., AprilGAN]
IMAGE, PIXEL = {"fields": ["pred_score", "gt_label"]}, {"fields": ["anomaly_map", "gt_mask"]}


def engine(folder: Path, **options: Any) -> Engine:
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False}
    return Engine(default_root_dir=folder, **(quiet | options))


def tile(batch_size: int) -> MVTecAD:
    return MVTecAD(root=DATASET, category="tile", num_workers=0, eval_batch_size=batch_size)


def evaluator(kind: type[Evaluator]) -> Evaluator:
    def metrics(stage: str) -> list[Any]:
        return [AUROC(**IMAGE, prefix=f"{stage}_image_"), AUROC(**PIXEL, prefix=f"{stage}_pixel_")]

    return kind(val_metrics=metrics("val"), test_metrics=metrics("test"))


class Batches(Callback):
    """Keeps what a callback after the evaluator sees."""

    def __init__(self) -> None:
        self.highest = 0.0

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        del trainer, module, rest
        self.highest = max(self.highest, float(outputs.anomaly_map.max()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Evaluator, {"k_shot": 2}), (ClassEvaluator, {"k_shot": 2}), (Evaluator, {"k_shot": 2, "post_processor": False})],
)
def test_validation_measures_what_a_test_measures(
    april_gan: Build, tmp_path: Path, kind: type[Evaluator], options: dict[str, Any]
) -> None:
    found = []
    for size in (1, 7):
        seen = Batches()
        model, runner = (
            april_gan(**options, evaluator=evaluator(kind), visualizer=False),
            engine(tmp_path, callbacks=[seen]),
        )
        (in_validation,) = runner.validate(model, datamodule=tile(size), verbose=False)
        (in_test,) = runner.test(model, datamodule=tile(size), verbose=False)
        assert seen.highest > 1.0  # what comes after the evaluator has raw maps as before
        found.append({**in_validation, **in_test})
    for values in found:
        assert values["val_image_AUROC"] == pytest.approx(values["test_image_AUROC"], abs=1e-6)
        assert values["val_pixel_AUROC"] == pytest.approx(values["test_pixel_AUROC"], abs=1e-6)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_metrics_that_cannot_exist_are_left_out(april_gan: Build, tmp_path: Path) -> None:
    good = DATASET / "tile" / "test" / "good"
    data = Folder(
        "tile", root=DATASET / "tile", normal_dir="train/good", normal_test_dir=good, test_split_mode="from_dir",
        val_split_mode="none", num_workers=0,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="image_AUROC does not exist for these images: it needs normal and anomalous"):
        (found,) = engine(tmp_path).test(april_gan(visualizer=False), datamodule=data, verbose=False)
    assert found == {}


def test_without_validation_images_tests_and_predictions_run(april_gan: Build, tmp_path: Path) -> None:
    data = Folder(
        "tile", root=DATASET / "tile", normal_dir="train/good", abnormal_dir="test/hole", val_split_mode="none",
        num_workers=0,
    )  # fmt: skip
    model, runner = april_gan(visualizer=False), engine(tmp_path)
    (found,) = runner.test(model, datamodule=data, verbose=False)
    assert 0.0 <= found["image_AUROC"] <= 1.0
    assert len(runner.predict(model, datamodule=data)) > 0
    assert not hasattr(data, "val_data")
    with pytest.raises(AttributeError, match="val_data"):  # as before
        data.val_dataloader()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_score_that_is_not_a_number_is_never_good(april_gan: Build, number: float) -> None:
    model = april_gan(class_name="tile")
    model.setup("predict")
    scores = torch.tensor([number, 0.1])
    score, label = model.post_processor.decide_scores(scores, None, None)
    assert label.tolist() == [True, False]
    assert not 0.0 <= score[0] < 0.5
