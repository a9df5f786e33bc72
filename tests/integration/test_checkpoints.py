"""Checkpoints: those of version 0.1.0, those that are refused, and those whose files are gone."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file, save_file

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.checkpoint import rewrite

from ..conftest import DATASET, GOLDEN, SmallClip
from .runs import adapters, auxiliary, by_path, category, engine, equal, good, read

Build = Callable[..., AprilGAN]
FOLDER = Path(__file__).parents[1] / "data" / "checkpoints_0_1_0"
# By checkpoint and class what 0.1.0 predicted: see README.md beside them.
PREDICTIONS: dict[str, Any] = json.loads((FOLDER / "predictions.json").read_text())
EVERY = 8  # of a map's rows and columns, what is written down there
TOLERANCE = 1e-5

# -- of version 0.1.0 --------------------------------------------------------------------------------


@pytest.fixture
def load(small_clip: SmallClip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., AprilGAN]:
    """Loads a checkpoint of 0.1.0; its images are named from the current folder on."""
    (tmp_path / "golden").symlink_to(GOLDEN)
    monkeypatch.chdir(tmp_path)

    def load(name: str, **options: Any) -> AprilGAN:
        given = {"backbone": str(small_clip.quick_gelu), "pretrained": str(small_clip.weights)}
        given |= {"class_name": list(PREDICTIONS[name])} | options
        return AprilGAN.load_from_checkpoint(FOLDER / f"{name}.ckpt", **given).eval()

    return load


@pytest.fixture
def build(april_gan: Build, small_clip: SmallClip) -> Build:
    """Builds a model with the settings of those checkpoints."""

    def build(**options: Any) -> AprilGAN:
        given = {"image_size": 64, "stages": (2, 4), "memory_stages": (3,), "adapters": str(small_clip.adapters_2)}
        return april_gan(**(given | {"visualizer": False} | options))

    return build


def is_clear(image: dict[str, Any], of_class: dict[str, Any]) -> bool:
    """Whether a score is away from the threshold, which may be an image's own score: processors round differently."""
    return abs(image["score"] - of_class["values"]["image_threshold"]) > TOLERANCE


def assert_predicts_as_before(model: AprilGAN, expected: dict[str, Any]) -> None:
    assert model.classes.names == tuple(expected)
    for name, of_class in expected.items():
        found = model.post_processor.of_class(name).values()
        assert found == pytest.approx(of_class["values"], abs=TOLERANCE)
        for path, image in of_class["images"].items():
            with torch.no_grad():
                label = model(read(path), name).pred_label
                model.post_processor.enable_normalization = False
                raw = model(read(path), name)
                model.post_processor.enable_normalization = True
            if is_clear(image, of_class):
                assert label.item() == image["label"]
            assert raw.pred_score.item() == pytest.approx(image["score"], abs=TOLERANCE)
            assert raw.anomaly_map.amax().item() == pytest.approx(image["map_maximum"], abs=TOLERANCE)
            part = raw.anomaly_map[0, ::EVERY, ::EVERY]
            torch.testing.assert_close(part, torch.tensor(image["map"]), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_loaded_from_0_1_0(load: Callable[..., AprilGAN], name: str) -> None:
    assert_predicts_as_before(load(name), PREDICTIONS[name])


@pytest.mark.parametrize("name", PREDICTIONS)
def test_written_again_and_loaded(load: Callable[..., AprilGAN], name: str, tmp_path: Path) -> None:
    """What came from 0.1.0 is written in today's form, with nothing lost."""
    model, runner = load(name), engine(tmp_path / "runs")
    for of_class in PREDICTIONS[name]:  # classes are told by folders, which must be below those of the run
        shutil.copytree(DATASET / of_class / "test" / "good", tmp_path / "new" / of_class)
    shutil.copytree(DATASET / of_class / "test" / "good", tmp_path / "new" / "more" / of_class)
    runner.predict(model, data_path=tmp_path / "new")
    runner.trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert_predicts_as_before(AprilGAN.load_from_checkpoint(tmp_path / "again.ckpt").eval(), PREDICTIONS[name])


def test_it_can_grow_and_be_taken_back(load: Callable[..., AprilGAN], small_clip: SmallClip, tmp_path: Path) -> None:
    """What joins a memory bank of 0.1.0 is written in today's form, and what was there already is known."""
    model = load("calibrated")
    references = [Path(file) for file in model.made.references["bottle"]]
    part = DATASET / "bottle" / "test" / "good" / "000.png"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model.accept([str(references[0]), str(part)])
    assert [one.was_known for one in found] == [True, False]
    rewrite(FOLDER / "calibrated.ckpt", tmp_path / "grown.ckpt", model, model.settings, model.made)
    given = {"backbone": str(small_clip.quick_gelu), "pretrained": str(small_clip.weights)}
    again: Any = AprilGAN.load_from_checkpoint(tmp_path / "grown.ckpt", **given).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(read(part)).pred_score, model(read(part)).pred_score)
    again.undo_accept()
    after = again.state_dict()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []


