"""One door to readiness: which classes there are, what bounds rest on, and what is made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.classes import Classes
from anomalib_aprilgan.decision import calibration
from anomalib_aprilgan.decision.fusion import map_statistic
from anomalib_aprilgan.preparation import Workplace, is_ready, note_learned, prepare
from anomalib_aprilgan.preparation.decision import bounds_recipe
from anomalib_aprilgan.preparation.network import wanted_classes

Build = Callable[..., AprilGAN]


def write(folder: Path, count: int, seed: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (48, 48, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(count)]


@pytest.fixture
def build(april_gan: Build, small_clip: Any, tmp_path: Path) -> Build:
    """A small few-shot model with references of its own."""

    def build(**options: Any) -> AprilGAN:
        given = {"image_size": 48, "stages": (2, 4), "memory_stages": (3,), "adapters": str(small_clip.adapters_2)}
        few_shot = {"k_shot": 3, "references": write(tmp_path / "good", 3)}
        prompts = {"normal": ["good {}"], "anomalous": ["bad {}"], "templates": ["a {}"]}
        return april_gan(**(given | few_shot | {"prompts": prompts} | options)).eval()

    return build


def place_of(model: AprilGAN) -> Workplace:
    return Workplace.of(model, None)


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each light variant: calibration at work."""
    made: list[int] = []

    def light_variant(image: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        made.append(1)
        return image

    monkeypatch.setattr(calibration, "light_variant", light_variant)
    return made


class TestClasses:
    def data(self, **fields: Any) -> Any:
        return SimpleNamespace(**({"name": "Folder", "category": ""} | fields))

    def wanted(self, model: AprilGAN, datamodule: Any, single: bool = False, known: tuple[str, ...] = ()) -> Classes:
        place = place_of(model)
        place.made.classes = Classes(known, known)
        return wanted_classes(Workplace(**(vars(place) | {"datamodule": datamodule})), single=single)

    def test_of_the_user_come_first(self, build: Build) -> None:
        model = build(class_name={"pcb1": "board", "nut": "nut"}, default_class="nut")
        assert self.wanted(model, self.data(category="tile")) == Classes(("pcb1", "nut"), ("board", "nut"), "nut")

    def test_of_the_datamodule(self, build: Build) -> None:
        assert self.wanted(build(), self.data(category="tile")).names == ("tile",)
        assert self.wanted(build(), self.data(class_names=("tile", "wood"))).names == ("tile", "wood")

    def test_several_that_the_images_do_not_tell(self, build: Build) -> None:
        several = self.data(class_names=("tile", "wood"))
        assert self.wanted(build(), several, single=True).names == ("object",)

    @pytest.mark.parametrize(
        ("known", "single", "names"),
        [
            ((), True, ("object",)),
            (("tile",), True, ("tile",)),
            (("tile", "wood"), False, ("tile", "wood")),
            (("tile", "wood"), True, ("object",)),
        ],
    )
    def test_known_before_where_nothing_tells(
        self, build: Build, known: tuple[str, ...], single: bool, names: tuple[str, ...]
    ) -> None:
        assert self.wanted(build(), None, single, known).names == names

    def test_words_for_names_that_are_none(self, build: Build) -> None:
        assert self.wanted(build(class_aliases=True), self.data(category="pcb1")).words == ("printed circuit board",)
        assert self.wanted(build(), self.data(category="pcb1")).words == ("pcb1",)
        given = {"pcb1": "pcb1", "metal_nut": "nut"}
        assert self.wanted(build(class_aliases=True, class_name=given), None).words == ("printed circuit board", "nut")


class TestBounds:
    @pytest.mark.parametrize("top_share", [0.0, 0.1])
    def test_are_those_of_the_references_each_held_out(self, build: Build, top_share: float) -> None:
        model = build(top_share=top_share)
        model.setup("predict")
        maps = []
        for shot, path in enumerate(model.made.references["object"]):
            image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
            maps.append(model.predict(image, without=[shot]).anomaly_map)
        statistics = map_statistic(torch.cat(maps), top_share)
        values = model.post_processor.values()
        assert values["map_maximum_min"] == pytest.approx(statistics.min().item(), abs=1e-5)
        assert values["pixel_threshold"] == pytest.approx(torch.cat(maps).max().item(), abs=1e-5)
        assert values["map_maximum_max"] == values["pixel_max"] == model.model.map_limit == 2.5
        if top_share:
            assert values["map_maximum_min"] < torch.cat(maps).amax(dim=(1, 2)).min().item()

    def test_are_defaults_for_a_single_reference(self, build: Build, tmp_path: Path) -> None:
        model = build(k_shot=1, references=write(tmp_path / "one", 1))
        model.setup("predict")
        values = model.post_processor.values()
        assert (values["map_maximum_min"], values["pixel_threshold"]) == (0.0, 1.25)

    def test_what_validation_learned_is_kept_as_long_as_it_rests_on_the_same(self, build: Build) -> None:
        model = build()
        model.setup("predict")
        model.post_processor.of_class(0).take({"image_threshold": 0.25})
        model.post_processor.learned_rows = [0]
        note_learned(place_of(model))
        model.setup("predict")
        assert model.post_processor.values()["image_threshold"] == 0.25
        with torch.no_grad():
            next(model.model.adapters.parameters()).add_(1e-3)
        model.setup("predict")
        assert model.post_processor.values()["image_threshold"] == 0.5

    def test_learned_without_references_they_are_not_those_with_references(self, build: Build) -> None:
        """Validation in between training scores without references, also where there are some from before."""
        model = build(adapters=None)
        model.made.has_trained = True
        model.setup("predict")
        model.setup("fit")
        model.post_processor.learned_rows = [0]  # what a validation of the training leaves
        note_learned(place_of(model))
        learned = model.made.rows[0].bounds
        assert prepare(place_of(model), "test", single=False)
        assert model.made.rows[0].bounds != learned

    def test_rest_on_what_changes_the_scores(self, build: Build) -> None:
        plain = build()
        plain.setup("predict")
        recipe = bounds_recipe(place_of(plain), 0)
        for option in ({"smoothing_sigma": 1.0}, {"top_share": 0.1}, {"score_fusion": "text"}, {"class_name": "nut"}):
            other = build(**option)
            other.setup("predict")
            assert not bounds_recipe(place_of(other), 0).agrees(recipe)
        again = build(image_size=48)
        again.setup("predict")
        assert bounds_recipe(place_of(again), 0) == recipe

    def test_of_the_user_stay_with_a_warning(self, build: Build) -> None:
        model = build()
        model.post_processor.set_values(image_threshold=0.75)
        model.setup("predict")
        assert model.post_processor.values()["image_threshold"] == 0.75
        with torch.no_grad():
            next(model.model.adapters.parameters()).add_(1e-3)
        text = r"What the scores of 'object' rest on has changed; its thresholds are still the fixed ones"
        with pytest.warns(UserWarning, match=text):
            model.setup("predict")
        assert model.post_processor.values()["image_threshold"] == 0.75


class TestCalibration:
    def test_is_done_once_until_something_changes(self, build: Build, tmp_path: Path, variants: list[int]) -> None:
        model = build(calibration="references", false_positive_rate=0.05)
        model.setup("predict")
        assert len(variants) == 3 * 12
        thresholds = model.post_processor.values()
        model.setup("predict")
        assert len(variants) == 3 * 12
        write(tmp_path / "good", 3, seed=1)  # other images under the same names
        model.setup("predict")
        assert len(variants) == 6 * 12
        assert model.post_processor.values() != thresholds

    def test_is_done_anew_for_other_words(self, build: Build, variants: list[int]) -> None:
        model = build(calibration="references", false_positive_rate=0.05)
        model.setup("predict")
        datamodule = SimpleNamespace(name="Folder", category="tile", train_data=None)
        prepare(Workplace(**(vars(place_of(model)) | {"datamodule": datamodule})), "predict", single=False)
        assert model.classes.names == ("tile",)
        assert len(variants) == 6 * 12

    def test_of_a_checkpoint_needs_no_files(self, build: Build, tmp_path: Path, variants: list[int]) -> None:
        arguments = {"calibration": "references", "false_positive_rate": 0.05}
        model = build(**arguments)
        model.setup("predict")
        checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        model.on_save_checkpoint(checkpoint)
        loaded = build(**arguments)
        for path in (tmp_path / "good").iterdir():
            path.unlink()
        loaded.on_load_checkpoint(checkpoint)
        loaded.load_state_dict(checkpoint["state_dict"])
        loaded.setup("predict")
        assert loaded.post_processor.values() == model.post_processor.values()
        assert len(variants) == 3 * 12


class TestReadiness:
    def test_comes_with_preparation(self, build: Build) -> None:
        model = build()
        assert not is_ready(model.settings, model.made, model.model)
        model.setup("predict")
        assert is_ready(model.settings, model.made, model.model)

    def test_without_references_where_they_were_asked_for(self, build: Build) -> None:
        model = build()
        model.setup("fit")  # which remembers none
        assert not is_ready(model.settings, model.made, model.model)

    def test_stage_of_the_fusion(self, build: Build) -> None:
        model = build()
        for stage, fused in (("predict", True), ("fit", False), ("validate", True)):
            model.setup(stage)
            assert model.post_processor.fuse_map_maximum is fused

    def test_untrained_adapters_are_said(self, build: Build) -> None:
        text = r"The adapters are untrained: the maps mean nothing\. Train them with `fit`, or pass"
        with pytest.warns(UserWarning, match=text):
            build(adapters=None).setup("predict")


class TestManyReferences:
    def test_are_encoded_a_few_at_a_time_and_remembered_alike(self, build: Build, tmp_path: Path) -> None:
        files = write(tmp_path / "many", 35)
        model = build(k_shot=35, references=files)
        model.setup("predict")
        features = model.model.few_shot.features(0)
        assert len(features) == 35
        for place in (0, 15, 16, 34):
            alone = build(k_shot=1, references=files[place : place + 1])
            alone.setup("predict")
            assert torch.equal(alone.model.few_shot.features(0)[0], features[place])

    @pytest.mark.parametrize("options", [{}, {"tile_size": 32}])
    def test_one_that_cannot_be_read_leaves_no_half_of_a_bank(
        self, build: Build, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        files = write(tmp_path / "many", 20)
        content = Path(files[18]).read_bytes()
        Path(files[18]).write_bytes(b"broken")
        model = build(k_shot=20, references=files, **options)
        image = torch.rand(1, 3, 48, 48)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"`references`: .*18\.png cannot be read as an image"):
                model(image)
            assert model.model.few_shot.number(0) == 0
        Path(files[18]).write_bytes(content)
        assert model(image).pred_score.isfinite().all()
        assert model.model.few_shot.number(0) >= 20

    def test_a_coreset_that_cannot_be_had_leaves_no_bank(self, build: Build) -> None:
        model = build(memory_size=109)
        for _ in range(2):
            with pytest.raises(ValueError, match="`memory_size` must be at most the 108 patches"):
                model(torch.rand(1, 3, 48, 48))
            assert model.model.few_shot.number(0) == 0

    @pytest.mark.parametrize(("number", "expected"), [(32, [*range(32)]), (63, [*range(0, 63, 2)])])
    def test_of_many_some_that_are_evenly_spread_are_held_out(
        self, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: list[int]
    ) -> None:
        model, held_out, predict = (
            build(k_shot=number, references=write(tmp_path / "many", number)),
            [],
            AprilGAN.predict,
        )

        def noting(self: AprilGAN, *given: Any, **options: Any) -> Any:
            held_out.extend(given[2])
            return predict(self, *given, **options)

        monkeypatch.setattr(AprilGAN, "predict", noting)
        model.setup("predict")
        assert held_out == expected
