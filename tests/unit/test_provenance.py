"""Adapter files and where adapters come from: round trip, the authors' layout, and what does not fit."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from anomalib_aprilgan import provenance as module
from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.clip.backbone import load_clip
from anomalib_aprilgan.demo import built_in
from anomalib_aprilgan.network.adapters import LinearAdapters
from anomalib_aprilgan.provenance import (
    AUTHORS_KEY,
    Provenance,
    adapter_path,
    check_shapes,
    datasets_of,
    load_adapters,
    load_resolved_adapters,
    resolve_adapters,
    save_adapters,
)

PROVENANCE = Provenance(
    trained_on={"MVTecAD": ["bottle", "tile"]},
    backbone="ViT-tiny",
    fingerprint="00ff",
    stages=[1, 3],
    quick_gelu=False,
    image_size=[96, 64],
    versions={"torch": "2.10"},
)
ARCHITECTURE = ClipArchitecture("ViT-tiny", {"quick_gelu": False}, (96, 64))


def clip(digest: str = "00ff", name: str = "ViT-tiny", quick_gelu: bool = False) -> Any:
    """A CLIP with these weights, as far as provenance looks at it; 0.1.0 would call them "old-...\"."""
    architecture = ClipArchitecture(name, {"quick_gelu": quick_gelu}, (96, 64))
    return SimpleNamespace(
        architecture=architecture, digest=digest, matches=lambda recorded: recorded in {digest, f"old-{digest}"}
    )


def data(name: str, category: str | None = None) -> Any:
    return SimpleNamespace(name=name, category=category)