def test_a_loaded_checkpoint_answers_for_the_classes_that_it_knows(load: Callable[..., AprilGAN]) -> None:
    """A caller who names a class gets its bank, whether or not the arguments name it too."""
    image = read(DATASET / "tile" / "test" / "hole" / "001.png")
    with torch.no_grad():
        found = load("two_classes", class_name=None)(image, "tile")
        expected = load("two_classes")(image, "tile")
    assert torch.equal(found.pred_score, expected.pred_score)
    assert torch.equal(found.anomaly_map, expected.anomaly_map)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zero_shot", {}),
        ("few_shot", {"k_shot": 2}),
        ("calibrated", {"k_shot": 2, "calibration": "references", "false_positive_rate": 0.1}),
    ],
)
@pytest.mark.parametrize("references", ["there", "gone"])
def test_ckpt_path_of_0_1_0_keeps_references_and_thresholds(
    load: Callable[..., AprilGAN], build: Build, tmp_path: Path, name: str, options: dict[str, Any], references: str
) -> None:
    folder = shutil.copytree(DATASET, tmp_path / "copy")
    (tmp_path / "golden").unlink()
    (tmp_path / "golden").mkdir()
    folder.rename(tmp_path / "golden" / "dataset")
    expected, options = PREDICTIONS[name]["bottle"], dict(options)
    if "k_shot" in options:
        options["references"] = [f"golden/dataset/bottle/train/good/00{number}.png" for number in (0, 1)]
    if references == "gone":
        shutil.rmtree(tmp_path / "golden" / "dataset" / "bottle" / "train")
    model = build(class_name="bottle", **options)
    batches = engine(tmp_path / "runs").predict(
        model, data_path=tmp_path / "golden" / "dataset", ckpt_path=FOLDER / f"{name}.ckpt"
    )
    assert model.post_processor.values() == pytest.approx(expected["values"], abs=TOLERANCE)
    found = {str(Path(path).relative_to(tmp_path)): image for path, image in by_path(batches).items()}
    for path, image in expected["images"].items():
        if is_clear(image, expected):
            assert found[path]["pred_label"].item() == image["label"]
    # Other images than those known can only have been judged by the same thresholds: the order is that of 0.1.0.
    paths = sorted(expected["images"], key=lambda path: expected["images"][path]["score"])
    assert paths == sorted(paths, key=lambda path: found[path]["pred_score"].item())


def test_training_of_0_1_0_goes_on(load: Callable[..., AprilGAN], build: Build, tmp_path: Path) -> None:
    before = adapters(load("trained"))
    seed_everything(1)
    model = build(adapters=None)
    runner = engine(tmp_path / "runs", max_epochs=2)
    runner.fit(model, datamodule=auxiliary(categories=["bottle"]), ckpt_path=FOLDER / "trained.ckpt")
    assert runner.trainer.current_epoch == 2
    assert all(not torch.equal(value, before[name]) for name, value in adapters(model).items())
    file = model.save_adapters(tmp_path / "own.safetensors")
    for seen in ("bottle", "metal_nut", "tile"):
        with pytest.warns(UserWarning, match=rf"trained on MVTecAD \({seen}\), which is the data under test"):
            engine(tmp_path / seen).validate(build(adapters=str(file)), datamodule=category(seen), verbose=False)


def test_0_1_0_with_another_clip_is_refused(
    load: Callable[..., AprilGAN], small_clip: SmallClip, tmp_path: Path
) -> None:
    """Its checkpoints recorded a hash of the image projection alone."""
    weights = load_file(small_clip.weights)
    weights["visual.proj"] = weights["visual.proj"] + 1
    save_file(weights, tmp_path / "other.safetensors")
    model = load("zero_shot", pretrained=str(tmp_path / "other.safetensors"))
    with pytest.raises(
        ValueError, match=r"`pretrained`: the checkpoint belongs to a CLIP with weights ff8eee8fca356b64"
    ):
        model(torch.rand(1, 3, 64, 64))


