"""Smoothing, neighbourhoods, the mean of the highest pixels, the shape of images: as arguments of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from torch import Tensor

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.decision.fusion import map_statistic
from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor
from anomalib_aprilgan.demo.studies import options as study

from ..conftest import DATASET

Build = Callable[..., AprilGAN]
GOOD = str(DATASET / "tile" / "train" / "good")
HOLES = DATASET / "tile" / "test" / "hole"
OPTIONS: dict[str, Any] = {"smoothing_sigma": 1.5, "neighbourhood": 3, "top_share": 0.02}


def engine(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, enable_progress_bar=False)


def some_images(height: int = 96, width: int = 96, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def few_shot_checkpoint(april_gan: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    data = MVTecAD(root=DATASET, category="tile", num_workers=0)
    engine(folder).train(april_gan(k_shot=2, aspect_ratio=1.5, **OPTIONS), datamodule=data)
    (checkpoint,) = folder.glob("**/*.ckpt")
    return checkpoint


def test_defaults_are_off(april_gan: Build) -> None:
    model = april_gan(class_name="tile", k_shot=2, references=GOOD)
    assert (model.model.smoothing_sigma, model.model.few_shot.neighbourhood) == (0.0, 1)
    assert model.post_processor.fusion.top_share == 0.0
    assert tuple(model.pre_processor.image_size) == (96, 96)


def test_checkpoint_round_trip(few_shot_checkpoint: Path) -> None:
    loaded = AprilGAN.load_from_checkpoint(few_shot_checkpoint).eval()
    assert {name: loaded.hparams[name] for name in OPTIONS} == OPTIONS
    assert (loaded.model.smoothing_sigma, loaded.model.few_shot.neighbourhood) == (1.5, 3)
    assert (loaded.hparams.aspect_ratio, loaded.hparams.image_size) == (1.5, 96)
    assert loaded.post_processor.fusion.top_share == 0.02
    assert loaded.post_processor.fuse_map_maximum
    # Scores rest on the statistic: its bounds were learned, and give what fusing by hand gives.
    images = some_images()
    loaded.post_processor.enable_normalization = False
    out, text = loaded(images), loaded.predict(images).text_probability
    assert out.anomaly_map.shape == (2, 80, 112)
    low, high = loaded.post_processor.fusion.low, loaded.post_processor.fusion.high
    expected = 0.5 * (text + (map_statistic(out.anomaly_map, 0.02) - low) / (high - low))
    torch.testing.assert_close(out.pred_score, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"smoothing_sigma": 0.0},
            r"`smoothing_sigma` of the checkpoint is 1.5, of the model 0.0. Use the same value for both",
        ),
        ({"neighbourhood": 1}, r"`neighbourhood` of the checkpoint is 3, of the model 1"),
        ({"top_share": 0.0}, r"`top_share` of the checkpoint is 0.02, of the model 0.0"),
        ({"aspect_ratio": None}, r"`image_size` of the checkpoint is \[80, 112\], of the model \[96, 96\]"),
    ],
)
def test_checkpoint_of_other_options_is_refused(few_shot_checkpoint: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AprilGAN.load_from_checkpoint(few_shot_checkpoint, **change)


def test_options_of_references_can_be_chosen_anew_for_a_checkpoint_without(april_gan: Build, tmp_path: Path) -> None:
    engine(tmp_path).validate(april_gan(), datamodule=MVTecAD(root=DATASET, category="tile", num_workers=0))
    (checkpoint,) = tmp_path.glob("**/*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    for name in OPTIONS:  # as written before there were any
        del content["anomalib_aprilgan"]["settings"][name]
    torch.save(content, tmp_path / "earlier.ckpt")
    for file in (checkpoint, tmp_path / "earlier.ckpt"):
        model = april_gan(k_shot=2, references=GOOD, neighbourhood=3, top_share=0.02)
        engine(tmp_path).predict(model, data_path=HOLES, ckpt_path=file)
        assert model.post_processor.fusion.top_share == 0.02
        assert model.post_processor.fusion.low > 0
    with pytest.raises(ValueError, match=r"`smoothing_sigma` of the checkpoint is 0.0, of the model 1.0"):
        AprilGAN.load_from_checkpoint(tmp_path / "earlier.ckpt", smoothing_sigma=1.0)


def test_bounds_from_references_are_those_of_the_statistic(april_gan: Build) -> None:
    given: dict[str, Any] = {"class_name": "tile", "k_shot": 2, "references": GOOD}
    plain, share = april_gan(**given), april_gan(**given, top_share=0.05)
    plain.setup("predict")
    share.setup("predict")
    assert share.post_processor.fusion.low < plain.post_processor.fusion.low
    assert share.post_processor.pixel_threshold == plain.post_processor.pixel_threshold


def test_in_tiles_too(april_gan: Build) -> None:
    given: dict[str, Any] = {"class_name": "tile", "k_shot": 2, "references": GOOD}
    whole, tiled = april_gan(**given, **OPTIONS), april_gan(**given, **OPTIONS, tile_size=400)
    for model in (whole, tiled):
        model.setup("predict")
        model.eval()
    # References are inspected as any image: in tiles at their own size, so their maps have other maxima.
    tiled.post_processor.set_values(**whole.post_processor.values())
    for result, expected in zip(tiled(some_images()), whole(some_images()), strict=True):  # one tile each
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    tiled = april_gan(**given, **OPTIONS, tile_size=64)
    tiled.setup("predict")
    tiled.post_processor.enable_normalization = False
    out, text = tiled.eval()(some_images()), tiled.predict(some_images()).text_probability
    bounds = tiled.post_processor.fusion.low, tiled.post_processor.fusion.high
    expected = 0.5 * (text + (map_statistic(out.anomaly_map, 0.02) - bounds[0]) / (bounds[1] - bounds[0]))
    torch.testing.assert_close(out.pred_score, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"smoothing_sigma": -1.0}, ValueError, r"`smoothing_sigma` must be 0 \(no smoothing\) or more pixels, got -1"),
        ({"smoothing_sigma": float("nan")}, ValueError, r"`smoothing_sigma` must be 0 .*got nan"),
        ({"smoothing_sigma": 30.0}, ValueError, r"`smoothing_sigma` .* must be below 23.875, got 30"),
        ({"neighbourhood": 2}, ValueError, r"`neighbourhood` must be an odd number of patches.*got 2"),
        ({"neighbourhood": -1}, ValueError, r"`neighbourhood` must be an odd number of patches.*got -1"),
        ({"neighbourhood": 3.0}, TypeError, r"`neighbourhood` must be an int, got 3.0"),
        ({"top_share": 1.5}, ValueError, r"`top_share` must be a share of the map in \[0, 1\].*got 1.5"),
        ({"aspect_ratio": 0.0}, ValueError, r"`aspect_ratio` must be the images' width / height, above 0, got 0"),
        ({"aspect_ratio": float("inf")}, ValueError, r"`aspect_ratio` must be .*got inf"),
        ({"aspect_ratio": 2.0, "image_size": (96, 64)}, ValueError, r"`aspect_ratio` needs an `image_size` of one"),
        ({"aspect_ratio": 2.0, "image_size": 95}, ValueError, r"`image_size` must be a multiple of"),
        ({"aspect_ratio": 2.0, "tile_size": 64}, ValueError, r"`aspect_ratio` is the shape of whole images"),
        (
            {"top_share": 0.1, "post_processor": AprilGANPostProcessor()},
            ValueError,
            r"`post_processor` and `top_share` do not go together",
        ),
    ],
)
def test_what_is_refused(april_gan: Build, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        april_gan(**arguments)


def test_largest_smoothing_just_fits(april_gan: Build) -> None:
    model = april_gan(class_name="tile", smoothing_sigma=23.8)
    assert model.eval()(some_images()).anomaly_map.isfinite().all()


@pytest.mark.slow
def test_command_prints_a_table_and_writes_every_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "UNSEEN_CATEGORIES", ("leather",))
    monkeypatch.setattr(study, "ZERO_SHOT", {"plain": {}, "smooth": {"smoothing_sigma": 2.0}})
    monkeypatch.setattr(study, "FEW_SHOT", {"plain": {}, "share": {"top_share": 0.01}})
    study.main(["--root", str(tmp_path), "--seeds", "1", "--first-seed", "7", "--out", str(tmp_path / "options.json")])
    figures = json.loads((tmp_path / "options.json").read_text())["figures"]["leather"]
    assert set(figures) == {"0-shot, plain", "0-shot, smooth", "4-shot, plain", "4-shot, share"}
    assert (
        f"| 0-shot, smooth | {np.mean(figures['0-shot, smooth']['pixel AUROC']):.3f} ± 0.000" in capsys.readouterr().out
    )
    # Smoothing is of the map, the share of the score.
    assert figures["0-shot, plain"]["image AUROC"] == figures["0-shot, smooth"]["image AUROC"]
    assert figures["0-shot, plain"]["pixel AP"] != figures["0-shot, smooth"]["pixel AP"]
    assert figures["4-shot, plain"]["AUPRO"] == figures["4-shot, share"]["AUPRO"]
