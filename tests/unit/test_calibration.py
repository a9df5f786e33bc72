"""Thresholds from normal images: quantiles by hand, which files count, and light variants of references."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from anomalib_aprilgan.decision.calibration import Calibration, Score, light_variant, likely_good


def write(folder: Path, number: int, first: int = 0) -> list[str]:
    """Flat grey images, one level brighter than the other."""
    folder.mkdir(exist_ok=True)
    for level in range(first, first + number):
        Image.fromarray(np.full((24, 24, 3), level, dtype=np.uint8)).save(folder / f"{level:03d}.png")
    return [str(folder / f"{level:03d}.png") for level in range(first, first + number)]


def level(image: Tensor, without: Collection[int]) -> tuple[Tensor, Tensor]:
    """A score that is the image's grey level, and a map maximum ten times as high."""
    return 255.0 * image.mean(), 2550.0 * image.mean()


class TestHeldOut:
    def test_is_the_quantile_of_the_scores(self, tmp_path: Path) -> None:
        write(tmp_path / "good", 199, first=1)
        calibration = Calibration(str(tmp_path / "good"), false_positive_rate=0.1)
        files = calibration.files_of("nut", ["nut"], [])
        found = calibration.thresholds(files, lambda _: 1, level)
        # Levels 1 to 199: the mean of ceil(199 u) over u with Beta(180, 20), which is 199 * 0.9 + 0.5.
        assert found.image == pytest.approx(179.6, abs=0.01)
        assert found.pixel == pytest.approx(1796.0, abs=0.1)

    def test_references_do_not_count(self, tmp_path: Path) -> None:
        given = write(tmp_path / "good", 25)
        files = Calibration(str(tmp_path / "good"), 0.05).files_of("nut", ["nut"], given[:4])
        assert [str(file) for file in files] == given[4:]

    @pytest.mark.parametrize(("share", "least"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.3, 3), (0.5, 1)])
    def test_refuses_fewer_than_the_share_needs(self, tmp_path: Path, share: float, least: int) -> None:
        calibration = Calibration(str(tmp_path / "good"), share)
        given = write(tmp_path / "good", least)
        assert len(calibration.files_of("nut", ["nut"], [])) == least
        with pytest.raises(
            ValueError, match=rf"`calibration` has {least - 1} normal images of 'nut'.*at least {least}\."
        ):
            calibration.files_of("nut", ["nut"], given[:1])

    def test_classes_have_folders(self, tmp_path: Path) -> None:
        given = {name: write(tmp_path / name, 3) for name in ("nut", "cap")}
        for normals in (str(tmp_path), {name: str(tmp_path / name) for name in given}):
            files = Calibration(normals, 0.5).files_of("cap", ["nut", "cap"], [])
            assert [str(file) for file in files] == given["cap"]
        with pytest.raises(ValueError, match="`calibration` has nothing for the class 'cap', only for nut"):
            Calibration({"nut": str(tmp_path / "nut")}, 0.5).files_of("cap", ["nut", "cap"], [])

    def test_names_what_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"`calibration`: .*nowhere does not exist"):
            Calibration(str(tmp_path / "nowhere")).files_of("nut", ["nut"], [])
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"`calibration`: .*empty holds no images"):
            Calibration(str(tmp_path / "empty")).files_of("nut", ["nut"], [])


def noting(seen: list[list[int]]) -> Score:
    """Scores by grey level, and writes down which remembered images each image was scored without."""

    def score(image: Tensor, without: Collection[int]) -> tuple[Tensor, Tensor]:
        seen.append(list(without))
        return level(image, without)

    return score


class TestContamination:
    def test_images_with_the_highest_maps_do_not_count(self, tmp_path: Path) -> None:
        files = [Path(name) for name in [*write(tmp_path / "a", 8, first=20), *write(tmp_path / "b", 2, first=200)]]
        seen: list[list[int]] = []
        found = {
            share: Calibration("references", 0.05, contamination=share).thresholds(files, lambda _: 1, noting(seen))
            for share in (0.0, 0.1, 0.2, 0.5)
        }
        assert found[0.0].image > 150
        assert found[0.1].image > 150  # one of the two is left
        assert found[0.2].image < 60
        assert found[0.2].pixel < 600
        assert found[0.5].image <= found[0.2].image
        assert max(left_out for (left_out,) in seen[-13 * 5 :]) == 4  # the five darkest

    @pytest.mark.parametrize(
        ("share", "good"), [(0.0, [0, 1, 2, 3, 4]), (0.2, [0, 2, 3, 4]), (0.21, [0, 3, 4]), (0.5, [0, 4])]
    )
    def test_the_share_that_is_left_out_is_rounded_up(self, share: float, good: list[int]) -> None:
        assert likely_good(torch.tensor([0.1, 0.9, 0.8, 0.7, 0.2]), share) == good

    def test_verified_images_count_whatever_their_maps(self, tmp_path: Path) -> None:
        files = [Path(name) for name in write(tmp_path / "good", 40)]
        thresholds = [
            Calibration(str(tmp_path / "good"), 0.05, contamination=share).thresholds(files, lambda _: 1, level)
            for share in (0.0, 0.5)
        ]
        assert thresholds[0] == thresholds[1]


