"""One model of several classes is as many models of one class: in the Engine, after a checkpoint, exported."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.clip.prompts import TEMPLATES, PromptEnsemble
from anomalib_aprilgan.data import MultiCategoryData

from ..conftest import DATASET

Build = Callable[..., AprilGAN]
CATEGORIES = ["bottle", "metal_nut", "tile"]


def engine(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, enable_progress_bar=False)


def categories(*names: str) -> MultiCategoryData:
    # 5 a batch: batches of two categories.
    return MultiCategoryData("mvtec", DATASET, list(names or CATEGORIES), eval_batch_size=5, num_workers=0)


def by_path(batches: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor, bool]]:
    return {
        path: (score, anomaly_map, bool(label))
        for batch in batches
        for path, score, anomaly_map, label in zip(
            batch.image_path, batch.pred_score, batch.anomaly_map, batch.pred_label, strict=True
        )
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for path, (score, anomaly_map, label) in ours.items():
        # Batches of other images are computed in another order: on some processors that shows in the sixth digit.
        torch.testing.assert_close(score, theirs[path][0], atol=5e-6, rtol=0)
        torch.testing.assert_close(anomaly_map, theirs[path][1], atol=5e-6, rtol=0)
        assert label == theirs[path][2]


@pytest.mark.parametrize("k_shot", [0, 2])
def test_engine_and_checkpoint(april_gan: Build, tmp_path: Path, k_shot: int) -> None:
    alone, metrics = {}, {}
    for name in CATEGORIES:
        model, runner = april_gan(k_shot=k_shot, visualizer=False), engine(tmp_path / name)
        data = MVTecAD(root=DATASET, category=name, num_workers=0, eval_batch_size=5)
        runner.validate(model, datamodule=data)
        (metrics[name],) = runner.test(model, datamodule=data, verbose=False)
        alone |= by_path(runner.predict(model, datamodule=data))
    model, runner = april_gan(k_shot=k_shot, visualizer=False), engine(tmp_path / "all")
    runner.validate(model, datamodule=categories())
    (together,) = runner.test(model, datamodule=categories(), verbose=False)
    assert model.classes.names == tuple(CATEGORIES)
    for metric in metrics["tile"]:
        values = [metrics[name][metric] for name in CATEGORIES]
        assert [together[f"{metric}/{name}"] for name in CATEGORIES] == pytest.approx(values, abs=1e-6)
        assert together[metric] == pytest.approx(np.mean(values), abs=1e-6)
    assert_same(by_path(runner.predict(model, datamodule=categories())), alone)

    runner.trainer.save_checkpoint(tmp_path / "all.ckpt")
    restored = AprilGAN.load_from_checkpoint(tmp_path / "all.ckpt")
    batches = engine(tmp_path / "again").predict(
        restored, datamodule=categories(), ckpt_path=tmp_path / "all.ckpt", return_predictions=True
    )
    assert_same(by_path(batches), alone)


@pytest.mark.parametrize("k_shot", [0, 2])
def test_a_folder_of_folders_and_the_word_for_each(april_gan: Build, tmp_path: Path, k_shot: int) -> None:
    """Images go to the class that a folder of theirs is named after; references lie in folders of the same names."""
    for side, category in (("left", "bottle"), ("right", "tile")):
        shutil.copytree(DATASET / category / "train" / "good", tmp_path / "good" / side)
        shutil.copytree(DATASET / category / "test", tmp_path / "new" / side / "today")
    words = {"left": "glass bottle", "right": "stone tile"}
    references = {"references": str(tmp_path / "good")} if k_shot else {}
    model = april_gan(class_name=words, k_shot=k_shot, **references)
    together = by_path(engine(tmp_path).predict(model, data_path=tmp_path / "new"))
    alone = {}
    for side, said in words.items():
        given = {"references": str(tmp_path / "good" / side)} if k_shot else {}
        single = april_gan(class_name=said, k_shot=k_shot, **given)
        alone |= by_path(engine(tmp_path).predict(single, data_path=tmp_path / "new" / side))
    assert_same(together, alone)


def test_images_of_no_class_are_an_error_or_of_the_default_class(april_gan: Build, tmp_path: Path) -> None:
    pictures = DATASET / "tile" / "test" / "hole"
    model = april_gan(class_name=["bottle", "nut"])
    with pytest.raises(
        ValueError, match=r"000\.png belongs to none of the classes \('bottle', 'nut'\).*`default_class`"
    ):
        engine(tmp_path).predict(model, data_path=pictures)
    model = april_gan(class_name=["bottle", "nut"], default_class="nut")
    alone = april_gan(class_name="nut")
    assert_same(
        by_path(engine(tmp_path).predict(model, data_path=pictures)),
        by_path(engine(tmp_path).predict(alone, data_path=pictures)),
    )


def test_forward_takes_names(april_gan: Build) -> None:
    model = april_gan(class_name=["bottle", "tile"])
    images = torch.rand(3, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    mixed = model(images, ["tile", "bottle", "tile"])
    for number, name in enumerate(("tile", "bottle", "tile")):
        alone = april_gan(class_name=name)(images)
        torch.testing.assert_close(mixed.pred_score[number], alone.pred_score[number], atol=1e-6, rtol=0)
        torch.testing.assert_close(mixed.anomaly_map[number], alone.anomaly_map[number], atol=1e-6, rtol=0)
    torch.testing.assert_close(model(images, "tile").pred_score, april_gan(class_name="tile")(images).pred_score)
    with pytest.raises(ValueError, match=r"nut belongs to none of the classes \('bottle', 'tile'\)"):
        model(images, "nut")
    with pytest.raises(ValueError, match=r"`class_name` is needed to choose among the classes"):
        model(images)


def test_export_is_of_the_default_class(april_gan: Build, tmp_path: Path) -> None:
    references = {name: str(DATASET / name / "train" / "good") for name in ("bottle", "tile")}
    given: dict[str, Any] = {"class_name": ["bottle", "tile"], "k_shot": 2, "references": references}
    with pytest.raises(ValueError, match=r"exported model serves one class: set `default_class` to one of"):
        april_gan(**given).to_onnx(tmp_path / "none")
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    for name in ("bottle", "tile"):
        model = april_gan(**given, default_class=name)
        alone = april_gan(class_name=name, k_shot=2, references=references[name])(images)
        exported: torch.nn.Module = torch.load(model.to_torch(tmp_path / name), weights_only=False)["model"]  # our own
        torch.testing.assert_close(exported.eval()(images).pred_score, alone.pred_score, atol=1e-6, rtol=0)
        assert model.classes.names == ("bottle", "tile")  # whole again
        torch.testing.assert_close(model(images, name).pred_score, alone.pred_score, atol=1e-6, rtol=0)


def test_a_product_joins_a_trained_model(april_gan: Build, tmp_path: Path) -> None:
    """A name and a few references more; the others' banks come from the checkpoint, their images may be gone."""
    good = tmp_path / "good"
    shutil.copytree(DATASET / "bottle" / "train" / "good", good / "bottle")
    shutil.copytree(DATASET / "metal_nut" / "train" / "good", good / "metal_nut")
    model, runner = april_gan(class_name=["bottle", "metal_nut"], k_shot=2, references=str(good)), engine(tmp_path)
    runner.test(model, datamodule=categories("bottle", "metal_nut"), verbose=False)
    runner.trainer.save_checkpoint(tmp_path / "two.ckpt")
    shutil.rmtree(good / "bottle")
    (good / "bottle").mkdir()
    shutil.copytree(DATASET / "tile" / "train" / "good", good / "tile")
    grown = april_gan(class_name=["tile", "bottle", "metal_nut"], k_shot=2, references=str(good))
    new = shutil.copytree(DATASET / "tile" / "test" / "hole", tmp_path / "new" / "tile")  # folders above do not count
    batches = engine(tmp_path).predict(grown, data_path=new, ckpt_path=tmp_path / "two.ckpt")
    alone = april_gan(class_name="tile", k_shot=2, references=str(good / "tile"))
    assert_same(by_path(batches), by_path(engine(tmp_path).predict(alone, data_path=new)))
    assert torch.equal(grown.model.few_shot.features(1), model.model.few_shot.features(0))
    assert [len(paths) for paths in grown.made.references.values()] == [2, 2, 2]


