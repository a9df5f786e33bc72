"""A CLIP of every family: open_clip's features, and the model from training to its exports."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from anomalib_aprilgan import AprilGAN, training
from anomalib_aprilgan.clip import library, library_text
from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import load_clip
from anomalib_aprilgan.runtime.openvino_core import compiled

from ..towers import FAMILIES, Files, open_clips_own, write
from .runs import adapters, auxiliary, by_path, category, engine, equal, good

Build = Callable[..., AprilGAN]
SENTENCES = ["a photo of a flawless bottle", "damaged bottle", "the bottle with a defect in this object"]
# Families whose text tower looks no further than the end of a sentence.
CUT = {"vit", "resnet", "eva02", "pe", "vitamin", "convnext", "worldwide"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Files]:
    return request.param, write(request.param, tmp_path_factory.mktemp(request.param))


def native_size(files: Files) -> tuple[int, int]:
    side = files.config["vision_cfg"]["image_size"]
    return side, side


def random_images(size: tuple[int, int], number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(0))


class TestFeatures:
    def test_images_are_those_of_open_clip(self, family: tuple[str, Files]) -> None:
        _, files = family
        architecture = ClipArchitecture.load(str(files.backbone), native_size(files), None)
        clip, images = load_clip(architecture, str(files.weights)), random_images(native_size(files))
        with torch.no_grad():
            expected = open_clips_own(files).encode_image(images, normalize=False)
            stages = architecture.check_stages("auto")
            output, alone = clip(images, stages), clip(images, ())
        torch.testing.assert_close(output.image_feature, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.image_feature, expected, atol=1e-5, rtol=1e-5)
        for tokens, shape in zip(output.patch_tokens, architecture.shapes_of(stages), strict=True):
            assert tokens.shape == (2, shape.grid[0] * shape.grid[1], shape.width)
            assert tokens.std() > 1e-3

    def test_tokens_are_those_of_the_image_at_their_place(self, family: tuple[str, Files]) -> None:
        """Row-major, whatever the tower's own layout: a changed corner changes the tokens near it most."""
        _, files = family
        architecture = ClipArchitecture.load(str(files.backbone), files.image_size, None)
        clip, images = load_clip(architecture, str(files.weights)), random_images(files.image_size, 1)
        changed = images.clone()
        height, width = files.image_size
        changed[..., : height // 4, -width // 4 :] += 2.0  # the upper right corner
        shape = architecture.shapes[0]
        tokens, others = (clip(image, (1,)).patch_tokens[0].view(*shape.grid, -1) for image in (images, changed))
        difference = (tokens - others).norm(dim=-1)
        rows, columns = shape.grid
        row, column = divmod(int(difference.argmax()), columns)
        assert row < rows / 2
        assert column >= columns / 2

    def test_texts_are_those_of_open_clip_with_and_without_the_cut(self, family: tuple[str, Files]) -> None:
        name, files = family
        clip = load_clip(ClipArchitecture.load(str(files.backbone), native_size(files), None), str(files.weights))
        tokens = library_text.tokens_of(*clip._tokenizing, tuple(SENTENCES))
        with torch.no_grad():
            expected = open_clips_own(files).encode_text(tokens, normalize=False)
            for cut_context in (True, False):
                found = clip.encode_text(SENTENCES, cut_context=cut_context)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(F.normalize(expected[0], dim=0), F.normalize(expected[1], dim=0), atol=1e-3)
        cut = library_text.encode_cut_tokens(clip.text, tokens)
        assert (cut is not None) is (name in CUT)

    def test_a_cut_that_changes_features_is_not_taken(
        self, family: tuple[str, Files], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, files = family
        clip = load_clip(ClipArchitecture.load(str(files.backbone), native_size(files), None), str(files.weights))
        whole = clip.encode_text(SENTENCES, cut_context=False)
        encode = library_text.encode_tokens
        monkeypatch.setattr(library_text, "encode_cut_tokens", lambda text, tokens: 1.01 * encode(text, tokens))
        torch.testing.assert_close(clip.encode_text(SENTENCES), whole)

    def test_temperature_is_the_logit_scale(self, family: tuple[str, Files], tmp_path: Path) -> None:
        _, files = family
        weights = load_file(files.weights) | {"logit_scale": torch.tensor(2.0)}
        save_file(weights, tmp_path / "clip.safetensors")
        architecture = ClipArchitecture.load(str(files.backbone), native_size(files), None)
        clip = load_clip(architecture, str(tmp_path / "clip.safetensors"))
        assert clip.temperature == pytest.approx(float(torch.tensor(2.0).exp()))


@pytest.mark.thorough
class TestModel:
    """Adapters are trained for two steps, then images inspected without and with references, saved and exported."""

    @pytest.fixture(scope="class")
    @staticmethod
    def arguments(family: tuple[str, Files]) -> dict[str, Any]:
        _, files = family
        return {
            "backbone": str(files.backbone),
            "pretrained": str(files.weights),
            "image_size": files.image_size,
            "temperature": "model",  # 14: the published 100 enlarges the rounding of random features
            "prompts": {"normal": ["flawless {}"], "anomalous": ["damaged {}"], "templates": ["a photo of a {}."]},
        }

    @pytest.fixture(scope="class")
    @staticmethod
    def trained(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        model = AprilGAN(adapters=None, **arguments)
        before = adapters(model)
        engine(folder, max_steps=2).fit(model, datamodule=auxiliary())
        assert not equal(before, adapters(model))
        return model.save_adapters(folder / "adapters.safetensors")

    @pytest.mark.parametrize("k_shot", [pytest.param(0, marks=pytest.mark.slow), 2])
    def test_from_engine_to_exports(
        self, arguments: dict[str, Any], trained: Path, tmp_path: Path, k_shot: int
    ) -> None:
        given = arguments | {"adapters": str(trained), "class_name": "bottle", "evaluator": False, "visualizer": False}
        references = str(good("bottle")) if k_shot else None
        model = AprilGAN(k_shot=k_shot, references=references, **given)
        first = engine(tmp_path)
        seen = by_path(first.predict(model, datamodule=category("bottle"), return_predictions=True))
        first.trainer.save_checkpoint(tmp_path / "model.ckpt")
        again = AprilGAN.load_from_checkpoint(tmp_path / "model.ckpt", references=None, weights_only=False)
        if k_shot:
            assert (tmp_path / "model.ckpt").stat().st_size < 50e6
        found = by_path(engine(tmp_path).predict(again, datamodule=category("bottle"), return_predictions=True))
        assert seen.keys() == found.keys()
        for path, of_image in seen.items():
            torch.testing.assert_close(found[path]["anomaly_map"], of_image["anomaly_map"], atol=1e-5, rtol=0)
            assert of_image["anomaly_map"].isfinite().all()
        _check_exports(model, tmp_path)


def _check_exports(model: AprilGAN, folder: Path) -> None:
    model.post_processor.enable_normalization = False
    onnx = model.eval().to_onnx(folder)
    session = onnxruntime.InferenceSession(onnx)
    names = [output.name for output in session.get_outputs()]
    graph = compiled(onnx)
    size = model.settings.architecture.image_size  # another would be resized to 8 bits, where rounding tips
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    images = (images * 255).round() / 255
    with torch.no_grad():
        expected = model(images)
    by_onnx = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    by_openvino = graph(images.numpy())
    for name in ("anomaly_map", "pred_score"):
        wanted = getattr(expected, name).numpy()
        assert np.abs(by_onnx[name] - wanted).max() < 1e-4
        assert np.abs(by_openvino[name] - wanted).max() < 1e-4


def test_stages_of_a_resnet_follow_the_authors_rule(tmp_path: Path) -> None:
    """Layers 1 to 4, ``dim_in * 2 ** (i + 2)`` wide, on square grids of their own (authors' model.py)."""
    architecture = ClipArchitecture.load("RN50", (224, 224), None)
    assert architecture.check_stages("auto") == (1, 2, 3, 4)
    assert [shape.width for shape in architecture.shapes] == [64 * 2 ** (i + 2) for i in range(4)]
    assert [shape.grid for shape in architecture.shapes] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    files = write("resnet", tmp_path)
    model = AprilGAN(str(files.backbone), str(files.weights), image_size=64, adapters=None)
    assert [layer.in_features for layer in model.model.adapters.fc] == [8 * 2 ** (i + 2) for i in range(4)]
    model.setup("fit")
    images = random_images((64, 64))
    visual, adapted = model.model.backbone.visual, []
    stream = visual.stem(images)
    layers = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
    for layer, linear in zip(layers, model.model.adapters.fc, strict=True):
        stream = layer(stream)
        batch, channels, *_ = stream.shape
        adapted.append(linear(stream.view(batch, channels, -1).permute(0, 2, 1).contiguous()))
    found = model.model.adapters(model.model.encode(images).patch_tokens)
    for ours, theirs in zip(found, adapted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


class TestBadInput:
    @pytest.mark.parametrize(
        ("backbone", "stages", "most"),
        [("RN50", [5], 4), ("convnext_base", [1, 5], 4), ("ViT-B-16-SigLIP2", [13], 12), ("MobileCLIP2-S4", [0], 5)],
    )
    def test_stages_out_of_range(self, backbone: str, stages: list[int], most: int) -> None:
        with pytest.raises(ValueError, match=rf"`stages` must lie in \[1, {most}\] for {backbone}, got {stages[-1]}"):
            AprilGAN(backbone, image_size=448 if most != 5 else 512, stages=stages)

    @pytest.mark.parametrize(
        ("backbone", "patch", "nearest"),
        [("RN50", 32, 512), ("ViT-B-16-SigLIP2", 16, 512), ("MobileCLIP2-S4", 64, 512), ("ViTamin-S", 16, 512)],
    )
    def test_sizes_that_do_not_fit(self, backbone: str, patch: int, nearest: int) -> None:
        text = rf"`image_size` must be a multiple of {backbone}'s patch of {patch} .* fits is {nearest} x {nearest}"
        with pytest.raises(ValueError, match=text):
            AprilGAN(backbone)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("mixer_b16_224", r"`image_size`: .*no_clip.json cannot take images of 64 x 64 pixels"),
            (
                "hf-hub:somebody/model",
                r"`backbone`: timm_model_name of .* must be a model of timm, got hf",
            ),
            ("no_such_model", r"`backbone`: open_clip .* cannot build .*no_clip.json: RuntimeError: Unknown model"),
        ],
    )
    def test_towers_that_are_none(self, tmp_path: Path, name: str, text: str) -> None:
        vision = {"timm_model_name": name, "image_size": 224, "timm_proj": "linear"}
        config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {}, "custom_text": True}
        (tmp_path / "no_clip.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=text):
            AprilGAN(str(tmp_path / "no_clip.json"), image_size=64)

    @pytest.mark.parametrize(
        ("part", "key", "value"),
        [
            ("multimodal_cfg", "width", 10**9),
            ("multimodal_cfg", "layers", "2"),
            ("vision_cfg", "attn_pooler_queries", 0),
        ],
    )
    def test_sizes_that_no_clip_has(self, tmp_path: Path, part: str, key: str, value: object) -> None:
        config = json.loads(json.dumps(FAMILIES["coca"][1]))
        config[part][key] = value
        (tmp_path / "coca.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"`backbone`: {part}.{key} of .*coca.json must be an int from 1 to"):
            AprilGAN(str(tmp_path / "coca.json"), image_size=64)

    def test_a_tower_without_a_grid(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(timm.models.fastvit.FastVit, "forward_intermediates")  # timm has none now
        files = FAMILIES["mobileclip"][1] | {"embed_dim": 23}  # not in a cache
        (tmp_path / "no_grid.json").write_text(json.dumps(files))
        with pytest.raises(ValueError, match=r"`backbone`: the vision tower of .*no_grid.json gives no grid of feat"):
            AprilGAN(str(tmp_path / "no_grid.json"), image_size=256)
        with pytest.raises(ValueError, match=r"`memory_backbone`: fastvit_mci0.apple_mclip gives no grid of features"):
            AprilGAN(memory_backbone="fastvit_mci0.apple_mclip")

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf"), "mode", True])
    def test_temperature(self, temperature: object) -> None:
        with pytest.raises((ValueError, TypeError), match=r"`temperature` must be a number above 0 .*\"model\""):
            AprilGAN(temperature=temperature)

    def test_a_tokenizer_that_cannot_be_had(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        files = write("siglip", tmp_path)
        config = json.loads(files.backbone.read_text())
        config["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "nowhere")
        files.backbone.write_text(json.dumps(config))
        model = AprilGAN(str(files.backbone), str(files.weights), image_size=64, adapters=None, class_name="nut")
        with pytest.raises(FileNotFoundError, match=r"'.*nowhere'.*could not be had.*text_cfg.hf_tokenizer_name"):
            model.setup("predict")

    @pytest.mark.parametrize("part", ["tokenizer", "text"])
    def test_no_code_of_a_folder_is_run(self, tmp_path: Path, part: str) -> None:
        files = write("roberta", tmp_path)
        (tmp_path / part / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
        name = "tokenizer_config.json" if part == "tokenizer" else "config.json"
        content = json.loads((tmp_path / part / name).read_text())
        content |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}}
        content |= {"tokenizer_class": "Evil"} if part == "tokenizer" else {"model_type": "evil"}
        (tmp_path / part / name).write_text(json.dumps(content))
        model = AprilGAN(str(files.backbone), str(files.weights), image_size=64, adapters=None, class_name="nut")
        with contextlib.suppress(ValueError, FileNotFoundError):  # or it is read without the code
            model.setup("predict")
        assert not (tmp_path / "ran").exists()

    def test_code_cannot_be_asked_for(self, tmp_path: Path) -> None:
        files = write("siglip", tmp_path)
        config = json.loads(files.backbone.read_text())
        config["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
        files.backbone.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"`backbone`: tokenizer_kwargs of .* keys out of clean, .*trust_remote"):
            AprilGAN(str(files.backbone), str(files.weights), image_size=64)

    def test_without_transformers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = write("siglip", tmp_path)
        monkeypatch.setitem(sys.modules, "transformers", None)
        monkeypatch.setattr(library, "find_spec", lambda _: None)
        library_text.tokenizer.cache_clear()
        library_text.tokens_of.cache_clear()
        model = AprilGAN(str(files.backbone), str(files.weights), image_size=64, adapters=None, class_name="nut")
        with pytest.raises(ImportError, match=r"needs the package transformers: .*anomalib-aprilgan\[huggingface\]"):
            model.setup("predict")

    def test_adapters_of_another_clip(self, tmp_path: Path) -> None:
        for family in ("vit", "worldwide"):
            (tmp_path / family).mkdir()
        first, second = (write(family, tmp_path / family) for family in ("vit", "worldwide"))
        trained = AprilGAN(str(first.backbone), str(first.weights), image_size=64, adapters=None, class_name="nut")
        trained.setup("fit")
        training.note(trained.made, trained.model, None)
        path = trained.save_adapters(tmp_path / "adapters.safetensors")
        other = AprilGAN(str(second.backbone), str(second.weights), image_size=64, adapters=str(path), class_name="nut")
        with pytest.raises(ValueError, match=r"`adapters`: .* was trained for the CLIP .*vit.json with weights"):
            other.setup("predict")