# -- refused -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(april_gan: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with two references of one class, and thresholds that validation has learned."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = april_gan(class_name="bottle", k_shot=2, references=str(good("bottle")))
    engine(folder).train(model, datamodule=category("bottle"))
    (file,) = folder.glob("**/*.ckpt")
    return file


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 64},
        {"image_size": (96, 64)},
        {"memory_stages": (1,)},
        {"quick_gelu": False},
        {"neighbourhood": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("k_shot", [0, 2])
def test_a_refused_checkpoint_leaves_the_model_as_it_was(
    april_gan: Build, tmp_path: Path, checkpoint: Path, change: dict[str, Any], k_shot: int
) -> None:
    references = {"references": dict.fromkeys(("tile", "nut"), str(good("tile")))} if k_shot else {}
    model = april_gan(class_name=["tile", "nut"], k_shot=k_shot, **change, **references).eval()
    model.setup("predict")
    model.post_processor.of_class("tile").set_values(image_threshold=0.625)
    images = torch.rand(2, 3, 70, 110, generator=torch.Generator().manual_seed(0))

    def state() -> tuple[Any, ...]:
        with torch.no_grad():
            predictions = model(images, ["tile", "nut"])
        values = [model.post_processor.of_class(name).values() for name in ("tile", "nut")]
        return repr(model.pre_processor), values, predictions

    pre_processor, values, predictions = state()
    made = copy.deepcopy(model.made)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"of the checkpoint is .*Use the same value for both"):
        engine(tmp_path).test(model, datamodule=category("bottle"), ckpt_path=checkpoint)
    assert equal(dict(model.state_dict()), tensors)
    assert model.made == made
    now = state()
    assert now[:2] == (pre_processor, values)
    for ours, theirs in zip(now[2], predictions, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "weight",
    [
        "transformer.resblocks.1.mlp.c_fc.weight",
        "token_embedding.weight",
        "ln_final.bias",
        "text_projection",
        "visual.transformer.resblocks.2.attn.in_proj_weight",
        "visual.conv1.weight",
    ],
)
def test_a_clip_that_differs_in_one_weight_is_another_one(
    small_clip: SmallClip, checkpoint: Path, tmp_path: Path, weight: str
) -> None:
    weights = load_file(small_clip.weights)
    weights[weight].view(-1)[7] += 0.5
    save_file(weights, tmp_path / "other.safetensors")
    model = AprilGAN.load_from_checkpoint(checkpoint, pretrained=str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"the checkpoint belongs to a CLIP with weights \w+, .*other"):
        model(torch.rand(1, 3, 96, 96))
    save_file(load_file(small_clip.weights), tmp_path / "same.safetensors")
    AprilGAN.load_from_checkpoint(checkpoint, pretrained=str(tmp_path / "same.safetensors")).setup("predict")


# -- without the files it was made from --------------------------------------------------------------


def test_a_checkpoint_holds_its_prompts(april_gan: Build, tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text("normal: ['good {}']\nanomalous: ['bad {}']\ntemplates: ['a {}.']\n")
    model = april_gan(class_name="bottle", prompts=str(file))
    engine(tmp_path / "train").train(model, datamodule=category("bottle"))
    (checkpoint,) = (tmp_path / "train").glob("**/*.ckpt")
    file.unlink()
    loaded = AprilGAN.load_from_checkpoint(checkpoint)
    data = DATASET / "bottle" / "test" / "good"
    found = by_path(engine(tmp_path / "loaded").predict(loaded, data_path=data))
    expected = by_path(engine(tmp_path / "same").predict(model, data_path=data))
    assert torch.equal(loaded.model.text_features, model.model.text_features)
    assert found.keys() == expected.keys()
    for path, image in found.items():
        torch.testing.assert_close(image["pred_score"], expected[path]["pred_score"], atol=1e-6, rtol=0)
    # The same prompts given as content are those of the checkpoint: nothing is encoded anew.
    given = {"normal": ["good {}"], "anomalous": ["bad {}"], "templates": ["a {}."]}
    again = april_gan(class_name="bottle", prompts=given)
    engine(tmp_path / "again").predict(again, data_path=data, ckpt_path=checkpoint)
    assert torch.equal(again.model.text_features, model.model.text_features)