def adapters(stages: int = 2, width: int = 6, embed_dim: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(stages)
    return LinearAdapters([width] * stages, embed_dim).state_dict()


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "adapters.safetensors"
        save_adapters(path, adapters(), PROVENANCE)
        state_dict, provenance = load_adapters(path)
        assert provenance == PROVENANCE
        assert set(state_dict) == set(adapters())
        assert all(torch.equal(state_dict[name], value) for name, value in adapters().items())
        assert [file.name for file in path.parent.iterdir()] == ["adapters.safetensors"]

    def test_metadata_is_readable_json(self, tmp_path: Path) -> None:
        save_adapters(tmp_path / "a.safetensors", adapters(), PROVENANCE)
        with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
            content = json.loads(file.metadata()["anomalib_aprilgan"])
        assert content["trained_on"] == {"MVTecAD": ["bottle", "tile"]}
        assert content["stages"] == [1, 3]

    def test_parameters_and_views_are_written_as_values(self, tmp_path: Path) -> None:
        module = LinearAdapters([6] * 1, 4)
        transposed = {"fc.0.weight": module.fc[0].weight.T, "fc.0.bias": module.fc[0].bias}
        save_adapters(tmp_path / "a.safetensors", transposed, Provenance())
        state_dict, _ = load_adapters(tmp_path / "a.safetensors")
        assert torch.equal(state_dict["fc.0.weight"], module.fc[0].weight.T)
        assert not state_dict["fc.0.weight"].requires_grad

    def test_authors_layout_has_no_provenance(self, tmp_path: Path) -> None:
        torch.save({AUTHORS_KEY: adapters()}, tmp_path / "authors.pth")
        state_dict, provenance = load_adapters(tmp_path / "authors.pth")
        assert provenance == Provenance()
        assert all(torch.equal(state_dict[name], value) for name, value in adapters().items())

    def test_safetensors_of_others_have_no_provenance(self, tmp_path: Path) -> None:
        save_file(adapters(), tmp_path / "a.safetensors")
        save_file(adapters(), tmp_path / "b.safetensors", metadata={"format": "pt"})
        assert (
            load_adapters(tmp_path / "a.safetensors")[1] == load_adapters(tmp_path / "b.safetensors")[1] == Provenance()
        )

    def test_other_endings(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`path` must end in \.safetensors, got a\.pth\."):
            save_adapters(tmp_path / "a.pth", adapters(), PROVENANCE)
        assert not list(tmp_path.iterdir())

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"`adapters`: no weight file .*absent"):
            load_adapters(tmp_path / "absent.safetensors")

    @pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
    def test_weights_that_are_no_adapters(self, tmp_path: Path, name: str) -> None:
        content = {"visual.proj": torch.zeros(2, 2), "logit_scale": torch.zeros(1)}
        save_file(content, tmp_path / name) if name.endswith("safetensors") else torch.save(content, tmp_path / name)
        with pytest.raises(
            ValueError, match=r"holds no adapters: expected names fc\.<i>\.weight .*, got .*visual\.proj"
        ):
            load_adapters(tmp_path / name)

    def test_truncated(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        save_adapters(path, adapters(), PROVENANCE)
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(ValueError, match=r"`adapters`: .*a\.safetensors .* cannot be read"):
            load_adapters(path)


class TestShapes:
    def test_fitting_adapters_pass(self) -> None:
        assert check_shapes(adapters(), adapters(), "a.pth") is None

    @pytest.mark.parametrize("found", [1, 4])
    def test_other_number_of_stages(self, found: int) -> None:
        with pytest.raises(ValueError, match=rf"`adapters`: a\.pth is for {found} stages, the model taps 2\."):
            check_shapes(adapters(found), adapters(2), "a.pth")

    @pytest.mark.parametrize(("width", "embed_dim"), [(8, 4), (6, 5)])
    def test_other_width_names_both(self, width: int, embed_dim: int) -> None:
        text = rf"a\.pth is for another CLIP: fc\.0\.weight is \({embed_dim}, {width}\) .*the model needs \(4, 6\)"
        with pytest.raises(ValueError, match=text):
            check_shapes(adapters(2, width, embed_dim), adapters(2), "a.pth")

    def test_a_missing_bias_is_not_called_a_missing_stage(self) -> None:
        incomplete = {name: value for name, value in adapters(2).items() if name != "fc.1.bias"}
        with pytest.raises(ValueError, match=r"fc\.1\.bias"):
            check_shapes(incomplete, adapters(2), "a.pth")


class TestProvenance:
    def test_survives_plain_data_and_later_versions(self) -> None:
        content = PROVENANCE.to_dict() | {"of_a_later_version": 1}
        assert Provenance.from_dict(json.loads(json.dumps(content))) == PROVENANCE

    @pytest.mark.parametrize(
        ("trained_on", "name", "category", "words"),
        [
            ({"MVTecAD": ["bottle", "tile"]}, "MVTecAD", "tile", "MVTecAD (tile)"),
            ({"MVTecAD": ["bottle"]}, "MVTecAD", "tile", None),
            ({"MVTecAD": ["bottle"]}, "Visa", "bottle", None),
            ({"MVTecAD": []}, "MVTecAD", "tile", "MVTecAD (tile)"),  # all of it
            ({"Folder": []}, "Folder", None, "Folder"),
            ({"Folder": ["bottle"]}, "Folder", None, "Folder"),  # it cannot be told: rather one warning too many
            ({}, "MVTecAD", "tile", None),
        ],
    )
    def test_overlap(
        self, trained_on: dict[str, list[str]], name: str, category: str | None, words: str | None
    ) -> None:
        assert Provenance(trained_on=trained_on).overlap(data(name, category)) == words

    def test_overlap_with_several_data_sets_and_with_none(self) -> None:
        datamodule = SimpleNamespace(sources={"Visa": ["pcb1"], "MVTecAD": ["bottle", "wood", "tile"]})
        assert PROVENANCE.overlap(datamodule) == "MVTecAD (bottle, tile)"
        assert PROVENANCE.overlap(None) is None

    def test_of_training(self) -> None:
        datamodule: Any = SimpleNamespace(sources={"MVTecAD": ["bottle"]})
        provenance = Provenance.of_training(datamodule, clip(quick_gelu=True), (1, 3))
        assert provenance.trained_on == {"MVTecAD": ["bottle"]}
        assert (provenance.backbone, provenance.fingerprint, provenance.quick_gelu) == ("ViT-tiny", "00ff", True)
        assert (provenance.stages, provenance.image_size) == ([1, 3], [96, 64])
        assert set(provenance.versions) == {"anomalib", "open_clip_torch", "torch"}
        assert Provenance.from_dict(json.loads(json.dumps(provenance.to_dict()))) == provenance

    @pytest.mark.parametrize("recorded", ["00ff", "old-00ff"])
    def test_matching_and_unknown_provenance_pass(self, recorded: str) -> None:
        assert replace(PROVENANCE, fingerprint=recorded).check(clip(), (1, 3), "a") is None
        assert Provenance().check(clip("abcd"), (2,), "a") is None

    def test_another_activation_is_a_warning(self) -> None:
        with pytest.warns(UserWarning, match=r"a\.pth was trained with a CLIP that runs QuickGELU, this runs GELU"):
            Provenance(quick_gelu=True).check(clip(), (1, 3), "a.pth")

    def test_other_stages(self) -> None:
        text = r"`adapters`: a\.pth was trained for stages \(1, 3\), the model taps \(2, 4\)\."
        with pytest.raises(ValueError, match=text):
            PROVENANCE.check(clip(), (2, 4), "a.pth")

    def test_other_clip(self) -> None:
        text = r"trained for the CLIP ViT-tiny with weights 00ff, the model has ViT-other with weights 1234\."
        with pytest.raises(ValueError, match=text):
            PROVENANCE.check(clip("1234", "ViT-other"), (1, 3), "a.pth")

    def test_the_data_under_test_cannot_be_missed(self) -> None:
        with pytest.warns(UserWarning, match=r"!{100}\nNOT ZERO-SHOT: the adapters were trained on MVTecAD \(tile\)"):
            PROVENANCE.warn_of_seen(data("MVTecAD", "tile"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PROVENANCE.warn_of_seen(data("MVTecAD", "wood"))


class TestTrainedOn:
    """A data set with an empty list was seen as a whole, and stays so."""

    @pytest.mark.parametrize(
        ("earlier", "now", "both"),
        [
            ({"A": []}, {"A": ["x"]}, {"A": []}),
            ({"A": ["x"]}, {"A": []}, {"A": []}),
            ({"A": []}, {"A": []}, {"A": []}),
            ({"A": ["y"]}, {"A": ["x"]}, {"A": ["x", "y"]}),
            ({"A": ["x", "y"]}, {"A": ["x"]}, {"A": ["x", "y"]}),
            ({"A": []}, {"B": ["x"]}, {"A": [], "B": ["x"]}),
            ({"A": ["x"]}, {"B": []}, {"A": ["x"], "B": []}),
            ({}, {"A": ["x"]}, {"A": ["x"]}),
            ({"A": ["x"]}, {}, {"A": ["x"]}),
        ],
    )
    def test_continued_training_forgets_nothing(
        self, earlier: dict[str, list[str]], now: dict[str, list[str]], both: dict[str, list[str]]
    ) -> None:
        assert replace(PROVENANCE, trained_on=now).with_earlier(earlier) == replace(PROVENANCE, trained_on=both)

    def test_over_three_trainings(self) -> None:
        first, second = Provenance(trained_on={"A": []}), Provenance(trained_on={"A": ["x"], "B": ["z"]})
        third = Provenance(trained_on={"C": [], "B": ["y"]})
        seen = third.with_earlier(second.with_earlier(first.trained_on).trained_on)
        assert seen.trained_on == {"A": [], "B": ["y", "z"], "C": []}
        assert seen.overlap(data("A", "another")) == "A (another)"

    def test_arguments_are_left_alone(self) -> None:
        earlier, now = {"A": ["y"]}, Provenance(trained_on={"A": ["x"]})
        now.with_earlier(earlier)
        assert (earlier, now.trained_on) == ({"A": ["y"]}, {"A": ["x"]})

    def test_data_sets_of_a_datamodule(self) -> None:
        sources: Any = SimpleNamespace(sources={"Visa": ["pcb1"]}, name="AuxiliaryData", category="")
        assert datasets_of(sources) == {"Visa": ["pcb1"]}
        assert datasets_of(data("MVTecAD", "tile")) == {"MVTecAD": ["tile"]}
        assert datasets_of(data("Folder", "")) == {"Folder": []}
        assert datasets_of(None) == {}


class TestChoice:
    PUBLISHED = ClipArchitecture("ViT-L-14-336", {}, (518, 518))

    @pytest.mark.parametrize(
        ("adapters", "target", "source"),
        [
            ("auto", "MVTecAD", "visa"),
            ("auto", "Visa", "mvtec"),
            ("auto", "Folder", "mvtec"),
            ("auto", None, "mvtec"),
            ("visa", "Visa", "visa"),  # what is asked for is given (and warned of)
            ("mvtec", None, "mvtec"),
            ("some/file.pth", "Visa", "some/file.pth"),
        ],
    )
    def test_never_by_accident_the_data_under_test(self, adapters: str, target: str | None, source: str) -> None:
        assert resolve_adapters(adapters, None if target is None else data(target), self.PUBLISHED) == source

    @pytest.mark.parametrize("adapters", ["auto", "mvtec", "visa"])
    def test_authors_adapters_for_another_clip(self, adapters: str) -> None:
        text = (
            rf"`adapters='{adapters}'` were trained for the CLIP ViT-L-14-336, the model has ViT-tiny\. Pass an adapter"
        )
        with pytest.raises(ValueError, match=text):
            resolve_adapters(adapters, None, ARCHITECTURE)

    def test_files_may_be_for_any_clip(self) -> None:
        assert resolve_adapters("file.pth", None, ARCHITECTURE) == "file.pth"

    @pytest.mark.parametrize("published", ["ViT-L-14-336", "ViT-L-14-336-quickgelu"])
    def test_data_that_trained_all_of_them(self, published: str) -> None:
        both: Any = SimpleNamespace(sources={"MVTecAD": ["tile"], "Visa": ["pcb1"]})
        text = r"`adapters='auto'`: the authors' adapters were trained on MVTecAD, Visa\. Pass one of them by name\."
        with pytest.raises(ValueError, match=text):
            resolve_adapters("auto", both, ClipArchitecture(published, {}, (518, 518)))

    def test_the_built_in_clip_has_adapters_of_its_own(self) -> None:
        architecture = ClipArchitecture.load(built_in.ARCHITECTURE, (96, 96), None)
        source = resolve_adapters("auto", data("DrawnInspection"), architecture)
        _, provenance = load_resolved_adapters(source)
        provenance.check(load_clip(architecture, built_in.PRETRAINED), built_in.STAGES, source)
        assert provenance.fingerprint
        assert provenance.trained_on["DrawnInspection"]
        with pytest.raises(ValueError, match=r"`adapters='visa'` were trained for the CLIP ViT-L-14-336"):
            resolve_adapters("visa", None, architecture)

    def test_authors_files_get_their_provenance(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.save({AUTHORS_KEY: adapters()}, tmp_path / "authors.pth")
        monkeypatch.setattr(module, "authors_adapters", lambda _: tmp_path / "authors.pth")
        state_dict, provenance = load_resolved_adapters("mvtec")
        assert provenance.trained_on == {"MVTecAD": []}
        assert (provenance.backbone, provenance.stages) == ("ViT-L-14-336", [6, 12, 18, 24])
        assert set(state_dict) == set(adapters())
        assert adapter_path("mvtec") == tmp_path / "authors.pth"
        assert adapter_path("~/a.pth") == Path.home() / "a.pth"

    def test_own_files_keep_theirs(self, tmp_path: Path) -> None:
        save_adapters(tmp_path / "a.safetensors", adapters(), PROVENANCE)
        assert load_resolved_adapters(str(tmp_path / "a.safetensors"))[1] == PROVENANCE
