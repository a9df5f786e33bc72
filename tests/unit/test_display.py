"""Images for drawings: the right size and values, from memory within bounds, else from the file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from anomalib_aprilgan.data import reading
from anomalib_aprilgan.data.reading import (
    UnreadableImageError,
    display_image,
    keep_for_display,
    load_image,
    note_image,
)


def write(path: Path, height: int = 30, width: int = 40) -> str:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were read for a drawing."""
    paths: list[str] = []

    def load(path: str) -> Tensor:
        paths.append(path)
        return load_image(path)

    monkeypatch.setattr(reading, "load_image", load)
    return paths


class TestImage:
    def test_small_ones_are_as_stored(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.png")
        image = display_image(path, 40)
        assert image.dtype == torch.uint8
        assert torch.equal(image, torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))

    @pytest.mark.parametrize(
        ("size", "expected"), [((30, 40), (15, 20)), ((40, 30), (20, 15)), ((100, 1), (20, 1)), ((20, 20), (20, 20))]
    )
    def test_sizes(self, size: tuple[int, int], expected: tuple[int, int], tmp_path: Path) -> None:
        assert display_image(write(tmp_path / "a.png", *size), 20).shape == (3, *expected)

    def test_smaller_ones_are_averaged(self, tmp_path: Path) -> None:
        stripes = np.zeros((40, 40, 3), np.uint8)
        stripes[:, ::2] = 255
        Image.fromarray(stripes).save(tmp_path / "a.png")
        inner = display_image(str(tmp_path / "a.png"), 10)[..., 2:-2].float()
        torch.testing.assert_close(inner, torch.full_like(inner, 127.5), atol=8, rtol=0)

    def test_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(UnreadableImageError, match=r"gone\.png cannot be read"):
            display_image(str(tmp_path / "gone.png"), 20)


class TestKept:
    def test_what_was_noted_is_not_read_again(self, tmp_path: Path, decoded: list[str]) -> None:
        path = write(tmp_path / "a.png")
        expected = display_image(path, 20)
        with keep_for_display(20):
            note_image(path, load_image(path))
            assert torch.equal(display_image(path, 20), expected)
            assert len(decoded) == 1
            display_image(path, 10)  # of another size
            assert len(decoded) == 2
        display_image(path, 20)  # after the run
        assert len(decoded) == 3

    def test_without_a_run_nothing_is_kept(self, tmp_path: Path, decoded: list[str]) -> None:
        path = write(tmp_path / "a.png")
        note_image(path, load_image(path))
        display_image(path, 20)
        assert decoded == [path]

    def test_a_run_within_a_run(self, tmp_path: Path, decoded: list[str]) -> None:
        path = write(tmp_path / "a.png")
        with keep_for_display(20):
            note_image(path, load_image(path))
            with keep_for_display(10):
                note_image(path, load_image(path))
                assert display_image(path, 10).shape == (3, 8, 10)
            assert display_image(path, 20).shape == (3, 15, 20)
        assert decoded == []

    @pytest.mark.parametrize("bound", [("MAX_IMAGES", 3), ("MAX_BYTES", 3 * 3 * 15 * 20)])
    def test_the_oldest_make_room(
        self, bound: tuple[str, int], tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reading, *bound)
        paths = [write(tmp_path / f"{number}.png") for number in range(5)]
        with keep_for_display(20):
            for path in paths:
                note_image(path, load_image(path))
            for path in paths:
                display_image(path, 20)
        assert decoded == paths[:2]
