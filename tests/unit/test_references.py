"""Which images are remembered: listing, drawing, reading."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data.utils import get_image_filenames
from PIL import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data.reading import UnreadableImageError
from anomalib_aprilgan.data.references import (
    ReferenceSource,
    content_digests,
    draw_references,
    list_references,
    read_reference,
)


def write(path: Path, height: int = 6, width: int = 8, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(path)
    return path


class TestList:
    def test_folder_is_sorted_and_other_files_are_left_out(self, tmp_path: Path) -> None:
        for name in ("b.png", "a.jpg", "c.bmp"):
            write(tmp_path / name)
        (tmp_path / "notes.txt").write_text("no image")
        expected = [tmp_path / name for name in ("a.jpg", "b.png", "c.bmp")]
        assert [path.resolve() for path in list_references(tmp_path)] == [path.resolve() for path in expected]
        assert list_references(str(tmp_path)) == list_references(tmp_path)

    def test_single_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "one.png")
        assert [file.resolve() for file in list_references(path)] == [path.resolve()]

    def test_list_keeps_its_order(self, tmp_path: Path) -> None:
        paths = [write(tmp_path / name) for name in ("z.png", "a.png")]
        assert list_references([str(paths[0]), paths[1]]) == paths

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"`references`: .*absent does not exist\. Pass a folder of normal"):
            list_references(tmp_path / "absent")

    @pytest.mark.parametrize("other", [None, "notes.txt"])
    def test_empty_folder(self, tmp_path: Path, other: str | None) -> None:
        if other:
            (tmp_path / other).write_text("no image")
        with pytest.raises(ValueError, match=r"`references`: .* holds no images\. Put normal images there"):
            list_references(tmp_path)

    def test_file_that_is_no_image(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("no image")
        with pytest.raises(ValueError, match=r"`references`: .*notes\.txt"):
            list_references(tmp_path / "notes.txt")

    def test_missing_file_in_a_list_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"`references`: no file .*absent\.png"):
            list_references([write(tmp_path / "a.png"), tmp_path / "absent.png"])

    def test_empty_list(self) -> None:
        with pytest.raises(ValueError, match="`references` is an empty list"):
            list_references([])

    @pytest.mark.parametrize("folder", [Path("Teile grün") / "gut", Path(*["long" * 25] * 6)])
    def test_folders_that_anomalib_does_not_list(
        self, folder: Path, tmp_path: Path, april_gan: Callable[..., AprilGAN]
    ) -> None:
        """Letters outside ASCII, and more than 512 characters; through the model, for references and calibration."""
        files = [write(tmp_path / folder / "deeper" / name) for name in ("a.png", "b.PNG", "c.jpg", "d.png")]
        with pytest.raises(ValueError, match=r"non-printable characters|too long"):
            get_image_filenames(tmp_path / folder)
        given = str(tmp_path / folder)
        model = april_gan(
            class_name="part", k_shot=2, references=given, calibration=given, false_positive_rate=0.34, seed=1
        )
        model.setup("predict")
        assert list_references(given) == [file.resolve() for file in files]


class TestDigests:
    def test_depend_on_the_bytes_alone(self, tmp_path: Path) -> None:
        files = [write(tmp_path / "here" / name) for name in ("a.png", "long_name.png")]
        before = content_digests(files)
        assert before == tuple(hashlib.sha256(file.read_bytes()).hexdigest()[:32] for file in files)
        shutil.move(tmp_path / "here", tmp_path / "there")
        assert content_digests([tmp_path / "there" / file.name for file in files]) == before

    def test_a_changed_file_has_another(self, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        file.write_bytes(b"one")
        before = content_digests([file])
        file.write_bytes(b"two")
        os.utime(file, ns=(0, 10**9))
        assert content_digests([file]) != before

    def test_unchanged_files_are_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file, reads = write(tmp_path / "a.png"), []
        open_file = Path.open
        monkeypatch.setattr(Path, "open", lambda path, *args: reads.append(path) or open_file(path, *args))
        assert content_digests([file]) == content_digests([file, file])[:1]
        assert len(reads) == 1

    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"gone\.png"):
            content_digests([tmp_path / "gone.png"])


class TestDraw:
    FILES = tuple(Path(f"{number:02}.png") for number in range(20))

    @pytest.mark.parametrize("seed", range(5))
    def test_without_replacement_and_repeatable(self, seed: int) -> None:
        drawn = draw_references(self.FILES, 8, seed, "here")
        assert len(set(drawn)) == 8
        assert set(drawn) <= set(self.FILES)
        assert draw_references(self.FILES, 8, seed, "here") == drawn

    def test_does_not_depend_on_or_touch_the_global_generator(self) -> None:
        torch.manual_seed(1)
        drawn = draw_references(self.FILES, 8, 0, "here")
        state = torch.get_rng_state()
        assert draw_references(self.FILES, 8, 0, "here") == drawn
        assert torch.equal(state, torch.get_rng_state())

    def test_smaller_draws_are_part_of_larger_ones(self) -> None:
        assert draw_references(self.FILES, 8, 3, "here")[:4] == draw_references(self.FILES, 4, 3, "here")

    def test_other_seeds_draw_others(self) -> None:
        assert len({tuple(draw_references(self.FILES, 4, seed, "here")) for seed in range(10)}) > 5

    def test_every_file_can_be_drawn(self) -> None:
        drawn = {file for seed in range(200) for file in draw_references(self.FILES, 2, seed, "here")}
        assert drawn == set(self.FILES)

    def test_exactly_as_many_keep_their_order(self) -> None:
        assert draw_references(self.FILES, 20, 5, "here") == list(self.FILES)

    def test_more_than_there_are(self) -> None:
        with pytest.raises(ValueError, match=r"`k_shot` must be at most the 20 normal images in the folder, got 21\."):
            draw_references(self.FILES, 21, 0, "the folder")


class TestSource:
    @staticmethod
    def datamodule(folder: Path) -> SimpleNamespace:
        """Four normal training images, in no order, and one that is not normal."""
        paths = [str(write(folder / name)) for name in ("d.png", "b.png", "bad.png", "a.png", "c.png")]
        samples = pd.DataFrame({"image_path": paths, "label_index": [0, 0, 1, 0, 0]})
        return SimpleNamespace(name="MVTecAD", category="nut", train_data=SimpleNamespace(samples=samples))

    def test_given_ones_come_first(self, tmp_path: Path) -> None:
        given = [write(tmp_path / "given" / name) for name in ("y.png", "x.png")]
        source = ReferenceSource(2, 0, given, self.datamodule(tmp_path))
        assert source.is_available
        assert source.draw() == given

    def test_normal_training_images_else(self, tmp_path: Path) -> None:
        source = ReferenceSource(4, 0, None, self.datamodule(tmp_path))
        assert source.is_available
        assert [path.name for path in source.draw()] == ["a.png", "b.png", "c.png", "d.png"]

    def test_nothing_to_draw_from(self) -> None:
        assert not ReferenceSource(1, 0, None, None).is_available
        assert not ReferenceSource(1, 0, None, SimpleNamespace(name="Folder", category=None)).is_available

    def test_too_few_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"at most the 4 normal images in the training images of MVTecAD nut, got 5\."
        ):
            ReferenceSource(5, 0, None, self.datamodule(tmp_path)).draw()
        with pytest.raises(ValueError, match=r"at most the 5 normal images in `references` .*, got 6\."):
            ReferenceSource(6, 0, str(tmp_path), None).draw()


class TestRead:
    def test_values(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.png")
        image = read_reference(path)
        assert image.shape == (1, 3, 6, 8)
        assert type(image) is torch.Tensor
        expected = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
        torch.testing.assert_close(image[0].float(), expected)

    def test_grayscale_has_three_equal_channels(self, tmp_path: Path) -> None:
        image = read_reference(write(tmp_path / "a.png", mode="L"))
        assert image.shape[1] == 3
        assert torch.equal(image[:, 0], image[:, 2])

    @pytest.mark.parametrize("content", [b"", b"no image"])
    def test_unreadable(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(
            UnreadableImageError, match=r"`references`: .*a\.png cannot be read as an image .*Replace or remove it"
        ):
            read_reference(tmp_path / "a.png")

    def test_truncated(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.png", 64, 64)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(UnreadableImageError, match=r"`references`: .*a\.png cannot be read as an image"):
            read_reference(path)

    def test_sixteen_bits(self, tmp_path: Path) -> None:
        """anomalib's reading of this is white."""
        plain = read_reference(write(tmp_path / "a.png", mode="L"))
        gray = np.array(Image.open(tmp_path / "a.png")).astype(np.uint16)
        Image.fromarray(gray * 257).save(tmp_path / "b.png")
        torch.testing.assert_close(read_reference(tmp_path / "b.png"), plain)
