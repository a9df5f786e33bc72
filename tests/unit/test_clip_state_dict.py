"""Weight files are read without running anything they hold; one digest for the same weights in every form."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import ClipBackbone, load_clip
from anomalib_aprilgan.clip.state_dict import read_state_dict
from anomalib_aprilgan.demo.drawn_clip.trainer import random_weights
from anomalib_aprilgan.recipe import digest_of_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
CONSTANTS = ("input_resolution", "context_length", "vocab_size")


class Block(nn.Module):
    """With everything that a module may keep: tensors that are no weights, lists, shared and empty storages."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.projection = nn.Parameter(torch.randn(6, 6).t())
        self.mask = torch.full((6, 6), float("-inf")).triu_(1)
        self.names, self.sizes, self.table = ["a"], [1, 2], {"b": 1.5}
        self.register_buffer("running", torch.arange(4)[1:])
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("passing", torch.ones(6), persistent=False)
        self.register_parameter("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.projection + self.mask.clamp(-1).sum() + self.passing + self.sizes[0]


class Archive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.tied = self.blocks[0].norm
        for number, name in enumerate(CONSTANTS):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) + self.tied(x)


class Writing(nn.Module):
    """Writes a file when torch restores it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.weight = state[0]
        self.training = state[1]
        torch.save(state[0], "executed")


class Payload:
    """Makes a file when unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


@pytest.fixture
def architecture(small_clip: Any) -> ClipArchitecture:
    return ClipArchitecture.load(str(small_clip.gelu), (64, 64), None)


