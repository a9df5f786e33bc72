"""Wrong arguments, images and files by the hundred: each works or is refused by name in a second; none runs code."""

from __future__ import annotations

import inspect
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import InferenceBatch

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data import AuxiliaryData, MultiCategoryData
from anomalib_aprilgan.data.pre_processing import AprilGANPreProcessor, EightBitResize
from anomalib_aprilgan.data.reading import load_image
from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor
from anomalib_aprilgan.demo.inspection import DrawnInspection
from anomalib_aprilgan.results.table import DecisionsWriter
from anomalib_aprilgan.results.visualizer import AprilGANVisualizer

from .. import hostile
from ..conftest import DATASET, SmallClip

Build = Callable[..., AprilGAN]
ARGUMENTS = [name for name in inspect.signature(AprilGAN.__init__).parameters if name != "self"]
GOOD = str(DATASET / "tile" / "train" / "good")
PARTS: list[tuple[Callable[..., object], dict[str, Any]]] = [
    (AprilGANPreProcessor, {"image_size": (96, 96)}),
    (AprilGANPostProcessor, {}),
    (AprilGANVisualizer, {}),
    (DecisionsWriter, {}),
    (MultiCategoryData, {"dataset": "mvtec"}),
    (AuxiliaryData, {"dataset": "mvtec"}),
    (DrawnInspection, {"category": "leather"}),
]
MANY = pytest.mark.slow  # minutes


def generator(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311  # no secret


def assert_decided(found: InferenceBatch) -> None:
    """A number, or not good: damaged weights may be finite and as large as numbers can be."""
    assert (found.pred_score.isfinite() | found.pred_label).all()


def judged(build: Build, arguments: dict[str, Any], class_name: str | None = None) -> None:
    """Build, make ready and ask once."""
    model = build(**arguments)
    model.setup("predict")
    if len(model.classes) > 1 and model.classes.default is None:
        class_name = model.classes.names[0]
    assert_decided(model(torch.rand(1, 3, 40, 40), class_name))


def wrong(results: dict[str, str]) -> str:
    return "\n".join(f"{case[:200]}: {result}" for case, result in results.items() if result not in {"ok", "refused"})


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=MANY)])
def test_arguments(april_gan: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.chdir(tmp_path)
    draw = generator(count)
    results: dict[str, str] = {}
    for _ in range(count):
        names = draw.sample(ARGUMENTS, draw.choice([1, 1, 1, 2, 3]))
        given = {"k_shot": 2, "references": GOOD} if draw.random() < 0.3 else {}
        given |= {name: draw.choice(hostile.VALUES) for name in names}
        results[f"{given}"] = hostile.outcome(lambda given=given: judged(april_gan, given), [*ARGUMENTS, "images"])
    assert wrong(results) == ""
    kinds = Counter(results.values())
    assert kinds["refused"] > kinds["ok"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [120, pytest.param(600, marks=MANY)])
def test_arguments_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.chdir(tmp_path)
    draw = generator(count)
    results: dict[str, str] = {}
    for _ in range(count):
        part, usual = draw.choice(PARTS)
        names = [name for name in inspect.signature(part.__init__).parameters if name not in {"self", "kwargs"}]
        given = usual | {draw.choice(names): draw.choice(hostile.VALUES)}
        results[f"{part.__name__} {given}"] = hostile.outcome(lambda part=part, given=given: part(**given), names)
    assert wrong(results) == ""
    assert Counter(results.values())["refused"] > 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=MANY)])
def test_images(tmp_path: Path, count: int) -> None:
    resize, results = EightBitResize((32, 32)), {}
    for name, content in hostile.images(generator(count), count):
        path = tmp_path / name
        path.write_bytes(content)

        def read(path: Path = path) -> None:
            image = resize(load_image(path))
            assert image.shape == (3, 32, 32)
            assert 0.0 <= image.min() <= image.max() <= 1.0

        results[name] = hostile.outcome(read, [str(path)])
    for name, make in {"pipe.png": os.mkfifo, "folder.png": os.mkdir}.items():
        make(tmp_path / name)
        results[name] = hostile.outcome(lambda name=name: load_image(tmp_path / name), [str(tmp_path)])
    for name, target in {"broken.png": "nowhere", "loop.png": "loop.png"}.items():
        (tmp_path / name).symlink_to(target)
        results[name] = hostile.outcome(lambda name=name: load_image(tmp_path / name), [str(tmp_path)])
    assert wrong(results) == ""
    refused = {name for name, result in results.items() if result == "refused"}
    assert {"nan.tif", "infinite.tif", "bomb.png", "nothing.png", "pipe.png", "folder.png", "loop.png"} <= refused
    assert results["rgb.png"] == results["deep.png"] == results["cmyk.jpg"] == results["thin.png"] == "ok"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=MANY)])
def test_files(april_gan: Build, small_clip: SmallClip, tmp_path: Path, count: int) -> None:
    model = april_gan(class_name="nut", k_shot=1, references=GOOD)
    model.setup("predict")
    valid = {"backbone": small_clip.quick_gelu, "pretrained": small_clip.weights, "ckpt_path": tmp_path / "valid.ckpt"}
    valid["adapters"] = model.save_adapters(tmp_path / "valid.safetensors")
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    checkpoint |= {"pytorch-lightning_version": "2.6.0", "hparams_name": "kwargs"}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, valid["ckpt_path"])
    (valid["prompts"],) = [tmp_path / "valid.yaml"]
    valid["prompts"].write_text("normal: ['good {}']\nanomalous: ['bad {}']\ntemplates: ['a {}.']")
    canary, folder = tmp_path / "canary", tmp_path / "files"
    folder.mkdir()
    results = {}
    step = 4 if count < 1000 else 1  # of the kinds that are listed, every fourth
    cases = itertools.islice(hostile.files(folder, valid, canary, generator(count)), 0, step * count, step)
    for kind, path in cases:

        def use(kind: str = kind, path: Path = path) -> None:
            if kind == "ckpt_path":
                loaded = AprilGAN.load_from_checkpoint(path)
                loaded.setup("predict")
                assert_decided(loaded(torch.rand(1, 3, 40, 40)))
            else:
                judged(april_gan, {kind: str(path)})

        results[f"{kind} {path}"] = hostile.outcome(use, [*ARGUMENTS, "ckpt_path", str(path)])
        if path.suffix and len(path.name) < 100:
            path.unlink(missing_ok=True)
    assert wrong(results) == ""
    assert not canary.exists()
    assert Counter(results.values())["refused"] > 0.4 * count
    for kind in ("pretrained", "adapters", "prompts", "ckpt_path"):  # the whole ones work
        use(kind, valid[kind])
