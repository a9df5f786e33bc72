"""The arguments of the model: what they become, and which are out of range, before anything is loaded."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.settings import height_and_width, plain_paths

Build = Callable[..., AprilGAN]


def test_defaults_of_a_small_model(april_gan: Build) -> None:
    settings = april_gan().settings
    assert settings.architecture.image_size == (96, 96)
    assert settings.stages == settings.memory_stages == (1, 2, 3, 4)
    assert (settings.words, settings.default_class, settings.references, settings.how_to_calibrate) == (None,) * 4
    assert (settings.few_shot, settings.score_fusion, settings.k_shot) == ("memory_bank", "mean", 0)
    assert (settings.smoothing_sigma, settings.neighbourhood, settings.top_share) == (0.0, 1, 0.0)


def test_nothing_is_loaded(april_gan: Build, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.pt")
    model = april_gan(pretrained=absent, adapters=absent, k_shot=1, references=absent)
    assert (model.settings.pretrained, model.settings.adapters, model.settings.references) == (absent, absent, absent)
    assert not model.model.has_backbone


def test_cannot_be_changed_afterwards(april_gan: Build) -> None:
    with pytest.raises(FrozenInstanceError):
        april_gan().settings.k_shot = 4  # type: ignore[misc]


def test_stages_are_sorted_and_those_of_the_bank_are_its_own(april_gan: Build) -> None:
    settings = april_gan(stages=[4, 2], memory_stages=[3, 1]).settings
    assert (settings.stages, settings.memory_stages) == ((2, 4), (1, 3))
    assert april_gan(stages=[4, 2]).settings.memory_stages == (2, 4)


def test_classes_have_words(april_gan: Build) -> None:
    assert april_gan(class_name="nut").settings.words == {"nut": "nut"}
    assert april_gan(class_name={"pcb1": "circuit board", "nut": "nut"}, default_class="nut").settings.words == {
        "pcb1": "circuit board",
        "nut": "nut",
    }


def test_calibration_has_the_seed_and_the_share(april_gan: Build) -> None:
    calibration = april_gan(calibration=["a.png"], false_positive_rate=0.05, seed=3).settings.how_to_calibrate
    assert calibration is not None
    assert (calibration.normals, calibration.false_positive_rate, calibration.seed) == (["a.png"], 0.05, 3)


def test_the_shape_of_the_images_sets_the_size(april_gan: Build) -> None:
    assert april_gan(aspect_ratio=1.5).settings.architecture.image_size == (80, 112)
    assert april_gan(image_size=(96, 64)).settings.architecture.image_size == (96, 64)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"k_shot": -1}, r"`k_shot` must be 0 \(zero-shot\) or more, got -1\."),
        ({"references": "good"}, r"`references` are given but `k_shot` is 0\. Set `k_shot` to the number"),
        ({"calibration": "references"}, r"`calibration='references'` needs `k_shot` and `references`.*at least 99 nor"),
        ({"calibration": "good", "false_positive_rate": 0.6}, r"`false_positive_rate` must be the share .*got 0\.6"),
        ({"few_shot": "winclip"}, r"`few_shot` must be one of memory_bank, got 'winclip'\."),
        ({"score_fusion": "sum"}, r"`score_fusion` must be one of mean, text, map, got 'sum'\."),
        ({"top_share": 1.5}, r"`top_share` must be a share of the map in \[0, 1\].*got 1\.5"),
        ({"stages": ()}, r"`stages` must name at least one block"),
        ({"stages": (1, 5)}, r"`stages` must lie in \[1, 4\] for .*, got 5\."),
        ({"memory_stages": (0,)}, r"`memory_stages` must lie in \[1, 4\] for .*, got 0\."),
        ({"class_name": " "}, r"`class_name` must name an object, got ' '"),
        ({"class_name": ["a", "b"], "default_class": "c"}, r"`default_class` must be .* \(\['a', 'b'\]\), got 'c'\."),
        ({"default_class": "c"}, r"`default_class` must be one of the classes in `class_name` \(None\), got 'c'\."),
        ({"image_size": (96, 96, 96)}, r"`image_size` must be one side, or height and width, got \(96, 96, 96\)\."),
        ({"image_size": 95}, r"`image_size` must be a multiple of .*'s patch of 8 pixels, got 95 x 95\."),
        ({"smoothing_sigma": -1.0}, r"`smoothing_sigma` must be 0 \(no smoothing\) or more pixels, got -1\.0\."),
        ({"smoothing_sigma": 30.0}, r"map of 96 x 96 pixels: it must be below 23\.875, got 30\.0\."),
        ({"neighbourhood": 2}, r"`neighbourhood` must be an odd number of patches, 1 for each patch alone, got 2\."),
        ({"aspect_ratio": 0.0}, r"`aspect_ratio` must be the images' width / height, above 0, got 0\.0\."),
        ({"aspect_ratio": 2.0, "image_size": (96, 96)}, r"needs an `image_size` of one number, got \(96, 96\)\."),
        ({"aspect_ratio": 2.0, "tile_size": 96}, r"tiles are squares: give it or `tile_size`\."),
        ({"tile_size": 0}, r"`tile_size`"),
        ({"tile_size": 96, "tile_overlap": 1.0}, r"`tile_overlap`"),
        ({"prompts": {"normal": []}}, r"`prompts\.normal` must hold at least one entry"),
    ],
)
def test_out_of_range(april_gan: Build, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        april_gan(**arguments)


@pytest.mark.parametrize("neighbourhood", [3.0, True, "3"])
def test_neighbourhood_of_another_type(april_gan: Build, neighbourhood: Any) -> None:
    with pytest.raises(TypeError, match=r"`neighbourhood` must be an int, got "):
        april_gan(neighbourhood=neighbourhood)


def test_sides() -> None:
    assert height_and_width(518) == (518, 518)
    assert height_and_width([96, 64]) == (96, 64)


def test_paths_become_text(tmp_path: Path) -> None:
    assert plain_paths(None) is None
    assert plain_paths(tmp_path) == str(tmp_path)
    assert plain_paths([tmp_path / "a.png", "b.png"]) == [str(tmp_path / "a.png"), "b.png"]
    assert plain_paths({"nut": tmp_path, "cap": ("b.png",)}) == {"nut": str(tmp_path), "cap": ["b.png"]}
