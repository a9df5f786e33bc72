"""A memory bank in the features of a vision tower of its own, against anomalib's AnomalyDINO, and through a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from anomalib.models.components.feature_extractors.timm import _disable_pos_embed_antialiasing
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import vision_transformer
from torch import Tensor

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import VisionOutput, load_clip
from anomalib_aprilgan.clip.vision_tower import TowerArchitecture, load_tower
from anomalib_aprilgan.data.pre_processing import CLIP_MEAN, CLIP_STD
from anomalib_aprilgan.evaluation.many_banks import predict_banks
from anomalib_aprilgan.network.memory_bank import VisionMemoryBank
from anomalib_aprilgan.network.scoring import nearest_normal_distance
from anomalib_aprilgan.runtime.openvino_core import compiled

from ..towers import write
from .runs import by_path, category, engine, good

Build = Callable[..., AprilGAN]
SMALL = "vit_tiny_patch16_224.augreg_in21k"  # without registers; its patches tile the small CLIP's 96 pixels
NOTHING = VisionOutput([], torch.zeros(0), ())


def weights_of(name: str, path: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, num_classes=0)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_of(SMALL, tmp_path_factory.mktemp("tower") / "tower.safetensors")


@pytest.fixture
def arguments(weights: Path) -> dict[str, Any]:
    references = {"k_shot": 2, "references": str(good("bottle")), "class_name": "bottle"}
    return references | {"memory_backbone": SMALL, "memory_pretrained": str(weights)}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    ["vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m"],
)
def test_distances_are_those_of_anomaly_dino(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights_of(name, tmp_path / "dino.safetensors")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda model, **given: create(model, **given | {"pretrained": False}))
    theirs = AnomalyDINOModel(encoder_name=name)
    monkeypatch.undo()
    size = timm.get_pretrained_cfg(name).input_size[1:]
    architecture = TowerArchitecture.load(name, tuple(size), exact=True)
    tower = load_tower(architecture, str(path))
    trunk = theirs.feature_encoder.feature_extractor
    missing, unexpected = trunk.load_state_dict(tower.trunk.state_dict(), strict=False)
    assert not [key for key in missing if not key.startswith("head.")]
    assert not unexpected
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    references, seen = images[:2], images[2:]
    with torch.no_grad():
        theirs.train()(references)
        theirs.fit()
        theirs.eval()
        features = theirs.extract_features(seen)
        expected = (1 - torch.nn.functional.normalize(features[0], dim=1) @ theirs.memory_bank.T).amin(dim=1)
        bank = VisionMemoryBank(architecture, (len(architecture.shapes),), architecture.statistics)
        bank.attach_tower(tower)
        bank.set_rows([None])
        bank.fill(0, references, NOTHING)
        tokens = bank.tokens_of(seen, NOTHING)[0]
        found = nearest_normal_distance(tokens, list(bank.banks_of(bank.features(0))[0]))[0]
        score = theirs(seen).pred_score
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.mean_top1p(found[None]), score, atol=1e-5, rtol=0)
    assert expected.max() > 0.05


def test_images_come_at_its_own_size_and_with_its_own_statistics(weights: Path) -> None:
    architecture = TowerArchitecture.load(SMALL, (64, 32), exact=True)
    bank = VisionMemoryBank(architecture, (12,), (CLIP_MEAN, CLIP_STD))
    bank.attach_tower(load_tower(architecture, str(weights)))
    pixels = torch.randint(256, (1, 3, 64, 32), generator=torch.Generator().manual_seed(0)) / 255

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    expected = bank.tower(normalised(*architecture.statistics), (12,))[0]
    torch.testing.assert_close(bank.tokens_of(normalised(CLIP_MEAN, CLIP_STD), NOTHING)[0], expected)
    larger = normalised(CLIP_MEAN, CLIP_STD).repeat_interleave(2, dim=-1)
    assert bank.tokens_of(larger, NOTHING)[0].shape == (1, 8, 192)


@pytest.mark.parametrize(
    ("name", "size", "depth", "width", "grid", "normalises"),
    [
        ("resnet18.a1_in1k", (96, 128), 5, 512, (3, 4), True),
        ("convnextv2_atto.fcmae", (96, 64), 4, 320, (3, 2), True),
        ("hiera_tiny_224.mae", (224, 224), 4, 768, (7, 7), False),
        ("vit_small_patch16_dinov3.lvd1689m", (96, 64), 12, 384, (6, 4), True),
    ],
)
def test_towers_of_other_kinds(
    name: str, size: tuple[int, int], depth: int, width: int, grid: tuple[int, int], normalises: bool, tmp_path: Path
) -> None:
    architecture = TowerArchitecture.load(name, size, exact=True)
    assert (len(architecture.shapes), architecture.shapes[-1]) == (depth, (width, grid))
    assert architecture.normalises is normalises
    tower = load_tower(architecture, str(weights_of(name, tmp_path / "tower.safetensors")))
    with torch.no_grad():
        tokens = tower(torch.randn(2, 3, *size), (depth,))[0]
    assert tokens.shape == (2, grid[0] * grid[1], width)
    assert tokens.isfinite().all()


def test_positions_are_resized_alike_after_anomaly_dino_was_there(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write("siglip", tmp_path)

    def positions() -> list[Tensor]:
        tower = load_tower(TowerArchitecture.load(SMALL, (96, 64), exact=True), str(weights))
        architecture = ClipArchitecture.load(str(clip.backbone), (96, 64), None)
        return [one.pos_embed for one in (tower.trunk, load_clip(architecture, str(clip.weights)).visual.trunk)]

    monkeypatch.setattr(vision_transformer, "resample_abs_pos_embed", resample_abs_pos_embed)
    before = positions()
    _disable_pos_embed_antialiasing()  # what AnomalyDINO does to timm
    replaced = vision_transformer.resample_abs_pos_embed
    assert replaced is not resample_abs_pos_embed
    assert all(torch.equal(one, other) for one, other in zip(before, positions(), strict=True))
    assert vision_transformer.resample_abs_pos_embed is replaced  # AnomalyDINO's own stays


class TestModel:
    @pytest.mark.thorough
    def test_from_engine_to_exports(self, april_gan: Build, arguments: dict[str, Any], tmp_path: Path) -> None:
        model = april_gan(**arguments)
        assert model.settings.memory_stages == (12,)
        first = engine(tmp_path)
        seen = by_path(first.predict(model, datamodule=category("bottle"), return_predictions=True))
        first.trainer.save_checkpoint(tmp_path / "model.ckpt")
        assert (tmp_path / "model.ckpt").stat().st_size < 2e6  # no tower
        again = AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt", references=None, weights_only=False)
        found = by_path(engine(tmp_path).predict(again, datamodule=category("bottle"), return_predictions=True))
        for path, of_image in seen.items():
            torch.testing.assert_close(found[path]["anomaly_map"], of_image["anomaly_map"], atol=1e-6, rtol=0)
        in_clip = april_gan(k_shot=2, references=arguments["references"], class_name="bottle")
        others = by_path(engine(tmp_path).predict(in_clip, datamodule=category("bottle"), return_predictions=True))
        assert any(not torch.allclose(others[path]["anomaly_map"], seen[path]["anomaly_map"]) for path in seen)
        model.post_processor.enable_normalization = False
        onnx = model.eval().to_onnx(tmp_path)
        session = onnxruntime.InferenceSession(onnx)
        graph = compiled(onnx)
        images = torch.randint(256, (2, 3, 96, 96), generator=torch.Generator().manual_seed(0)) / 255
        with torch.no_grad():
            expected = model(images).anomaly_map.numpy()
        names = [output.name for output in session.get_outputs()]
        by_onnx = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
        assert np.abs(by_onnx["anomaly_map"] - expected).max() < 1e-4
        assert np.abs(graph(images.numpy())["anomaly_map"] - expected).max() < 1e-4

    def test_many_banks_from_one_pass_equal_predictions_one_by_one(
        self, april_gan: Build, arguments: dict[str, Any]
    ) -> None:
        model = april_gan(**arguments | {"k_shot": 3, "memory_stages": [6, 12], "memory_image_size": 64})
        model.setup("predict")
        network, images = model.model, torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        banks = [[], [2], [2, 0]]
        _, maps = predict_banks(network, network.few_shot, images, banks)
        for bank, found in zip(banks, maps, strict=True):
            with torch.no_grad():
                alone = network.predict(images, without={0, 1, 2} - set(bank), few_shot=bool(bank))
            torch.testing.assert_close(found, alone.anomaly_map, atol=1e-6, rtol=0)

    def test_half_precision(self, april_gan: Build, arguments: dict[str, Any]) -> None:
        model = april_gan(**arguments)
        model.setup("predict")
        images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model.model.predict(images)
            found = model.model.bfloat16().predict(images)
        torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, atol=0.1, rtol=0)

    def test_a_bank_of_another_tower_is_refused(
        self, april_gan: Build, arguments: dict[str, Any], tmp_path: Path
    ) -> None:
        model = april_gan(**arguments)
        first = engine(tmp_path)
        first.predict(model, datamodule=category("bottle"))
        first.trainer.save_checkpoint(tmp_path / "model.ckpt")
        others = str(weights_of(SMALL, tmp_path / "others.safetensors", seed=1))
        other = april_gan(**arguments | {"memory_pretrained": others})
        with pytest.raises(ValueError, match=r"`memory_pretrained`: the checkpoint's memory bank was made with"):
            engine(tmp_path).predict(other, datamodule=category("bottle"), ckpt_path=tmp_path / "model.ckpt")
        in_clip = april_gan(k_shot=2, references=arguments["references"], class_name="bottle")
        with pytest.raises(ValueError, match=r"`memory_backbone` of the checkpoint is vit_tiny.*, of the model None"):
            engine(tmp_path).predict(in_clip, datamodule=category("bottle"), ckpt_path=tmp_path / "model.ckpt")


class TestBadInput:
    @pytest.mark.parametrize(
        ("given", "text"),
        [
            ({"memory_backbone": "vit_of_nobody"}, r"`memory_backbone` must be a model of timm, .*got 'vit_of_nobody'"),
            ({"memory_backbone": "hf-hub:some/model"}, r"`memory_backbone` must be a model of timm"),
            ({"memory_backbone": "vit_tiny_patch16_224.no_such_tag"}, r"`memory_backbone` must be a model of timm"),
            ({"memory_backbone": SMALL, "memory_image_size": 100}, r"`memory_image_size` must be a multiple of .* 16"),
            ({"memory_backbone": SMALL, "memory_stages": [13]}, r"`memory_stages` must lie in \[1, 12\] for vit_tiny"),
            ({"memory_image_size": 96}, r"`memory_image_size` is that of a `memory_backbone`"),
            ({"memory_pretrained": "file"}, r"`memory_pretrained` are the weights of a `memory_backbone`"),
            ({"memory_backbone": SMALL, "few_shot": "no"}, r"`few_shot` must be one of"),
            (
                {"memory_backbone": "mixer_b16_224.goog_in21k"},
                r"`memory_image_size`: mixer_b16.* cannot take .*Its own size is 224",
            ),
        ],
    )
    def test_is_told(self, april_gan: Build, given: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            april_gan(**given)

    def test_weights_of_another_tower(self, april_gan: Build, arguments: dict[str, Any], tmp_path: Path) -> None:
        save_file({"something": torch.zeros(2)}, tmp_path / "weights.safetensors")
        model = april_gan(**arguments | {"memory_pretrained": str(tmp_path / "weights.safetensors")})
        with pytest.raises(ValueError, match=r"`memory_pretrained`: the weights of .* are not those of vit_tiny"):
            model.setup("predict")
        model = april_gan(**arguments | {"memory_pretrained": str(tmp_path / "missing.safetensors")})
        with pytest.raises(FileNotFoundError, match=r"`memory_pretrained`: no weight file"):
            model.setup("predict")

    def test_published_weights_that_cannot_be_had(
        self, april_gan: Build, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HOME", str(tmp_path))
        model = april_gan(**arguments | {"memory_pretrained": None})
        with pytest.raises(FileNotFoundError, match=r"`memory_backbone='vit_tiny.*HF_HUB_OFFLINE .*memory_pretrained="):
            model.setup("predict")
