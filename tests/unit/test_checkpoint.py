"""What a checkpoint holds beside tensors, whether a model can take it, and how those of 0.1.0 are read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan import checkpoint as checkpoints
from anomalib_aprilgan.checkpoint import CHECKPOINT_KEY
from anomalib_aprilgan.classes import Classes
from anomalib_aprilgan.clip.prompts import PromptEnsemble
from anomalib_aprilgan.data.references import content_digests
from anomalib_aprilgan.network.few_shot import FewShotScorer
from anomalib_aprilgan.preparation import Made
from anomalib_aprilgan.provenance import Provenance
from anomalib_aprilgan.recipe import Recipe, RowRecipes

Build = Callable[..., AprilGAN]
NAMES = ("nut", "tile")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def learned(model: AprilGAN, names: Sequence[str] = NAMES, clip: str = "00ff") -> AprilGAN:
    """A model that has learned something of these classes, without a CLIP."""
    rows = [
        RowRecipes(text=Recipe.of(normal=[name]), bounds=Recipe.of(text=name), references=[f"{name}.png"])
        for name in names
    ]
    model.made = Made(
        Classes.of({name: f"a {name}" for name in names}), rows, None, Provenance(trained_on={"Visa": []}), True, clip
    )
    none = [None] * len(names)
    model.model.set_rows(random(len(names), 40, 2), none)
    model.own_fusion.set_rows(none, model.model.map_limit)
    model.post_processor.set_rows(model.made.classes, none, model.model.map_limit, model.model.map_ceiling)
    for row in range(len(names)):
        if model.model.few_shot is not None:
            model.model.few_shot.set_features(row, random(model.settings.k_shot, 4 * 144 * 64, seed=row))
        model.post_processor.of_class(row).set_values(image_threshold=0.25 + 0.125 * row)
    return model


def saved(model: AprilGAN) -> dict[str, Any]:
    """What Lightning would write."""
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    return copy.deepcopy(checkpoint)


def load(model: AprilGAN, checkpoint: dict[str, Any]) -> AprilGAN:
    """As Lightning does."""
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def few_shot_of(model: AprilGAN) -> FewShotScorer:
    assert model.model.few_shot is not None
    return model.model.few_shot


class TestContent:
    def test_is_plain_data_beside_tensors(self, april_gan: Build) -> None:
        content = saved(learned(april_gan(k_shot=2)))[CHECKPOINT_KEY]
        assert json.loads(json.dumps(content)) == content
        assert content["format"] == 3
        assert content["classes"] == [["nut", "a nut"], ["tile", "a tile"]]
        assert [row["references"] for row in content["rows"]] == [["nut.png"], ["tile.png"]]
        assert content["clip"] == "00ff"
        assert content["provenance"]["trained_on"] == {"Visa": []}

    def test_leaves_clip_out(self, april_gan: Build) -> None:
        model = learned(april_gan())
        clip = torch.nn.Linear(2, 2)
        clip.digest = "1234"
        model.model.attach_backbone(clip)
        checkpoint = saved(model)
        assert any(name.startswith("model._backbone.") for name in model.state_dict())
        assert not any("_backbone" in name for name in checkpoint["state_dict"])
        assert checkpoint[CHECKPOINT_KEY]["clip"] == "1234"

    def test_prompts_are_held_and_not_the_name_of_their_file(self, april_gan: Build, tmp_path: Path) -> None:
        file = tmp_path / "prompts.yaml"
        file.write_text("normal: ['good {}']\nclasses: {nut: {normal: ['fine {}']}}\n")
        checkpoint = saved(learned(april_gan(prompts=str(file))))
        expected = PromptEnsemble.of(str(file))
        for content in (checkpoint["hyper_parameters"]["prompts"], checkpoint[CHECKPOINT_KEY]["prompts"]):
            assert PromptEnsemble.of(content) == expected


class TestRoundTrip:
    @pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
    @pytest.mark.parametrize("k_shot", [0, 2])
    def test_brings_back_what_was_learned(self, april_gan: Build, names: Sequence[str], k_shot: int) -> None:
        model = learned(april_gan(k_shot=k_shot), names)
        loaded = load(april_gan(k_shot=k_shot), saved(model))
        assert loaded.made == model.made
        assert loaded.classes.names == tuple(names)
        state_dict = model.state_dict()
        assert set(loaded.state_dict()) == set(state_dict)
        assert all(torch.equal(value, state_dict[name]) for name, value in loaded.state_dict().items())
        for name in names:
            assert loaded.post_processor.of_class(name).values() == model.post_processor.of_class(name).values()

    def test_into_a_model_of_other_classes(self, april_gan: Build) -> None:
        model = learned(april_gan(k_shot=2))
        loaded = load(learned(april_gan(k_shot=2), ["wood", "bolt", "pill"]), saved(model))
        assert loaded.classes == model.classes
        assert [few_shot_of(loaded).number(row) for row in range(2)] == [2, 2]
        assert torch.equal(loaded.model.text_features, model.model.text_features)

    def test_sensitivities_of_each_class(self, april_gan: Build) -> None:
        model = learned(april_gan())
        model.post_processor.of_class("tile").image_sensitivity = 0.9
        for other in (april_gan(), learned(april_gan())):
            loaded = load(other, saved(model))
            assert [loaded.post_processor.of_class(name).image_sensitivity for name in NAMES] == [0.5, 0.9]

    def test_references_go_into_a_model_that_asked_for_none(self, april_gan: Build) -> None:
        model = learned(april_gan(k_shot=2))
        loaded = load(april_gan(), saved(model))
        assert torch.equal(few_shot_of(loaded).features(1), few_shot_of(model).features(1))

    def test_no_references_go_into_a_model_that_asks_for_some(self, april_gan: Build) -> None:
        loaded = load(april_gan(k_shot=2), saved(learned(april_gan())))
        assert [few_shot_of(loaded).number(row) for row in range(2)] == [0, 0]

    def test_the_default_class_is_the_models(self, april_gan: Build) -> None:
        checkpoint = saved(learned(april_gan()))
        assert load(april_gan(class_name=["tile", "cap"], default_class="tile"), checkpoint).classes.default == "tile"
        assert load(april_gan(class_name=["tile", "cap"], default_class="cap"), checkpoint).classes.default is None

    def test_clip_that_is_here_completes_the_tensors(self, april_gan: Build) -> None:
        checkpoint = saved(learned(april_gan()))
        model = april_gan()
        clip = torch.nn.Linear(2, 2)
        clip.digest, clip.matches = "00ff", lambda recorded: recorded == "00ff"
        model.model.attach_backbone(clip)
        load(model, checkpoint)
        assert torch.equal(checkpoint["state_dict"]["model._backbone.weight"], clip.weight)


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"stages": (1, 2, 3)}, r"`stages` of the checkpoint is \[1, 2, 3, 4\], of the model \[1, 2, 3\]"),
            ({"memory_stages": (2,)}, r"`memory_stages` of the checkpoint is \[1, 2, 3, 4\], of the model \[2\]"),
            (
                {"quick_gelu": False},
                r"`quick_gelu` of the checkpoint is True, of the model False\. Use the same value for both\.",
            ),
            ({"image_size": 64}, r"`image_size` of the checkpoint is \[96, 96\], of the model \[64, 64\]"),
            ({"tile_size": 96}, r"`tile_size` of the checkpoint is None, of the model 96"),
            ({"smoothing_sigma": 1.5}, r"`smoothing_sigma` of the checkpoint is 0\.0, of the model 1\.5"),
            ({"neighbourhood": 3}, r"`neighbourhood` of the checkpoint is 1, of the model 3"),
            ({"top_share": 0.1}, r"`top_share` of the checkpoint is 0\.0, of the model 0\.1"),
            ({"score_fusion": "text"}, r"`score_fusion` of the checkpoint is mean, of the model text"),
        ],
    )
    def test_of_other_settings_and_the_model_is_left_alone(
        self, april_gan: Build, arguments: dict[str, Any], text: str
    ) -> None:
        checkpoint = saved(learned(april_gan(k_shot=2)))
        model = learned(april_gan(k_shot=2, **arguments), ["wood"])
        before, made = copy.deepcopy(model.state_dict()), copy.deepcopy(model.made)
        size = model.pre_processor.image_size
        with pytest.raises(ValueError, match=text):
            model.on_load_checkpoint(checkpoint)
        assert (model.made, model.pre_processor.image_size) == (made, size)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize(
        "arguments", [{"neighbourhood": 3}, {"top_share": 0.1}, {"score_fusion": "text"}, {"tile_size": 96}]
    )
    def test_not_for_what_only_references_rest_on(self, april_gan: Build, arguments: dict[str, Any]) -> None:
        model = learned(april_gan())
        loaded = load(april_gan(**arguments), saved(model))
        assert torch.equal(loaded.model.text_features, model.model.text_features)

    def test_of_another_clip(self, april_gan: Build) -> None:
        model: Any = april_gan()
        model.model.attach_backbone(torch.nn.Identity())
        model.model.backbone.digest, model.model.backbone.matches = "1234", lambda recorded: recorded == "1234"
        text = r"`pretrained`: the checkpoint belongs to a CLIP with weights 00ff, the model has weights 1234\."
        with pytest.raises(ValueError, match=text):
            model.on_load_checkpoint(saved(learned(april_gan())))

    def test_of_another_width(self, april_gan: Build) -> None:
        checkpoint = saved(learned(april_gan()))
        checkpoint["state_dict"]["model.adapters.fc.0.weight"] = torch.zeros(40, 32)
        text = r"`adapters`: the checkpoint is for another CLIP: fc\.0\.weight is \(40, 32\)"
        with pytest.raises(ValueError, match=text):
            april_gan().on_load_checkpoint(checkpoint)

    def test_of_another_model(self, april_gan: Build) -> None:
        text = r"`ckpt_path` must be a checkpoint that AprilGAN wrote; this one holds nothing of it"
        with pytest.raises(ValueError, match=text):
            april_gan().on_load_checkpoint({"state_dict": {}})

    def test_of_a_later_version(self, april_gan: Build) -> None:
        checkpoint = saved(learned(april_gan()))
        checkpoint[CHECKPOINT_KEY]["format"] = 4
        text = r"the checkpoint has format 4, this version reads up to 3\. Update the package\."
        with pytest.raises(ValueError, match=text):
            april_gan().on_load_checkpoint(checkpoint)


class TestEarlierVersion:
    """Checkpoints as 0.1.0 wrote them; files that it did write are loaded in the integration tests."""

    VALUES: ClassVar = {
        "image_min": 0.0, "_image_threshold": 0.375, "image_max": 1.0, "pixel_min": 0.0, "_pixel_threshold": 2.5,
        "pixel_max": 6.0, "map_maximum_min": 0.5, "map_maximum_max": 6.0,
    }  # fmt: skip

    def checkpoint(self, files: dict[str, list[str]], several: bool, shots: int = 1) -> dict[str, Any]:
        names = list(files)
        buffers = {name: torch.tensor(value) for name, value in (self.VALUES | {"calibrated": True}).items()}
        values = {f"post_processor.{name}": value for name, value in buffers.items()}
        if several:
            for row in range(len(names)):
                values |= {f"post_processor.by_class.{row}.{name}": value + row for name, value in buffers.items()}
                values[f"post_processor.by_class.{row}.calibrated"] = torch.tensor(row == 1)
        banks = {f"model.memory_banks.{row}.tokens": random(4, shots, 144, 64, seed=row) for row in range(len(names))}
        if not shots:
            banks = {name: torch.empty(0) for name in banks}
        return {
            "state_dict": {"model.text_features": random(len(names), 40, 2), **banks, **values},
            CHECKPOINT_KEY: {
                "class_names": {name: f"a {name}" for name in names},
                "references": files,
                "reference_keys": {name: ["`references`", "1", "0"] for name in names},
                "calibration": {names[0]: ["words"]},
                "fingerprint": "00ff",
                "clip": {"stages": [1, 2, 3, 4]},
                "prompts": {"normal": ["good {}"], "anomalous": ["bad {}"], "templates": ["a {}"]},
                "provenance": {"trained_on": {"Visa": []}},
            },
        }

    def test_of_several_classes(self) -> None:
        checkpoint = self.checkpoint({"nut": [], "tile": []}, several=True)
        before = dict(checkpoint["state_dict"])
        checkpoints.migrate(checkpoint)
        state_dict = checkpoint["state_dict"]
        assert state_dict["post_processor._image_threshold"].tolist() == [0.375, 1.375]
        assert state_dict["post_processor.fusion.low"].tolist() == [0.5, 1.5]
        assert state_dict["post_processor.fusion.high"].tolist() == [6.0, 7.0]
        assert state_dict["post_processor.fixed"].tolist() == [False, True]
        for row in range(2):
            features = state_dict[f"model.few_shot.remembered.{row}.features"]
            tokens = before[f"model.memory_banks.{row}.tokens"]
            for shot in range(tokens.shape[1]):
                assert torch.equal(features[shot].view(len(tokens), *tokens.shape[2:]), tokens[:, shot])
        assert not any("by_class" in name or "map_maximum" in name or "memory_banks" in name for name in state_dict)

    def test_of_one_class(self) -> None:
        checkpoint = self.checkpoint({"nut": []}, several=False, shots=0)
        checkpoints.migrate(checkpoint)
        state_dict = checkpoint["state_dict"]
        assert state_dict["post_processor.fusion.low"].tolist() == [0.5]
        assert state_dict["post_processor.fixed"].tolist() == [True]
        assert not checkpoints.has_references(state_dict)

    def test_recipes_know_what_was_recorded(self, tmp_path: Path) -> None:
        file = tmp_path / "good.png"
        file.write_bytes(b"an image")
        checkpoint = self.checkpoint({"nut": [str(file)], "tile": [str(tmp_path / "gone.png")]}, several=True)
        checkpoints.migrate(checkpoint)
        content = checkpoint[CHECKPOINT_KEY]
        assert content["classes"] == [["nut", "a nut"], ["tile", "a tile"]]
        assert (content["clip"], content["provenance"]["trained_on"]) == ("00ff", {"Visa": []})
        nut, tile = (RowRecipes.from_dict(row) for row in content["rows"])
        text = Recipe.of(clip="anything", normal=["a good a nut"], anomalous=["a bad a nut"])
        assert nut.text is not None
        assert nut.bank is not None
        assert nut.text.agrees(text)
        assert not nut.text.agrees(Recipe.of(normal=["another"], anomalous=["a bad a nut"]))
        assert nut.bank.agrees(Recipe.of(references=content_digests([file]), number=1, scorer="any"))
        assert nut.references == [str(file)]
        assert tile.bank is not None
        assert not tile.bank.agrees(Recipe.of(references=content_digests([file]), number=1))
        assert (nut.calibration, tile.calibration) == (Recipe({}), None)

    def test_today_s_are_left_as_they_are(self, april_gan: Build) -> None:
        checkpoint = saved(learned(april_gan()))
        before = copy.deepcopy(checkpoint[CHECKPOINT_KEY])
        checkpoints.migrate(checkpoint)
        assert checkpoint[CHECKPOINT_KEY] == before


def test_references_are_those_of_the_scorer() -> None:
    assert checkpoints.has_references({"model.few_shot.remembered.0.features": torch.empty(0)})
    assert not checkpoints.has_references({"model.text_features": torch.empty(0)})