def test_words_of_a_class_come_from_aliases_and_prompts_by_its_name(april_gan: Build, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text("classes: {pcb1: {normal: ['clean {}']}}\n")
    given: dict[str, Any] = {"class_name": ["pcb1", "tile"], "prompts": str(tmp_path / "prompts.yaml")}
    models = [april_gan(**given, class_aliases=aliases) for aliases in (False, True)]
    for model, words in zip(models, ("pcb1", "printed circuit board"), strict=True):
        model.setup("predict")
        normal = [template.replace("{}", f"clean {words}") for template in TEMPLATES]
        _, anomalous = PromptEnsemble().sentences(words)
        own = model.model.backbone.encode_states(normal, anomalous)
        common = model.model.backbone.encode_states(*PromptEnsemble().sentences("tile"))
        torch.testing.assert_close(model.model.text_features, torch.stack([own, common]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_name": ["nut", "nut"]}, r"`class_name` must not repeat a name"),
        ({"class_name": {"a": "nut", "b": "Nut "}}, r"`class_name` has the same words .* for a and b"),
        ({"class_name": []}, r"`class_name` must name at least one class"),
        ({"class_name": {"a": " "}}, r"`class_name` must name an object"),
        ({"class_name": ["a", "b"], "default_class": "c"}, r"`default_class` must be one of the classes"),
        ({"default_class": "c"}, r"`default_class` must be one of the classes"),
    ],
)
def test_bad_names(april_gan: Build, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        april_gan(**arguments)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (
            {"bottle": str(DATASET / "bottle" / "train")},
            r"`references` has nothing for the class 'tile', only for bottle",
        ),
        (str(DATASET / "bottle"), r"`references` must tell which images are of 'bottle'"),
        ([str(DATASET / "bottle" / "train" / "good" / "000.png")], r"`references` must tell which images"),
        (None, r"`k_shot=1` needs normal images of 'bottle'"),
    ],
)
def test_every_class_needs_references(april_gan: Build, references: Any, message: str) -> None:
    model = april_gan(class_name=["bottle", "tile"], k_shot=1, references=references)
    with pytest.raises(ValueError, match=message):
        model.setup("predict")
