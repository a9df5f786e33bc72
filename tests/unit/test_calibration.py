from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_aprilgan.decision.calibration import Calibration, light_variant
from anomalib_aprilgan.network.memory_bank import MemoryBank


def write(folder: Path, number: int, first: int = 0) -> list[str]:
    """Flat grey pictures, one level brighter than the other."""
    folder.mkdir(exist_ok=True)
    for level in range(first, first + number):
        Image.fromarray(np.full((24, 24, 3), level, dtype=np.uint8)).save(folder / f"{level:03d}.png")
    return [str(folder / f"{level:03d}.png") for level in range(first, first + number)]


def level(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A score that is the picture's grey level, and a map maximum ten times as high."""
    return 255.0 * image.mean(), 2550.0 * image.mean()


class TestHeldOut:
    def test_is_the_quantile_of_the_scores(self, tmp_path: Path) -> None:
        write(tmp_path / "good", 199, first=1)
        calibration = Calibration(str(tmp_path / "good"), false_positive_rate=0.1)
        files = calibration.files_of("nut", ["nut"], [])
        found = calibration.thresholds(files, MemoryBank(), lambda _: 1, level)
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


class TestReferences:
    def bank(self, number: int) -> MemoryBank:
        bank = MemoryBank()
        bank.fill([torch.eye(number).unsqueeze(1)])  # picture n is direction n
        return bank

    def test_each_is_left_out_in_turn(self, tmp_path: Path) -> None:
        files = [Path(name) for name in write(tmp_path / "good", 3)]
        bank, seen = self.bank(3), []

        def score(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(bank.tokens[0, :, 0].argmax(dim=-1).tolist())
            return level(image)

        Calibration("references", 0.05).thresholds(files, bank, lambda _: 1, score)
        each = len(seen) // 3
        assert each == 1 + 12
        assert seen == [[1, 2]] * each + [[0, 2]] * each + [[0, 1]] * each
        assert bank.k_shot == 3

    def test_with_all_its_tiles(self, tmp_path: Path) -> None:
        files = [Path(name) for name in write(tmp_path / "good", 2)]
        bank, seen = self.bank(6), []

        def score(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(tuple(bank.tokens[0, :, 0].argmax(dim=-1).tolist()))
            return level(image)

        tiles = iter([2, 4])
        Calibration("references", 0.05).thresholds(files, bank, lambda _: next(tiles), score)
        assert sorted(set(seen)) == [(0, 1), (2, 3, 4, 5)]

    @pytest.mark.parametrize(("share", "number"), [(0.05, 20), (0.01, 100), (0.5, 13)])
    def test_a_single_one_stays_and_has_enough_variants(self, tmp_path: Path, share: float, number: int) -> None:
        files = [Path(name) for name in write(tmp_path / "good", 1, first=100)]
        bank, seen = self.bank(1), []

        def score(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(bank.k_shot)
            return level(image)

        found = Calibration("references", share).thresholds(files, bank, lambda _: 1, score)
        assert set(seen) == {1}
        assert number <= len(seen) <= number + 1
        assert 85.0 < found.image < 125.0  # level 100, up to a fifth darker or lighter

    def test_a_bank_is_whole_again_after_an_error(self, tmp_path: Path) -> None:
        files, bank = [Path(name) for name in write(tmp_path / "good", 2)], self.bank(2)

        def score(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            raise RuntimeError("no")  # noqa: EM101

        with pytest.raises(RuntimeError, match="no"):
            Calibration("references").thresholds(files, bank, lambda _: 1, score)
        assert bank.k_shot == 2

    def test_says_which_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"references of 'nut' again, and .*gone\.png is gone"):
            Calibration("references").files_of("nut", ["nut"], [str(tmp_path / "gone.png")])


class TestDone:
    def test_until_something_changes(self, tmp_path: Path) -> None:
        files = [Path(name) for name in write(tmp_path / "good", 2)]
        calibration = Calibration("references")
        calibration.note("nut", ["words"], files)
        assert calibration.is_done("nut", ["words"], lambda: files)
        assert not calibration.is_done("cap", ["words"], lambda: files)
        assert not calibration.is_done("nut", ["other words"], lambda: files)
        files[0].write_bytes(files[0].read_bytes() + b" ")
        assert not calibration.is_done("nut", ["words"], lambda: files)

    def test_a_checkpoint_needs_no_files(self) -> None:
        calibration = Calibration("references")
        calibration.restore({"nut": ["words"]})

        def files() -> list[Path]:
            raise AssertionError

        assert calibration.is_done("nut", ["words"], files)
        calibration.forget()
        assert not calibration.is_done("nut", ["words"], files)


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