class TestReferences:
    def test_each_is_left_out_in_turn(self, tmp_path: Path) -> None:
        files = [Path(name) for name in write(tmp_path / "good", 3)]
        seen: list[list[int]] = []
        Calibration("references", 0.05).thresholds(files, lambda _: 1, noting(seen))
        each = len(seen) // 3
        assert each == 1 + 12
        assert seen == [[0]] * each + [[1]] * each + [[2]] * each

    def test_with_all_its_tiles(self, tmp_path: Path) -> None:
        files = [Path(name) for name in write(tmp_path / "good", 2)]
        seen: list[list[int]] = []
        tiles = iter([2, 4])
        Calibration("references", 0.05).thresholds(files, lambda _: next(tiles), noting(seen))
        assert sorted(map(list, {tuple(without) for without in seen})) == [[0, 1], [2, 3, 4, 5]]

    @pytest.mark.parametrize(("share", "number"), [(0.05, 20), (0.01, 100), (0.5, 13)])
    def test_a_single_one_stays_and_has_enough_variants(self, tmp_path: Path, share: float, number: int) -> None:
        files = [Path(name) for name in write(tmp_path / "good", 1, first=100)]
        seen: list[list[int]] = []
        found = Calibration("references", share).thresholds(files, lambda _: 1, noting(seen))
        assert seen == [[]] * len(seen)
        assert number <= len(seen) <= number + 1
        assert 85.0 < found.image < 125.0  # level 100, up to a fifth darker or lighter

    @pytest.mark.parametrize("seed", [0, 1])
    def test_thresholds_are_repeatable(self, tmp_path: Path, seed: int) -> None:
        files = [Path(name) for name in write(tmp_path / "good", 2, first=100)]
        found = [Calibration("references", 0.05, seed).thresholds(files, lambda _: 1, level) for _ in range(2)]
        assert found[0] == found[1]
        assert found[0] != Calibration("references", 0.05, 2).thresholds(files, lambda _: 1, level)

    def test_says_which_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"references of 'nut' again, and .*gone\.png is gone"):
            Calibration("references").files_of("nut", ["nut"], [str(tmp_path / "gone.png")])

    def test_says_how_there_would_be_some(self) -> None:
        with pytest.raises(ValueError, match=r"references of 'nut' again, and there are none: set `k_shot`\."):
            Calibration("references").files_of("nut", ["nut"], [])


@pytest.mark.parametrize("share", [0.0, -0.1, 0.51, 2.0, float("nan")])
def test_share_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match="`false_positive_rate` must be the share"):
        Calibration("references", share)


@pytest.mark.parametrize("cut", [False, True])
def test_variants_are_seeded_and_leave_the_generator_alone(cut: bool) -> None:
    image = torch.rand(1, 3, 60, 48, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    variant = light_variant(image, (1, 2, 3), cut=cut)
    assert torch.equal(torch.get_rng_state(), before)
    assert variant.shape == image.shape
    assert variant.min() >= 0.0
    assert variant.max() <= 1.0
    assert torch.equal(variant, light_variant(image, (1, 2, 3), cut=cut))
    assert not torch.equal(variant, light_variant(image, (1, 2, 4), cut=cut))
    assert not torch.equal(variant, image)


@pytest.mark.parametrize("cut", [False, True])
def test_variants_seed_no_accelerator(monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    seeding = Mock()
    for module in (torch.cuda, torch.mps, torch.xpu):
        for name in ("manual_seed", "manual_seed_all"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, seeding)
    light_variant(torch.rand(1, 3, 16, 16), (1, 2, 3), cut=cut)
    assert seeding.mock_calls == []


def test_variants_have_noise() -> None:
    # Flat grey may be mirrored, lighter or darker, and would stay flat; noise of four grey levels makes it uneven.
    deviations = [light_variant(torch.full((1, 3, 60, 48), 0.5), (0, 0, number)).std().item() for number in range(10)]
    assert all(3.5 / 255 < deviation < 4.5 / 255 for deviation in deviations)


def test_variants_are_light() -> None:
    # A white dot stays or is mirrored, on ground that is a fifth lighter or darker and slightly noisy.
    image = torch.full((1, 3, 60, 48), 0.4)
    image[..., 10, 20] = 1.0
    variants = [light_variant(image, (0, 0, number)).mean(dim=1) for number in range(40)]
    places = {divmod(int(variant.argmax()), 48) for variant in variants}
    assert places == {(10, 20), (49, 20), (10, 27), (49, 27)}
    levels = [variant.median().item() for variant in variants]
    assert 0.3 < min(levels) < 0.36
    assert 0.44 < max(levels) < 0.5
    # Cut, the dot moves by less than a twelfth of each side.
    cut = [light_variant(image, (0, 0, number), cut=True).mean(dim=1) for number in range(40)]
    rows = [min(row, 59 - row) for row, _ in (divmod(int(variant.argmax()), 48) for variant in cut)]
    assert min(rows) >= 5
    assert len(set(rows)) > 2
