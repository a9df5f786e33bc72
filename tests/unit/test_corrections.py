"""Escaped defects and their masks, where adapters can be trained on them."""

from pathlib import Path

import numpy as np
import pytest
from anomalib.data import Folder
from PIL import Image

from anomalib_aprilgan.data.corrections import add_to_training_folder, masks_of
from anomalib_aprilgan.data.reading import UnreadableImageError


@pytest.fixture
def defects(tmp_path: Path) -> list[Path]:
    """Two images, with masks of one bit and of 0 and 1."""
    files = []
    (tmp_path / "masks").mkdir()
    for number in range(2):
        files.append(tmp_path / f"part {number}.jpg")
        Image.effect_noise((40, 30), 60 + number).convert("RGB").save(files[-1])
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[5:9, 10:20] = 255
    Image.fromarray(mask > 0).save(tmp_path / "masks" / "part 0.png")
    Image.fromarray((mask > 0).astype(np.uint8)).save(tmp_path / "masks" / "part 1.bmp")
    return files


def test_images_and_masks_are_where_a_datamodule_finds_them(defects: list[Path], tmp_path: Path) -> None:
    masks = masks_of(defects, tmp_path / "masks")
    folder = tmp_path / "training"
    for _ in range(2):  # the second time changes nothing
        add_to_training_folder(defects, masks, folder)
    (tmp_path / "good").mkdir()
    for number in range(3):
        Image.effect_noise((40, 30), 50).convert("RGB").save(tmp_path / "good" / f"{number}.png")
    data = Folder(
        name="part", normal_dir=tmp_path / "good", abnormal_dir=folder / "defective", mask_dir=folder / "masks",
        num_workers=0, val_split_mode="none",
    )  # fmt: skip
    data.setup()
    items = [data.test_data[number] for number in range(len(data.test_data))]
    defective = [item for item in items if item.gt_label]
    assert len(defective) == 2
    for item in defective:
        assert int((item.gt_mask > 0).sum()) == 40
        assert (item.gt_mask[5:9, 10:20] > 0).all()
    written = sorted(path.name for path in (folder / "defective").iterdir())
    assert [name[:7] for name in written] == ["part 0-", "part 1-"]
    assert sorted(path.read_bytes() for path in (folder / "defective").iterdir()) == sorted(
        path.read_bytes() for path in defects
    )


def test_files_of_the_same_name_are_kept_apart(defects: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other" / "part 0.jpg"
    other.parent.mkdir()
    Image.effect_noise((40, 30), 20).convert("RGB").save(other)
    files = [defects[0], other]
    add_to_training_folder(files, masks_of(files, tmp_path / "masks"), tmp_path / "training")
    assert len(list((tmp_path / "training" / "defective").iterdir())) == 2


class TestBadInput:
    def test_no_folder(self, defects: list[Path], tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"`masks`: .*nowhere is no folder"):
            masks_of(defects, tmp_path / "nowhere")

    def test_no_mask(self, defects: list[Path], tmp_path: Path) -> None:
        (tmp_path / "masks" / "part 1.bmp").unlink()
        with pytest.raises(FileNotFoundError, match=r"`masks`: .* has no mask of part 1.jpg: an image named 'part 1'"):
            masks_of(defects, tmp_path / "masks")

    def test_a_broken_mask(self, defects: list[Path], tmp_path: Path) -> None:
        (tmp_path / "masks" / "part 1.bmp").write_bytes(b"broken")
        with pytest.raises(UnreadableImageError, match=r"`masks`: .*part 1.bmp cannot be read as an image"):
            masks_of(defects, tmp_path / "masks")

    def test_a_mask_of_another_size(self, defects: list[Path], tmp_path: Path) -> None:
        Image.new("L", (40, 31), 255).save(tmp_path / "masks" / "part 1.bmp")
        with pytest.raises(ValueError, match="must be as large as its image, 40 x 30 pixels, got 40 x 31"):
            masks_of(defects, tmp_path / "masks")

    def test_an_empty_mask(self, defects: list[Path], tmp_path: Path) -> None:
        Image.new("L", (40, 30)).save(tmp_path / "masks" / "part 1.bmp")
        with pytest.raises(ValueError, match=r"part 1\.bmp shows no defect: mark what is defective in white"):
            masks_of(defects, tmp_path / "masks")