def with_pickle(source: Path, target: Path, content: bytes) -> Path:
    """A copy of an archive whose modules are replaced by another pickle."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("/data.pkl") else old.read(name))
    return target


class TestArchive:
    @pytest.mark.parametrize("how", ["script", "trace"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
    def test_equals_torchs_own_reader(self, tmp_path: Path, how: str, dtype: torch.dtype) -> None:
        module = Archive().to(dtype)
        archive = torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.zeros(1, 6).to(dtype))
        archive.save(tmp_path / "archive.pt")
        expected = torch.jit.load(tmp_path / "archive.pt").state_dict()
        read = read_state_dict(tmp_path / "archive.pt", "pretrained", torchscript=True)
        assert set(read) == set(expected) - set(CONSTANTS)
        assert {"blocks.1.projection", "blocks.0.running", "tied.weight", "blocks.0.empty"} < set(read)
        for name, value in read.items():
            assert value.dtype == expected[name].dtype
            assert value.stride() == expected[name].stride()
            assert torch.equal(value, expected[name])

    def test_a_clip_in_an_archive(self, architecture: ClipArchitecture, small_clip: Any, tmp_path: Path) -> None:
        """Half-precision CLIP as OpenAI publishes it, compared with the same weights in a plain file."""
        weights = {name: value.half() for name, value in load_file(small_clip.weights).items()}
        clip = load_clip(architecture, str(small_clip.weights))
        holder = nn.Module()
        for name, value in weights.items():
            *parents, leaf = name.split(".")
            module = holder
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, nn.Module())
                module = getattr(module, parent)
            module.register_parameter(leaf, nn.Parameter(value))
        holder.register_buffer("input_resolution", torch.tensor(96))
        torch.jit.script(holder).save(tmp_path / "clip.pt")
        save_file(weights, tmp_path / "half.safetensors")
        with mock.patch("torch.jit.load", side_effect=AssertionError("torch.jit.load was called")):
            archived = load_clip(architecture, str(tmp_path / "clip.pt"))
        assert archived.digest == load_clip(architecture, str(tmp_path / "half.safetensors")).digest != clip.digest

    def test_code_of_an_archive_does_not_run(
        self, architecture: ClipArchitecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        torch.jit.script(Writing()).save(tmp_path / "archive.pt")
        torch.jit.load(tmp_path / "archive.pt")
        assert (tmp_path / "executed").exists()  # what torch's own reader does
        (tmp_path / "executed").unlink()
        with pytest.raises(ValueError, match=r"archive\.pt"):
            load_clip(architecture, str(tmp_path / "archive.pt"))
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        "content", [pickle.dumps(Payload()), b"cos\nsystem\n(S'touch executed'\ntR.", b"\x80\x02N."]
    )
    def test_pickle_with_other_objects(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
        monkeypatch.chdir(tmp_path)
        torch.jit.script(Archive()).save(tmp_path / "archive.pt")
        path = with_pickle(tmp_path / "archive.pt", tmp_path / "bad.pt", content)
        with pytest.raises(ValueError, match=r"`pretrained`: .*bad\.pt .* cannot be read"):
            read_state_dict(path, "pretrained", torchscript=True)
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("view", ["3, (2, 4), (4, 1)", "0, (9,), (1,)", "-1, (2,), (1,)", "0, (2,), (-1,)"])
    def test_tensor_outside_of_its_storage(self, tmp_path: Path, view: str) -> None:
        """A view of an 8-number storage that reaches beyond it."""
        torch.jit.script(nn.LayerNorm(8)).save(tmp_path / "archive.pt")

        class Tensors(pickle.Pickler):
            def persistent_id(self, obj: object) -> object:
                return ("storage", torch.FloatStorage, "0", "cpu", 8) if obj is storage else None

        storage = object()

        class View(NamedTuple):
            arguments: tuple[object, ...]

            def __reduce__(self) -> tuple[object, ...]:
                return torch._utils._rebuild_tensor_v2, self.arguments

        arguments = eval(view)  # noqa: S307
        with (tmp_path / "data.pkl").open("wb") as file:
            Tensors(file).dump(View((storage, *arguments, False, {})))
        path = with_pickle(tmp_path / "archive.pt", tmp_path / "bad.pt", (tmp_path / "data.pkl").read_bytes())
        with pytest.raises(ValueError, match="cannot be read"):
            read_state_dict(path, "pretrained", torchscript=True)

    def test_adapters_are_no_archive(self, april_gan: Callable[..., Any], tmp_path: Path) -> None:
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "adapters.pth")
        text = r"`adapters`: .*adapters\.pth is a TorchScript archive; pass a \.pth or \.safetensors file of tensors"
        with pytest.raises(ValueError, match=text):
            april_gan(adapters=str(tmp_path / "adapters.pth"))(torch.zeros(1, 3, 96, 96), class_name="bolt")


class TestFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_clip(
        self, architecture: ClipArchitecture, small_clip: Any, tmp_path: Path, value: float, dtype: torch.dtype
    ) -> None:
        weights = {name: tensor.to(dtype) for name, tensor in load_file(small_clip.weights).items()}
        weights["visual.proj"][3, 4] = value
        save_file(weights, tmp_path / "clip.safetensors")
        text = r"`pretrained`: .*clip\.safetensors must hold finite weights, got NaN or infinity in visual\.proj\."
        with pytest.raises(ValueError, match=text):
            load_clip(architecture, str(tmp_path / "clip.safetensors"))

    def test_adapters(self, april_gan: Callable[..., Any], small_clip: Any, tmp_path: Path) -> None:
        content = torch.load(small_clip.adapters_4)
        name = next(iter(content["trainable_linearlayer"]))
        content["trainable_linearlayer"][name][0, 0] = float("nan")
        torch.save(content, tmp_path / "adapters.pth")
        with pytest.raises(ValueError, match=rf"`adapters`: .* finite weights, got NaN or infinity in .*{name}"):
            april_gan(adapters=str(tmp_path / "adapters.pth"))(torch.zeros(1, 3, 96, 96), class_name="bolt")


class TestDigest:
    # Of the seeded small CLIP: another value makes every recorded digest worthless.
    KNOWN = "ca104de73e8d9be7444269733333ee7e"

    @pytest.fixture
    def weights(self, small_clip: Any) -> dict[str, Tensor]:
        return load_file(small_clip.weights)

    @pytest.fixture
    def clip(self, architecture: ClipArchitecture, weights: dict[str, Tensor]) -> ClipBackbone:
        return ClipBackbone(architecture, weights, "here")

    def test_known_value(self, clip: ClipBackbone) -> None:
        assert clip.digest == self.KNOWN

    def test_every_tensor_counts(self, weights: dict[str, Tensor]) -> None:
        digest = digest_of_tensors(weights)
        others = set()
        for name, value in weights.items():
            changed = value.clone()
            changed.view(-1)[-1] += 0.5
            others.add(digest_of_tensors(weights | {name: changed}))
        assert len(others) == len(weights) > 50
        assert digest not in others

    @pytest.mark.parametrize("name", ["positional_embedding", "visual.conv1.weight", "ln_final.bias"])
    def test_other_weights_beside_the_same_image_projection(
        self, architecture: ClipArchitecture, weights: dict[str, Tensor], clip: ClipBackbone, name: str
    ) -> None:
        other = ClipBackbone(architecture, weights | {name: weights[name] + 0.5}, "there")
        assert other.digest != clip.digest
        assert not clip.matches(other.digest)

    def test_names_and_shapes_count_and_order_does_not(self) -> None:
        values = torch.arange(6.0)
        digests = {
            digest_of_tensors({"a": values[:2], "b": values[2:]}),
            digest_of_tensors({"a": values[:3], "b": values[3:]}),
            digest_of_tensors({"a": values, "b": values[:0]}),
            digest_of_tensors({"b": values[:2], "a": values[2:]}),
            digest_of_tensors({"a": values[:2].view(1, 2), "b": values[2:]}),
        }
        assert len(digests) == 5
        assert digest_of_tensors({"b": values[2:], "a": values[:2]}) == digest_of_tensors(
            {"a": values[:2], "b": values[2:]}
        )

    def test_form_of_the_weights_does_not_count(self, small_clip: Any, tmp_path: Path) -> None:
        """Precision of the file where the values are the same, its format, the image size, later conversions."""
        weights = {name: value.half() for name, value in load_file(small_clip.weights).items()}
        save_file(weights, tmp_path / "half.safetensors")
        torch.save({"state_dict": {f"module.{n}": v.float() for n, v in weights.items()}}, tmp_path / "full.pt")
        small, large = (ClipArchitecture.load(str(small_clip.gelu), (side, 64), True) for side in (64, 96))
        clip = load_clip(small, str(tmp_path / "half.safetensors"))
        assert load_clip(large, str(tmp_path / "full.pt")).digest == clip.digest
        digest = clip.digest
        assert clip.half().digest == clip.to(torch.bfloat16).digest == digest

    def test_matches_what_0_1_0_recorded(
        self, architecture: ClipArchitecture, weights: dict[str, Tensor], clip: ClipBackbone
    ) -> None:
        """Its fingerprint was a hash of the image projection alone."""
        fingerprint = "ff8eee8fca356b64"
        for precision in (torch.float32, torch.bfloat16):
            assert clip.to(precision).matches(fingerprint)
            assert clip.matches(clip.digest)
        assert not clip.matches("0" * 16)
        assert not clip.matches("")
        other = ClipBackbone(architecture, weights | {"visual.proj": weights["visual.proj"] + 1e-3}, "there")
        assert not other.matches(fingerprint)


def test_random_weights_seed_no_accelerator(architecture: ClipArchitecture) -> None:
    """And they leave the caller's generator where it was."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with mock.patch("torch.cuda.manual_seed_all") as seeded, mock.patch("torch.cuda.manual_seed") as seeded_one:
        first, again, other = (random_weights(architecture, seed) for seed in (1, 1, 2))
    assert not seeded.called
    assert not seeded_one.called
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first["visual.proj"], again["visual.proj"])
    assert not torch.equal(first["visual.proj"], other["visual.proj"])


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(2**26))
    with pytest.raises(ValueError, match=r"`adapters`: .*bomb.pt .* would unpack to 67108864"):
        read_state_dict(path, "adapters")
