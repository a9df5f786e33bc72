"""The frozen CLIP: architectures, taps, text, files and tags of weights."""

import hashlib
import json
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.clip import weights
from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import ClipBackbone, load_clip
from anomalib_aprilgan.clip.weights import WeightsUnavailableError, image_statistics
from anomalib_aprilgan.demo import built_in

SENTENCES = ["a photo of a bolt.", "nut", "a jpeg corrupted photo of a bolt without any damage in the scene."]


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backbone(small_clip: Any) -> Callable[..., ClipBackbone]:
    def build(image_size: tuple[int, int] = (64, 64), quick_gelu: bool | None = None) -> ClipBackbone:
        architecture = ClipArchitecture.load(str(small_clip.gelu), image_size, quick_gelu)
        return load_clip(architecture, str(small_clip.weights))

    return build


def write_config(folder: Path, small_clip: Any, **changes: Any) -> Path:
    config = json.loads(small_clip.gelu.read_text())
    path = folder / "config.json"
    path.write_text(json.dumps(config | changes))
    return path


class TestArchitecture:
    def test_numbers_of_the_published_model(self) -> None:
        architecture = ClipArchitecture.load("ViT-L-14-336", (518, 518), None)
        assert (architecture.shapes[0].width, architecture.embed_dim, len(architecture.shapes)) == (1024, 768, 24)
        assert architecture.shapes[23].grid == (37, 37)
        assert architecture.quick_gelu is False  # the activation of the published results

    @pytest.mark.parametrize(
        ("name", "choice", "expected"),
        [
            ("ViT-B-32", None, False),
            ("ViT-B-32", True, True),
            ("ViT-B-32-quickgelu", None, True),
            ("ViT-B-32-quickgelu", False, False),
        ],
    )
    def test_activation_is_decided_here(self, name: str, choice: bool | None, expected: bool) -> None:
        assert ClipArchitecture.load(name, (224, 224), choice).quick_gelu is expected

    def test_open_clips_own_configuration_is_left_alone(self) -> None:
        ClipArchitecture.load("ViT-B-32", (64, 96), True)
        again = open_clip.get_model_config("ViT-B-32")
        assert again["vision_cfg"]["image_size"] == 224
        assert not again.get("quick_gelu", False)

    def test_file_with_a_wrapped_configuration(self, tmp_path: Path, small_clip: Any) -> None:
        path = tmp_path / "hub.json"
        path.write_text(json.dumps({"model_cfg": json.loads(small_clip.gelu.read_text()), "preprocess_cfg": {}}))
        assert ClipArchitecture.load(str(path), (96, 64), None).shapes[0].grid == (12, 8)

    def test_unknown_name(self) -> None:
        with pytest.raises(
            ValueError, match=r"`backbone` must be an open_clip architecture or .*got 'ViT-X'\. .*ViT-B-32"
        ):
            ClipArchitecture.load("ViT-X", (64, 64), None)

    @pytest.mark.parametrize(
        ("size", "nearest"),
        [((100, 96), "104 x 96|96 x 96"), ((96, 3), "96 x 8"), ((0, 64), "8 x 64"), ((-8, 64), "8 x 64")],
    )
    def test_size_that_patches_do_not_tile(self, small_clip: Any, size: tuple[int, int], nearest: str) -> None:
        text = rf"`image_size` must be .* patch of 8 pixels, got {size[0]} x {size[1]}\..* fits is ({nearest})\."
        with pytest.raises(ValueError, match=text):
            ClipArchitecture.load(str(small_clip.gelu), size, None)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"`backbone`: no model-config file .*absent\.json"):
            ClipArchitecture.load(str(tmp_path / "absent.json"), (64, 64), None)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not JSON"),
            ("[1, 2]", "must be an open_clip model config with embed_dim, vision_cfg and text_cfg"),
            ('{"embed_dim": 4}', "must be an open_clip model config"),
        ],
    )
    def test_unusable_file(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ClipArchitecture.load(str(tmp_path / "config.json"), (64, 64), None)

    def test_entry_that_open_clip_does_not_know(self, tmp_path: Path, small_clip: Any) -> None:
        path = write_config(tmp_path, small_clip, of_the_future=1)
        architecture = ClipArchitecture.load(str(path), (64, 64), None)
        with pytest.raises(ValueError, match=r"`backbone`: open_clip [\d.]+ cannot build .*of_the_future"):
            load_clip(architecture, str(small_clip.weights))


class TestStages:
    @pytest.fixture
    def architecture(self, small_clip: Any) -> ClipArchitecture:
        return ClipArchitecture.load(str(small_clip.gelu), (64, 64), None)

    def test_come_in_ascending_order(self, architecture: ClipArchitecture) -> None:
        assert architecture.check_stages([4, 1, 3]) == (1, 3, 4)

    @pytest.mark.parametrize("stage", [0, 5, -1, 25, True, 2.0, "2"])
    def test_out_of_range(self, architecture: ClipArchitecture, stage: object) -> None:
        with pytest.raises(ValueError, match=rf"`stages` must lie in \[1, 4\] for .*gelu\.json, got {stage!r}\."):
            architecture.check_stages([1, stage])

    def test_duplicates(self, architecture: ClipArchitecture) -> None:
        with pytest.raises(ValueError, match=r"`memory_stages` must be different blocks, got \(2, 3, 2\)\."):
            architecture.check_stages([2, 3, 2], "memory_stages")

    def test_none(self, architecture: ClipArchitecture) -> None:
        with pytest.raises(ValueError, match=r"`stages` must name at least one block of .*, got none\."):
            architecture.check_stages([])


class TestVision:
    def test_one_pass_equals_separate_passes(self, backbone: Callable[..., ClipBackbone]) -> None:
        clip, batch = backbone(), images(2, 3, 64, 64)
        together = clip(batch, [1, 2, 4])
        assert [tuple(tokens.shape) for tokens in together.patch_tokens] == [(2, 64, 64)] * 3
        for number, stage in enumerate([1, 2, 4]):
            alone = clip(batch, [stage])
            assert torch.equal(alone.patch_tokens[0], together.patch_tokens[number])
            assert torch.equal(alone.image_feature, together.image_feature)

    def test_image_feature_alone(self, backbone: Callable[..., ClipBackbone]) -> None:
        clip, batch = backbone(), images(2, 3, 64, 64)
        output = clip(batch, [])
        assert output.patch_tokens == []
        assert torch.equal(output.image_feature, clip(batch, [4]).image_feature)

    def test_image_feature_and_last_stage_are_open_clips(self, backbone: Callable[..., ClipBackbone]) -> None:
        """Against open_clip's own forward, and its last block before normalisation and projection."""
        clip, batch = backbone(), images(2, 3, 64, 64)
        caught = []
        handle = clip.visual.transformer.register_forward_hook(lambda *args: caught.append(args[-1]))
        expected = clip.visual(batch)
        handle.remove()
        output = clip(batch, [4])
        torch.testing.assert_close(output.image_feature, expected, atol=2e-5, rtol=1e-5)
        stream = caught[0] if caught[0].shape[0] == 2 else caught[0].transpose(0, 1)
        torch.testing.assert_close(output.patch_tokens[0], stream[:, 1:], atol=2e-5, rtol=1e-5)

    def test_batch_equals_single_images(self, backbone: Callable[..., ClipBackbone]) -> None:
        clip, batch = backbone(), images(3, 3, 64, 64)
        together = clip(batch, [2])
        for number in range(3):
            alone = clip(batch[number : number + 1], [2])
            torch.testing.assert_close(alone.patch_tokens[0][0], together.patch_tokens[0][number], atol=2e-5, rtol=1e-5)

    def test_image_that_is_not_square(self, backbone: Callable[..., ClipBackbone]) -> None:
        clip = backbone((96, 64))
        assert clip.architecture.shapes[0].grid == (12, 8)
        output = clip(images(1, 3, 96, 64), [1, 4])
        assert [tuple(tokens.shape) for tokens in output.patch_tokens] == [(1, 96, 64)] * 2
        assert output.image_feature.shape == (1, 40)
        assert output.image_feature.isfinite().all()

    def test_patches_run_row_by_row(self, backbone: Callable[..., ClipBackbone]) -> None:
        """A change in the patch of row 1, column 3 moves token 1 * 8 + 3 most."""
        clip, batch = backbone((96, 64)), images(1, 3, 96, 64)
        changed = batch.clone()
        changed[..., 8:16, 24:32] += 3.0
        moved = (clip(changed, [1]).patch_tokens[0] - clip(batch, [1]).patch_tokens[0]).norm(dim=-1)
        assert moved.argmax().item() == 11

    def test_activation_changes_the_tokens_and_none_is_the_configurations(
        self, backbone: Callable[..., ClipBackbone], small_clip: Any
    ) -> None:
        batch = images(1, 3, 64, 64)
        gelu, quick, default = (
            backbone(quick_gelu=choice)(batch, [4]).patch_tokens[0] for choice in (False, True, None)
        )
        assert torch.equal(default, gelu)
        assert (quick - gelu).abs().max() > 1e-3
        architecture = ClipArchitecture.load(str(small_clip.quick_gelu), (64, 64), None)
        named_quick = load_clip(architecture, str(small_clip.weights))
        assert torch.equal(named_quick(batch, [4]).patch_tokens[0], quick)


class TestFrozen:
    def test_nothing_requires_a_gradient_and_train_changes_nothing(self, backbone: Callable[..., ClipBackbone]) -> None:
        clip = backbone()
        assert sum(parameter.numel() for parameter in clip.parameters()) > 1e5
        assert not any(parameter.requires_grad for parameter in clip.parameters())
        assert clip.train() is clip
        assert not any(module.training for module in clip.modules())
        torch.nn.Sequential(clip).train()
        assert not any(module.training for module in clip.modules())

    def test_digest_tells_weights_apart_and_not_files(
        self, backbone: Callable[..., ClipBackbone], small_clip: Any, tmp_path: Path
    ) -> None:
        state_dict = load_file(small_clip.weights)
        torch.save({"state_dict": state_dict}, tmp_path / "same.pt")
        state_dict["visual.proj"] = state_dict["visual.proj"] + 1e-3
        save_file(state_dict, tmp_path / "other.safetensors")
        clip = backbone((96, 64))
        same, other = (load_clip(clip.architecture, str(tmp_path / name)) for name in ("same.pt", "other.safetensors"))
        assert same.digest == clip.digest == backbone().digest
        assert other.digest != clip.digest
        assert len(clip.digest) == 32


class TestText:
    def test_cut_context_equals_full_context(self, backbone: Callable[..., ClipBackbone]) -> None:
        clip = backbone()
        cut, full = clip.encode_text(SENTENCES), clip.encode_text(SENTENCES, cut_context=False)
        assert cut.shape == (3, 40)
        assert (cut - full).abs().max() < 2e-6

    def test_is_open_clips(self, backbone: Callable[..., ClipBackbone], small_clip: Any) -> None:
        clip = backbone()
        config = json.loads(small_clip.gelu.read_text())
        whole = open_clip.CLIP(**config)
        weights = load_file(small_clip.weights)
        whole.load_state_dict({**weights, "logit_scale": weights["logit_scale"].reshape(whole.logit_scale.shape)})
        with torch.no_grad():
            expected = whole.eval().encode_text(open_clip.tokenize(SENTENCES))
        torch.testing.assert_close(clip.encode_text(SENTENCES), expected, atol=2e-6, rtol=1e-5)

    def test_one_sentence_does_not_see_the_others(self, backbone: Callable[..., ClipBackbone]) -> None:
        clip = backbone()
        together = clip.encode_text(SENTENCES)
        for sentence, feature in zip(SENTENCES, together, strict=True):
            torch.testing.assert_close(clip.encode_text([sentence])[0], feature, atol=2e-6, rtol=1e-5)

    def test_states_are_normalised_means_of_normalised_sentences(self, backbone: Callable[..., ClipBackbone]) -> None:
        clip = backbone()
        features = clip.encode_states(SENTENCES[:2], SENTENCES[1:])
        assert features.shape == (40, 2)
        for column, sentences in enumerate((SENTENCES[:2], SENTENCES[1:])):
            rows = [clip.encode_text([sentence])[0] for sentence in sentences]
            mean = sum(row / row.norm() for row in rows) / 2
            torch.testing.assert_close(features[:, column], mean / mean.norm(), atol=1e-6, rtol=1e-5)

    def test_words_longer_than_the_context_are_cut(self, backbone: Callable[..., ClipBackbone]) -> None:
        feature = backbone().encode_text(["bolt " * 200])
        assert feature.shape == (1, 40)
        assert feature.isfinite().all()

    def test_without_a_text_tower(self, backbone: Callable[..., ClipBackbone]) -> None:
        clip = backbone()
        clip.text = None
        with pytest.raises(RuntimeError, match="carries no text tower"):
            clip.encode_states(["a"], ["b"])


class TestFiles:
    @pytest.fixture
    def architecture(self, small_clip: Any) -> ClipArchitecture:
        return ClipArchitecture.load(str(small_clip.gelu), (64, 64), None)

    @pytest.mark.parametrize("name", ["absent.pt", "folder/absent", "absent.safetensors"])
    def test_missing(self, architecture: ClipArchitecture, tmp_path: Path, name: str) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"`pretrained`: no weight file .*absent.* or an open_clip tag such as"
        ):
            load_clip(architecture, str(tmp_path / name))

    def test_weights_of_another_architecture(self, small_clip: Any) -> None:
        other = ClipArchitecture.load("ViT-B-32", (64, 64), None)
        with pytest.raises(
            ValueError, match=r"`pretrained`: the weights of .*clip\.safetensors are not those of ViT-B-32: "
        ):
            load_clip(other, str(small_clip.weights))

    @pytest.mark.parametrize(
        "changes",
        [
            {"embed_dim": 48},
            {"vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}},
            {"vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "head_width": 32, "patch_size": 16}},
        ],
    )
    def test_small_differences_of_architecture(self, small_clip: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
        architecture = ClipArchitecture.load(str(write_config(tmp_path, small_clip, **changes)), (64, 64), None)
        with pytest.raises(ValueError, match=r"are not those of .*config\.json: "):
            load_clip(architecture, str(small_clip.weights))

    def test_adapters_are_no_clip(self, architecture: ClipArchitecture, small_clip: Any, tmp_path: Path) -> None:
        path = tmp_path / "bare.pth"
        torch.save(torch.load(small_clip.adapters_4)["trainable_linearlayer"], path)
        with pytest.raises(ValueError, match=r"`pretrained`: the weights of .*bare\.pth are not those of"):
            load_clip(architecture, str(path))

    def test_no_connection_is_made(
        self, architecture: ClipArchitecture, small_clip: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            msg = "a connection was attempted"
            raise AssertionError(msg)

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        clip = load_clip(architecture, str(small_clip.weights))
        assert clip.encode_states(["good"], ["bad"]).shape == (40, 2)
        assert image_statistics(str(small_clip.gelu), str(small_clip.weights)) is None

    def test_statistics_of_a_file_are_those_of_all_published_weights(self) -> None:
        assert image_statistics("ViT-B-16-SigLIP", "weights.safetensors") == ((0.5,) * 3, (0.5,) * 3)

    def test_statistics_of_a_tag(self) -> None:
        mean, std = image_statistics("ViT-L-14-336", "openai")
        assert mean == (0.48145466, 0.4578275, 0.40821073)
        assert std == (0.26862954, 0.26130258, 0.27577711)


class TestTags:
    """The small CLIP under a tag that open_clip is made to know, in a home of its own."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        home = tmp_path / "home"
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        return home

    @pytest.fixture
    def load(self, small_clip: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ClipBackbone]:
        def build(**config: str) -> ClipBackbone:
            monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _model, tag: config if tag == "ours" else {})
            return load_clip(ClipArchitecture.load(str(small_clip.gelu), (64, 64), None), "ours")

        return build

    @staticmethod
    def url(digest: str) -> str:
        return f"https://openaipublic.azureedge.net/clip/models/{digest}/Tiny.pt"

    @pytest.fixture
    def in_clips_cache(self, home: Path, small_clip: Any) -> Path:
        path = home / ".cache" / "clip" / "Tiny.pt"
        path.parent.mkdir(parents=True)
        torch.save(load_file(small_clip.weights), path)
        return path

    @staticmethod
    def in_hub_cache(home: Path, small_clip: Any, name: str) -> None:
        repository = home / "hub" / "models--owner--clip"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        state_dict = load_file(small_clip.weights)
        save_file(state_dict, snapshot / name) if name.endswith("safetensors") else torch.save(
            state_dict, snapshot / name
        )

    def test_unknown_tag(self, small_clip: Any) -> None:
        with pytest.raises(
            ValueError, match=r"must be a weight file or a tag of ViT-B-32 \(.*openai.*\), got 'imagenet'\."
        ):
            load_clip(ClipArchitecture.load("ViT-B-32", (64, 64), None), "imagenet")
        with pytest.raises(ValueError, match=r"a tag of .*gelu\.json \(none: pass a file\), got 'openai'\."):
            load_clip(ClipArchitecture.load(str(small_clip.gelu), (64, 64), None), "openai")

    @pytest.mark.parametrize(("backbone", "tag"), [("ViT-B-32", "drawn"), ("ViT-drawn-96", "openai")])
    def test_the_built_in_clip_has_a_tag_of_its_own(self, backbone: str, tag: str) -> None:
        tags = "drawn" if backbone == built_in.ARCHITECTURE else ".*openai.*"
        with pytest.raises(ValueError, match=rf"a weight file or a tag of {backbone} \({tags}\), got '{tag}'\."):
            load_clip(ClipArchitecture.load(backbone, (96, 96), None), tag)

    def test_built_in_clip_is_an_ordinary_one(self) -> None:
        by_name = ClipArchitecture.load(built_in.ARCHITECTURE, (128, 64), None)
        by_file = ClipArchitecture.load(str(built_in.CONFIG), (128, 64), None)
        assert by_name.config == by_file.config
        clip, same = load_clip(by_name, built_in.PRETRAINED), load_clip(by_file, str(built_in.WEIGHTS))
        assert clip.digest == same.digest
        assert by_name.check_stages(built_in.STAGES) == built_in.STAGES
        assert clip(torch.zeros(1, 3, 128, 64), [4]).patch_tokens[0].shape == (1, 16 * 8, 96)

    def test_offline_with_empty_caches_names_places_and_remedy(
        self, load: Callable[..., ClipBackbone], home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was attempted"))
        with pytest.raises(WeightsUnavailableError) as caught:
            load(url=self.url("00"), hf_hub="owner/clip/")
        text = str(caught.value)
        assert text.startswith("`pretrained='ours'`: no weights of ")
        assert "HF_HUB_OFFLINE is set" in text
        assert "owner/clip/open_clip_model.safetensors in the Hugging Face cache" in text
        assert str(home / ".cache" / "clip" / "Tiny.pt") in text
        assert "`pretrained=/path/to/file`" in text
        assert "`backbone='ViT-drawn-96'`, `pretrained='drawn'`, `image_size=96`, `stages=(4,)`" in text

    def test_published_tag_offline(self) -> None:
        with pytest.raises(
            WeightsUnavailableError, match=r"no weights of ViT-L-14-336 .*ViT-L-14-336px\.pt.*Put the file"
        ):
            load_clip(ClipArchitecture.load("ViT-L-14-336", (518, 518), None), "openai")

    def test_found_in_clips_cache_by_name_and_digest(
        self, load: Callable[..., ClipBackbone], backbone: Callable[..., ClipBackbone], in_clips_cache: Path
    ) -> None:
        digest = hashlib.sha256(in_clips_cache.read_bytes()).hexdigest()
        assert load(url=self.url(digest)).digest == backbone().digest
        assert load(url=self.url(digest), hf_hub="owner/clip/").digest == backbone().digest

    def test_damaged_file_in_clips_cache_is_named(
        self, load: Callable[..., ClipBackbone], in_clips_cache: Path
    ) -> None:
        """Offline: whoever reads the error must know which file to replace, and it must be true."""
        with pytest.raises((ValueError, WeightsUnavailableError)) as caught:
            load(url=self.url("ab" * 32))
        assert str(in_clips_cache) in str(caught.value)
        assert in_clips_cache.exists() != ("was deleted" in str(caught.value))

    @pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
    def test_found_in_the_hub_cache(
        self,
        load: Callable[..., ClipBackbone],
        backbone: Callable[..., ClipBackbone],
        home: Path,
        small_clip: Any,
        name: str,
    ) -> None:
        self.in_hub_cache(home, small_clip, name)
        assert load(hf_hub="owner/clip/").digest == backbone().digest

    def test_file_named_in_the_tag(
        self, load: Callable[..., ClipBackbone], backbone: Callable[..., ClipBackbone], home: Path, small_clip: Any
    ) -> None:
        self.in_hub_cache(home, small_clip, "special.bin")
        assert load(hf_hub="owner/clip/special.bin").digest == backbone().digest
        with pytest.raises(WeightsUnavailableError, match=r"owner/clip/open_clip_model\.safetensors in the Hugging"):
            load(hf_hub="owner/clip/")

    def test_no_network(self, load: Callable[..., ClipBackbone], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        with pytest.raises(
            WeightsUnavailableError, match=r"the weights of .* could not be fetched \(URLError\)\. Looked for"
        ):
            load(url="http://127.0.0.1:9/Tiny.pt")
        assert not list((home / ".cache" / "clip").iterdir())

    def test_downloads_the_first_file_that_the_repository_has(
        self,
        load: Callable[..., ClipBackbone],
        backbone: Callable[..., ClipBackbone],
        small_clip: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        asked = []

        def download(repository: str, name: str) -> str:
            asked.append(f"{repository}/{name}")
            if name == "open_clip_model.safetensors":
                raise EntryNotFoundError(name)
            return str(small_clip.weights)

        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        monkeypatch.setattr(weights, "hf_hub_download", download)
        assert load(hf_hub="owner/clip/").digest == backbone().digest
        assert asked == ["owner/clip/open_clip_model.safetensors", "owner/clip/open_clip_pytorch_model.safetensors"]


LONG = "connector housing of glass fibre reinforced polyamide with gold plated contact pins in two rows " * 6


def test_names_longer_than_the_context_are_an_error_where_all_states_are_lost(
    april_gan: Callable[..., AprilGAN],
) -> None:
    prompts = {"normal": ["{} without flaw"], "anomalous": ["{} with flaw", "{} with damage"]}
    with pytest.raises(
        ValueError, match=r"`class_name`, `prompts`: \d+ sentences are longer than the 77 .* fewer words"
    ):
        april_gan(class_name=LONG, prompts=prompts).setup("predict")
    with pytest.warns(
        UserWarning, match=r"longer than the 77 tokens .* \d+ sentences are the same for good and bad parts"
    ):
        april_gan(class_name=LONG).setup("predict")  # some published states stand before the name


def test_words_that_are_cut_are_named(april_gan: Callable[..., AprilGAN]) -> None:
    prompts = {"normal": ["flawless {}"], "anomalous": ["broken {}"], "templates": ["a photo of {} at the end."]}
    with pytest.warns(UserWarning, match=r"longer than the 77 tokens .* it does not read '.*two rows"):
        april_gan(class_name=LONG, prompts=prompts).setup("predict")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        april_gan(class_name="connector housing", prompts=prompts).setup("predict")


@pytest.mark.parametrize("part", ["vision_cfg", "text_cfg", None])
def test_what_a_configuration_leaves_out_is_usual_or_named(small_clip: Any, tmp_path: Path, part: str | None) -> None:
    whole = json.loads(small_clip.gelu.read_text())
    for key in whole if part is None else whole[part]:
        config = json.loads(small_clip.gelu.read_text())
        del (config if part is None else config[part])[key]
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            found = ClipArchitecture.load(str(tmp_path / "config.json"), (96, 96), None)
        except ValueError as error:
            assert "`backbone`" in str(error)  # noqa: PT017  # either is right
        else:
            assert found.shapes[0].grid[0] * found.config["vision_cfg"]["patch_size"] == 96
            assert found.shapes[0].width % 64 == 0
