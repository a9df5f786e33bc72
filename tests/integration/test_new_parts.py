"""A score fusion is added by one function and one argument, a few-shot scorer by one class and one argument."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import VisionOutput
from anomalib_aprilgan.data import MultiCategoryData
from anomalib_aprilgan.decision.fusion import FUSIONS
from anomalib_aprilgan.network import SCORERS
from anomalib_aprilgan.network.few_shot import FewShotScorer, rows_in

from ..conftest import DATASET
from .runs import by_path, category, engine, good, read

Build = Callable[..., AprilGAN]
CLASSES = ["bottle", "tile"]
NEW = DATASET / "bottle" / "test" / "hole"


def more_certain(text_probability: Tensor, statistic: Tensor) -> Tensor:
    """The more certain of text and map; neither of them can lower it."""
    return torch.maximum(text_probability, statistic)


class TextureScorer(FewShotScorer):
    """Compares patches by a fixed random convolution of the image; CLIP has no part in it."""

    SIDE, WIDTH = 8, 16

    def __init__(self, architecture: ClipArchitecture, stages: Sequence[int], neighbourhood: int = 1) -> None:
        del architecture, stages, neighbourhood
        super().__init__()
        self.map_limit, self.map_ceiling = 1.0, 2.0
        generator = torch.Generator().manual_seed(0)
        filters = torch.randn(self.WIDTH, 3, self.SIDE, self.SIDE, generator=generator)
        self.register_buffer("filters", filters, persistent=False)
        self.filters: Tensor

    def fill(self, row: int, images: Tensor, output: VisionOutput) -> None:
        del output
        self.set_features(row, self.tokens(images))

    def distance_maps(
        self, images: Tensor, output: VisionOutput, rows: Tensor | None, without: Collection[int] = ()
    ) -> Tensor:
        del output
        tokens, size = self.tokens(images), (images.shape[-2], images.shape[-1])
        distances = tokens.new_zeros(tokens.shape[:2])
        for row, chosen in rows_in(rows, len(self.remembered)):
            bank = self.features(row)
            kept = bank[[shot for shot in range(len(bank)) if shot not in without]].flatten(0, 1)
            distances[chosen] = 1.0 - (tokens[chosen] @ kept.T).amax(dim=-1)
        grid = distances.unflatten(1, (size[0] // self.SIDE, size[1] // self.SIDE))
        return F.interpolate(grid[:, None], size, mode="bilinear", align_corners=True)[:, 0]

    def tokens(self, images: Tensor) -> Tensor:
        """``(B, L, C)`` of unit length."""
        convolved = F.conv2d(images.float(), self.filters, stride=self.SIDE)
        return F.normalize(convolved.flatten(2).transpose(1, 2), dim=-1)


@pytest.fixture(autouse=True)
def new_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSIONS, "more_certain", more_certain)
    monkeypatch.setitem(SCORERS, "texture", TextureScorer)


def with_fusion(build: Build, **options: Any) -> AprilGAN:
    return build(k_shot=2, score_fusion="more_certain", visualizer=False, **options)


def with_scorer(build: Build, **options: Any) -> AprilGAN:
    return build(k_shot=2, few_shot="texture", visualizer=False, **options)


New = Callable[..., AprilGAN]
BOTH = pytest.mark.parametrize("new", [with_fusion, with_scorer])


def raw(model: AprilGAN, **data: Any) -> dict[str, dict[str, Tensor]]:
    """Predictions before they are put on the scale, by image file."""
    model.post_processor.enable_normalization = False
    found = by_path(engine(Path(model.trainer.default_root_dir) / "raw").predict(model, **data))
    model.post_processor.enable_normalization = True
    return found


# -- what the new parts compute is what comes out ----------------------------------------------------


def test_scores_are_those_of_the_new_fusion(april_gan: Build, tmp_path: Path) -> None:
    model = with_fusion(april_gan)
    runner = engine(tmp_path)
    runner.validate(model, datamodule=category("bottle"), verbose=False)
    (printed,) = runner.test(model, datamodule=category("bottle"), verbose=False)
    found = raw(model, datamodule=category("bottle"))
    text = by_path(
        engine(tmp_path / "text").predict(
            april_gan(post_processor=False, evaluator=False, visualizer=False), datamodule=category("bottle")
        )
    )
    values = model.post_processor.values()
    low, high = values["map_maximum_min"], values["map_maximum_max"]
    assert {path: image["pred_score"].item() for path, image in found.items()} == pytest.approx(
        {
            path: max(text[path]["pred_score"].item(), (image["anomaly_map"].amax().item() - low) / (high - low))
            for path, image in found.items()
        },
        abs=1e-5,
    )
    scores = [image["pred_score"].item() for image in found.values()]
    labels = [bool(image["gt_label"]) for image in found.values()]
    assert printed["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    published = april_gan(k_shot=2, visualizer=False)
    engine(tmp_path / "published").validate(published, datamodule=category("bottle"), verbose=False)
    assert raw(published, datamodule=category("bottle"))[path_of(found)]["pred_score"] != scores[0]


def path_of(found: dict[str, Any]) -> str:
    return next(iter(found))


def test_maps_are_those_of_the_new_scorer(april_gan: Build, tmp_path: Path) -> None:
    model = with_scorer(april_gan)
    runner = engine(tmp_path)
    runner.validate(model, datamodule=category("bottle"), verbose=False)
    (printed,) = runner.test(model, datamodule=category("bottle"), verbose=False)
    assert 0 <= printed["pixel_AUROC"] <= 1
    options: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
    zero_shot = by_path(engine(tmp_path / "zero").predict(april_gan(**options), datamodule=category("bottle")))
    found = raw(model, datamodule=category("bottle"))

    scorer = TextureScorer(model.settings.architecture, ())
    references = torch.cat([model.pre_processor(read(path)) for path in model.made.references["bottle"]])
    bank = scorer.tokens(references).flatten(0, 1)
    for path, image in found.items():
        distances = 1 - (scorer.tokens(model.pre_processor(read(path)))[0] @ bank.T).amax(dim=-1)
        grid = distances.view(1, 1, 12, 12)
        expected = F.interpolate(grid, (96, 96), mode="bilinear", align_corners=True)[0, 0]
        torch.testing.assert_close(image["anomaly_map"] - zero_shot[path]["anomaly_map"], expected, atol=1e-5, rtol=0)
        assert image["anomaly_map"].amax() <= model.post_processor.map_ceiling == 4 + 2


def test_a_reference_is_held_out_of_the_new_scorer(april_gan: Build) -> None:
    files = sorted(good("bottle").iterdir())[:2]
    model = with_scorer(april_gan, class_name="bottle", references=[str(file) for file in files])
    model.setup("predict")
    other = april_gan(
        class_name="bottle", k_shot=1, few_shot="texture", references=[str(files[1])], post_processor=False
    ).eval()
    with torch.no_grad():
        held_out = model.predict(read(files[0]), without=(0,)).anomaly_map
        expected = other(read(files[0])).anomaly_map
    torch.testing.assert_close(held_out, expected, atol=1e-6, rtol=0)
    highest = model.post_processor.values()["map_maximum_min"]
    assert 0 < highest <= held_out.amax().item() + 1e-6


# -- and goes wherever the published ones go ---------------------------------------------------------


@BOTH
def test_new_parts_in_checkpoints(april_gan: Build, tmp_path: Path, new: New) -> None:
    model, runner = new(april_gan), engine(tmp_path)
    runner.test(model, datamodule=category("bottle"), verbose=False)
    expected = by_path(runner.predict(model, data_path=NEW))
    runner.trainer.save_checkpoint(tmp_path / "new.ckpt")
    restored = AprilGAN.load_from_checkpoint(tmp_path / "new.ckpt", visualizer=False)
    given = new(april_gan)
    for found in (
        engine(tmp_path / "a").predict(restored, data_path=NEW),
        engine(tmp_path / "b").predict(given, data_path=NEW, ckpt_path=tmp_path / "new.ckpt"),
    ):
        for path, image in by_path(found).items():
            assert torch.equal(image["pred_score"], expected[path]["pred_score"])
            assert torch.equal(image["anomaly_map"], expected[path]["anomaly_map"])
    published = april_gan(k_shot=2, visualizer=False)
    with pytest.raises(
        ValueError, match=r"`(few_shot|score_fusion)` of the checkpoint is .*Use the same value for both"
    ):
        engine(tmp_path / "c").predict(published, data_path=NEW, ckpt_path=tmp_path / "new.ckpt")


@pytest.mark.thorough
def test_new_parts_in_exports(april_gan: Build, tmp_path: Path) -> None:
    model = april_gan(k_shot=2, score_fusion="more_certain", few_shot="texture", visualizer=False)
    engine(tmp_path).test(model, datamodule=category("bottle"), verbose=False)
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    images = (images * 255).round() / 255
    with torch.no_grad():
        expected = model.eval()(images)
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path))
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
    np.testing.assert_allclose(found["pred_score"], expected.pred_score, atol=1e-5)
    np.testing.assert_allclose(found["anomaly_map"], expected.anomaly_map, atol=1e-4)


@BOTH
def test_new_parts_with_several_classes(april_gan: Build, tmp_path: Path, new: New) -> None:
    model, runner = new(april_gan), engine(tmp_path)
    data = MultiCategoryData("mvtec", DATASET, CLASSES, eval_batch_size=5, num_workers=0)
    (printed,) = runner.test(model, datamodule=data, verbose=False)
    together = by_path(runner.predict(model, datamodule=data))
    for name in CLASSES:
        alone, single = new(april_gan), engine(tmp_path / name)
        (of_class,) = single.test(alone, datamodule=category(name, eval_batch_size=5), verbose=False)
        assert printed[f"image_AUROC/{name}"] == pytest.approx(of_class["image_AUROC"], abs=1e-6)
        found = by_path(single.predict(alone, datamodule=category(name, eval_batch_size=5)))
        assert len(found) == 11
        for path, image in found.items():
            # In batches of other images, which some processors compute in an order that shows in the sixth digit.
            torch.testing.assert_close(together[path]["pred_score"], image["pred_score"], atol=5e-6, rtol=0)
            torch.testing.assert_close(together[path]["anomaly_map"], image["anomaly_map"], atol=5e-6, rtol=0)


@BOTH
def test_new_parts_are_calibrated(april_gan: Build, tmp_path: Path, new: New) -> None:
    given = {"class_name": "bottle", "references": str(good("bottle"))}
    model = new(april_gan, calibration="references", false_positive_rate=0.1, **given)
    batches = by_path(engine(tmp_path).predict(model, data_path=NEW))
    thresholds = model.post_processor.values()
    assert 0 < thresholds["image_threshold"] < 2
    for path, image in raw(model, data_path=NEW).items():
        above = image["pred_score"].item() > thresholds["image_threshold"]
        assert batches[path]["pred_label"].item() == above


def test_names_of_parts_are_checked(april_gan: Build) -> None:
    with pytest.raises(ValueError, match=r"`few_shot` must be one of memory_bank, texture, got 'dino'"):
        april_gan(few_shot="dino")
    with pytest.raises(ValueError, match=r"`score_fusion` must be one of .*more_certain, got 'product'"):
        april_gan(score_fusion="product")
