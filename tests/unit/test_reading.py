"""The same image in every encoding is read the same; broken files are named; nobody else's data sets change."""

import copy
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.data.datasets.image.folder import FolderDataset
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from lightning.pytorch import LightningModule, Trainer
from PIL import Image, TiffImagePlugin
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.tv_tensors import Image as TensorImage

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data import AuxiliaryData, reading
from anomalib_aprilgan.data.reading import UnreadableImageError, load_image
from anomalib_aprilgan.data.reading_hooks import (
    ReadingHooks,
    SkippingLoader,
    read_rightly,
    skip_unreadable,
    unreadable_files,
)
from anomalib_aprilgan.demo import built_in

STEP = 1 / 255
ORIENTATION = 0x0112
# How a camera has stored an image that a viewer turns back: the inverse of each EXIF orientation.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def pixels(height: int = 48, width: int = 64, gray: bool = False) -> np.ndarray:
    """Smooth, so that JPEG keeps it, without symmetry; at most 256 colours, so that a palette keeps it."""
    rows, columns = np.mgrid[:height, :width] // 4
    channels = [rows * 20 + columns, columns * 15, 255 - rows * 12 - columns * 3]
    image = np.stack([channels[0]] * 3 if gray else channels, axis=-1)
    return np.clip(image, 0, 255).astype(np.uint8)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32) / 255).permute(2, 0, 1)


def turned(orientation: int, array: np.ndarray | None = None) -> tuple[Image.Image, Image.Exif]:
    """An image as a turned camera stores it, and the note that says so."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return Image.fromarray(pixels() if array is None else array).transpose(STORED[orientation]), exif


def encode(folder: Path) -> dict[str, float]:
    """One colour image in many encodings, and how far from the plain one each may be."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = Image.fromarray(pixels())
    alpha = plain.copy()
    alpha.putalpha(255)
    tolerances = {}

    def save(name: str, image: Image.Image, tolerance: float = 1e-6, **options: object) -> None:
        image.save(folder / name, **options)
        tolerances[name] = tolerance

    save("plain.png", plain)
    save("plain.bmp", plain)
    save("plain.ppm", plain)
    save("plain.webp", plain, lossless=True)
    save("plain.tif", plain)
    save("lzw.tiff", plain, compression="tiff_lzw")
    save("alpha.png", alpha)
    save("alpha.tif", alpha)
    save("palette.png", plain.quantize(256, dither=Image.Dither.NONE))
    save("cmyk.tif", plain.convert("CMYK"))
    # Two conversions of colour, each rounded.
    save("fine.jpg", plain, tolerance=6 * STEP, quality=100, subsampling=0)
    for orientation in STORED:
        stored, exif = turned(orientation)
        save(f"turned{orientation}.png", stored, exif=exif)
    stored, exif = turned(6)
    save("turned.jpg", stored, tolerance=6 * STEP, quality=100, subsampling=0, exif=exif)
    save("turned.tif", stored, exif=exif)
    return tolerances


class TestColour:
    def test_every_encoding_is_the_same_image(self, tmp_path: Path) -> None:
        tolerances = encode(tmp_path)
        for name, tolerance in tolerances.items():
            image = load_image(tmp_path / name)
            assert type(image) is torch.Tensor
            assert image.dtype == torch.float32
            torch.testing.assert_close(image, tensor(pixels()), rtol=0, atol=tolerance, msg=lambda m, n=name: n + m)

    def test_a_plain_image_is_what_anomalib_reads(self, tmp_path: Path) -> None:
        Image.fromarray(pixels()).save(tmp_path / "a.png")
        expected = read_image(tmp_path / "a.png", as_tensor=True).as_subclass(torch.Tensor)
        assert torch.equal(load_image(str(tmp_path / "a.png")), expected)

    def test_sixteen_bits_a_channel(self, tmp_path: Path) -> None:
        """Pillow writes none; a PPM is a header and numbers."""
        wide = (pixels().astype(">u2") * 257).astype(">u2")
        (tmp_path / "a.ppm").write_bytes(b"P6\n64 48\n65535\n" + wide.tobytes())
        torch.testing.assert_close(load_image(tmp_path / "a.ppm"), tensor(pixels()), rtol=0, atol=STEP)

    def test_turned_sides_are_swapped(self, tmp_path: Path) -> None:
        stored, exif = turned(8)
        stored.save(tmp_path / "a.png", exif=exif)
        assert stored.size == (48, 64)
        assert load_image(tmp_path / "a.png").shape == (3, 48, 64)

    def test_first_page(self, tmp_path: Path) -> None:
        pages = [Image.fromarray(pixels()), Image.new("RGB", (64, 48))]
        pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
        torch.testing.assert_close(load_image(tmp_path / "a.tif"), tensor(pixels()))


class TestTransparency:
    def test_laid_on_black_in_proportion(self, tmp_path: Path) -> None:
        alpha = np.zeros((48, 64), dtype=np.uint8)
        alpha[:, 16:32], alpha[:, 32:] = 51, 255
        image = Image.fromarray(pixels())
        image.putalpha(Image.fromarray(alpha))
        image.save(tmp_path / "a.png")
        expected = tensor(pixels()) * torch.from_numpy(alpha / np.float32(255))
        torch.testing.assert_close(load_image(tmp_path / "a.png"), expected, rtol=0, atol=STEP)

    @pytest.mark.parametrize("hidden", [0, 255])
    def test_colours_under_transparent_pixels_do_not_count(self, tmp_path: Path, hidden: int) -> None:
        Image.new("LA", (5, 4), (hidden, 0)).save(tmp_path / "a.png")
        assert torch.equal(load_image(tmp_path / "a.png"), torch.zeros(3, 4, 5))

    def test_palette_with_a_transparent_colour(self, tmp_path: Path) -> None:
        image = Image.new("P", (5, 4), 1)
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.putpixel((2, 3), 0)
        image.save(tmp_path / "a.png", transparency=0)
        expected = torch.zeros(3, 4, 5)
        expected[1] = 1.0
        expected[:, 3, 2] = 0.0
        assert torch.equal(load_image(tmp_path / "a.png"), expected)


class TestGray:
    @pytest.fixture
    def plain(self, tmp_path: Path) -> torch.Tensor:
        Image.fromarray(pixels(gray=True)[..., 0]).save(tmp_path / "plain.png")
        return load_image(tmp_path / "plain.png")

    def test_eight_bits(self, plain: torch.Tensor) -> None:
        torch.testing.assert_close(plain, tensor(pixels(gray=True)))

    @pytest.mark.parametrize("name", ["a.png", "a.tif"])
    def test_sixteen_bits(self, tmp_path: Path, plain: torch.Tensor, name: str) -> None:
        wide = pixels(gray=True)[..., 0].astype(np.uint16) * 257
        Image.fromarray(wide).save(tmp_path / name)
        assert Image.open(tmp_path / name).mode.startswith("I")
        torch.testing.assert_close(load_image(tmp_path / name), plain)

    def test_sixteen_bits_are_not_rounded_to_eight(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((2, 2), 32769, dtype=np.uint16)).save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png")[0, 0, 0].item() == pytest.approx(32769 / 65535, abs=1e-7)

    def test_other_byte_order(self, tmp_path: Path, plain: torch.Tensor) -> None:
        wide = (pixels(gray=True)[..., 0].astype(np.uint16) * 257).astype(">u2")
        Image.frombytes("I;16B", (64, 48), wide.tobytes()).save(tmp_path / "a.tif")
        torch.testing.assert_close(load_image(tmp_path / "a.tif"), plain)

    def test_netpbm(self, tmp_path: Path, plain: torch.Tensor) -> None:
        wide = (pixels(gray=True)[..., 0].astype(np.uint16) * 257).astype(">u2")
        (tmp_path / "a.pgm").write_bytes(b"P5\n64 48\n65535\n" + wide.tobytes())
        torch.testing.assert_close(load_image(tmp_path / "a.pgm"), plain)

    def test_integers(self, tmp_path: Path, plain: torch.Tensor) -> None:
        Image.fromarray(pixels(gray=True)[..., 0].astype(np.int32) * 257).save(tmp_path / "a.tif")
        torch.testing.assert_close(load_image(tmp_path / "a.tif"), plain)

    def test_white_is_zero(self, tmp_path: Path, plain: torch.Tensor) -> None:
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[262] = 0
        wide = 65535 - pixels(gray=True)[..., 0].astype(np.uint16) * 257
        Image.fromarray(wide).save(tmp_path / "a.tif", tiffinfo=tags)
        assert Image.open(tmp_path / "a.tif").tag_v2[262] == 0
        torch.testing.assert_close(load_image(tmp_path / "a.tif"), plain)

    def test_turned(self, tmp_path: Path, plain: torch.Tensor) -> None:
        stored, exif = turned(6, pixels(gray=True)[..., 0].astype(np.uint16) * 257)
        stored.save(tmp_path / "a.png", exif=exif)
        torch.testing.assert_close(load_image(tmp_path / "a.png"), plain)

    def test_float(self, tmp_path: Path, plain: torch.Tensor) -> None:
        Image.fromarray(pixels(gray=True)[..., 0].astype(np.float32) / 255).save(tmp_path / "a.tif")
        torch.testing.assert_close(load_image(tmp_path / "a.tif"), plain)

    def test_one_bit(self, tmp_path: Path) -> None:
        bits = pixels(gray=True)[..., 0] > 127
        Image.fromarray(bits).save(tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").mode == "1"
        assert torch.equal(load_image(tmp_path / "a.png"), torch.from_numpy(bits).float().repeat(3, 1, 1))

    def test_opaque_alpha(self, tmp_path: Path, plain: torch.Tensor) -> None:
        image = Image.fromarray(pixels(gray=True)[..., 0]).convert("LA")
        image.save(tmp_path / "a.png")
        assert torch.equal(load_image(tmp_path / "a.png"), plain)

    def test_unscaled_twelve_bits_are_warned_of(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((2, 2), 4095, dtype=np.uint16)).save(tmp_path / "a.png")
        with pytest.warns(UserWarning, match=r"no value above 4095 of 65535 and is nearly black"):
            image = load_image(tmp_path / "a.png")
        assert image.max().item() == pytest.approx(4095 / 65535)


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [(b"", "no format"), (b"no image", "no format"), (None, "No such file")],
    )
    def test_no_image(self, tmp_path: Path, content: bytes | None, reason: str) -> None:
        path = tmp_path / "a.png"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UnreadableImageError, match=rf"a\.png cannot be read as an image \({reason}") as caught:
            load_image(path)
        assert caught.value.path == path
        assert "Replace or remove it, or save it as PNG" in str(caught.value)

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp"])
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_cut_off(self, tmp_path: Path, name: str, share: float) -> None:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(UnreadableImageError, match=name):
            load_image(tmp_path / name)

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UnreadableImageError, match=r"Is a directory|Permission denied"):
            load_image(tmp_path)

    @pytest.mark.parametrize("value", [-0.1, 1.5, 255.0, float("nan")])
    def test_float_out_of_range(self, tmp_path: Path, value: float) -> None:
        values = np.zeros((3, 3), dtype=np.float32)
        values[1, 1] = value
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(UnreadableImageError, match=r"float values must lie in \[0, 1\], these lie in"):
            load_image(tmp_path / "a.tif")

    @pytest.mark.parametrize("value", [-1, 65536])
    def test_integer_out_of_range(self, tmp_path: Path, value: int) -> None:
        Image.fromarray(np.full((3, 3), value, dtype=np.int32)).save(tmp_path / "a.tif")
        with pytest.raises(UnreadableImageError, match=r"integer values must lie in \[0, 65535\]"):
            load_image(tmp_path / "a.tif")

    def test_survives_the_way_between_processes(self, tmp_path: Path) -> None:
        error = UnreadableImageError.of(tmp_path / "a.png", "why")
        restored = pickle.loads(pickle.dumps(error))  # noqa: S301
        assert (str(restored), restored.path) == (str(error), tmp_path / "a.png")


class TestSize:
    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.bmp"])
    def test_past_pillows_limit(self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        Image.fromarray(pixels()).save(tmp_path / name)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(Image.DecompressionBombError):
            Image.open(tmp_path / name).load()
        assert load_image(tmp_path / name).shape == (3, 48, 64)
        assert Image.MAX_IMAGE_PIXELS == 100

    @pytest.mark.parametrize("limit", [100, None])
    def test_past_ours(self, tmp_path: Path, limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        Image.fromarray(pixels()).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        monkeypatch.setattr(reading, "MAX_PIXELS", 64 * 48 - 1)
        with pytest.raises(UnreadableImageError, match=r"64 x 48 is more than 3071 pixels; cut it into pieces"):
            load_image(tmp_path / "a.png")
        assert limit == Image.MAX_IMAGE_PIXELS

    def test_line_scans_fit(self) -> None:
        assert reading.MAX_PIXELS > 16384 * 16384

    def test_the_limit_can_be_set(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Image.fromarray(pixels()).save(tmp_path / "a.png")
        monkeypatch.setenv("ANOMALIB_APRILGAN_MAX_PIXELS", str(48 * 64))
        assert load_image(tmp_path / "a.png").shape == (3, 48, 64)
        monkeypatch.setenv("ANOMALIB_APRILGAN_MAX_PIXELS", str(48 * 64 - 1))
        with pytest.raises(UnreadableImageError, match=r"64 x 48 is more than 3071 pixels; .* set ANOMALIB"):
            load_image(tmp_path / "a.png")
        for wrong in ("0", "-5", "many", "1e9"):
            monkeypatch.setenv("ANOMALIB_APRILGAN_MAX_PIXELS", wrong)
            with pytest.raises(ValueError, match=f"`ANOMALIB_APRILGAN_MAX_PIXELS` must be .* got '{wrong}'"):
                load_image(tmp_path / "a.png")

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
    @pytest.mark.parametrize("place", ["read", "resize"])
    def test_out_of_memory_is_an_unreadable_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, place: str
    ) -> None:
        for name in "ab":
            Image.fromarray(pixels()).save(tmp_path / f"{name}.png")

        def fail(*_: object) -> None:
            raise error

        if place == "read":
            monkeypatch.setattr(reading, "_to_tensor", fail)
        dataset = PredictDataset(tmp_path)
        message = "b.png cannot be read as an image .there is not enough memory for it; cut it into pieces"
        resize = fail if place == "resize" else None
        with read_rightly(dataset, resize), pytest.raises(UnreadableImageError, match=message):
            dataset[1]


def write_wide(path: Path) -> Path:
    """A 16-bit image, which anomalib reads as white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(gray=True)[..., 0].astype(np.uint16) * 257).save(path)
    return path


def is_read_rightly(image: torch.Tensor) -> bool:
    return torch.allclose(image.as_subclass(torch.Tensor), tensor(pixels(gray=True)), atol=1e-6)


class TestDatasets:
    def test_one_instance_and_no_other(self, tmp_path: Path) -> None:
        write_wide(tmp_path / "a.png")
        dataset, other = PredictDataset(tmp_path), PredictDataset(tmp_path)
        before = dataset[0].image
        with read_rightly(dataset):
            assert is_read_rightly(dataset[0].image)
            assert isinstance(dataset[0].image, TensorImage)
            assert dataset[0].image_path == other[0].image_path
            assert isinstance(dataset, PredictDataset)
            assert type(dataset).__name__ == "PredictDataset"
            assert not is_read_rightly(other[0].image)
            assert not is_read_rightly(PredictDataset(tmp_path)[0].image)
        assert type(dataset) is PredictDataset
        assert torch.equal(dataset[0].image, before)
        assert vars(dataset).keys() == vars(other).keys()

    def test_put_back_after_an_error(self, tmp_path: Path) -> None:
        write_wide(tmp_path / "a.png")
        dataset = PredictDataset(tmp_path)
        with pytest.raises(KeyError), read_rightly(dataset), skip_unreadable(DataLoader(dataset)):
            raise KeyError
        assert type(dataset) is PredictDataset

    def test_transforms_are_kept(self, tmp_path: Path) -> None:
        write_wide(tmp_path / "a.png")
        dataset = PredictDataset(tmp_path, transform=lambda image: 1 - image)
        with read_rightly(dataset):
            assert is_read_rightly(1 - dataset[0].image)

    def test_nested(self, tmp_path: Path) -> None:
        write_wide(tmp_path / "a.png")
        dataset = PredictDataset(tmp_path)
        with read_rightly(dataset):
            once = type(dataset)
            with read_rightly([dataset, dataset]):
                assert type(dataset) is once
            assert type(dataset) is once
            assert once.__mro__[1] is PredictDataset
        assert type(dataset) is PredictDataset

    def test_copies_read_the_same(self, tmp_path: Path) -> None:
        write_wide(tmp_path / "a.png")
        dataset = PredictDataset(tmp_path)
        with read_rightly(dataset):
            restored = pickle.loads(pickle.dumps(dataset))  # noqa: S301
            for twin in (restored, copy.deepcopy(dataset), copy.copy(dataset)):
                assert is_read_rightly(twin[0].image)
                assert type(twin) is type(dataset)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda dataset: Subset(dataset, [0]),
            lambda dataset: Subset(Subset(dataset, [0]), [0]),
            lambda dataset: ConcatDataset([dataset, dataset]),
            DataLoader,
            lambda dataset: [DataLoader(Subset(dataset, [0]))],
            lambda dataset: {"a": DataLoader(dataset)},
        ],
    )
    def test_in_wrappings(self, tmp_path: Path, wrap: object) -> None:
        write_wide(tmp_path / "a.png")
        dataset = PredictDataset(tmp_path)
        with read_rightly(wrap(dataset)):
            assert is_read_rightly(dataset[0].image)
        assert type(dataset) is PredictDataset

    def test_what_reads_on_its_own_is_left(self) -> None:
        class Own(torch.utils.data.Dataset):
            def __getitem__(self, index: int) -> int:
                return index

        own = Own()
        with read_rightly([own, None, "text", 3]):
            assert type(own) is Own

    def test_datamodule(self, tmp_path: Path) -> None:
        """Images in 16 bits, masks as anomalib reads them, loaded by worker processes."""
        for name in ("good/a.png", "good/b.png", "bad/c.png", "bad/d.png"):
            write_wide(tmp_path / name)
        (tmp_path / "mask").mkdir()
        mask = np.zeros((48, 64), dtype=np.uint8)
        mask[5:9, 7:20] = 255
        for name in ("c.png", "d.png"):
            Image.fromarray(mask).save(tmp_path / "mask" / name)
        folders = {"normal_dir": "good", "abnormal_dir": "bad", "mask_dir": "mask"}
        datamodule = Folder("parts", root=tmp_path, **folders, num_workers=1, eval_batch_size=8)
        datamodule.setup()
        with read_rightly(datamodule):
            assert datamodule.train_data.name == "parts"
            assert type(datamodule.test_data).__name__ == "FolderDataset"
            batch = next(iter(datamodule.test_dataloader()))
        assert all(is_read_rightly(image) for image in batch.image)
        anomalous = batch.gt_mask[batch.gt_label]
        assert len(anomalous)
        assert all(torch.equal(image, torch.from_numpy(mask > 0)) for image in anomalous)

    @pytest.mark.parametrize("masks", [{"mask_dir": "mask"}, {}])
    def test_many_categories_always_read_so_and_leave_their_sources_alone(self, tmp_path: Path, masks: dict) -> None:
        for name in ("good/a.png", "good/b.png", "bad/c.png", "bad/d.png"):
            write_wide(tmp_path / name)
        for name in ("c.png", "d.png"):
            write_wide(tmp_path / "mask" / name)
        folder = Folder("parts", root=tmp_path, normal_dir="good", normal_test_dir="good", abnormal_dir="bad", **masks)
        auxiliary = AuxiliaryData(datamodules=[folder], val_split_ratio=0.5)
        auxiliary.setup()
        for dataset in (auxiliary.train_data, auxiliary.val_data):
            assert all(is_read_rightly(dataset[index].image) for index in range(len(dataset)))
        assert type(folder.test_data) is FolderDataset
        assert not is_read_rightly(folder.test_data[0].image)

    def test_a_broken_file_among_labelled_ones_is_an_error_with_its_name(self, tmp_path: Path) -> None:
        for name in ("good/a.png", "good/b.png", "bad/c.png", "bad/d.png"):
            write_wide(tmp_path / name)
        (tmp_path / "bad" / "d.png").write_bytes(b"broken")
        folders = {"normal_dir": "good", "abnormal_dir": "bad"}
        datamodule = Folder("parts", root=tmp_path, **folders, num_workers=1, val_split_mode="same_as_test")
        datamodule.setup()
        loader = datamodule.predict_dataloader()
        error = pytest.raises(UnreadableImageError, match=r"d\.png cannot be read")
        with read_rightly(datamodule), skip_unreadable(loader), error:
            list(loader)


class TestSkipping:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Seven images, of which the second, fifth and sixth are broken: with batches of two, one has none left."""
        for number in range(7):
            write_wide(tmp_path / "parts" / f"{number}.png")
        for number in (1, 4, 5):
            (tmp_path / "parts" / f"{number}.png").write_bytes(b"broken")
        return tmp_path / "parts"

    @staticmethod
    def loader(dataset: torch.utils.data.Dataset, **options: object) -> DataLoader:
        return DataLoader(dataset, collate_fn=ImageBatch.collate, **options)

    @staticmethod
    def names(batches: list[ImageBatch]) -> list[list[str]]:
        return [[Path(path).stem for path in batch.image_path] for batch in batches]

    @pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
    def test_the_rest_is_done(self, folder: Path, options: dict, caplog: pytest.LogCaptureFixture) -> None:
        loader = self.loader(PredictDataset(folder), batch_size=2, **options)
        before = dict(vars(loader))
        with skip_unreadable(loader):
            for _ in range(2):
                self.check_one_pass(loader, folder, caplog)
        assert type(loader) is DataLoader
        assert vars(loader).keys() == before.keys()
        assert (loader.dataset, loader.collate_fn) == (before["dataset"], before["collate_fn"])
        assert type(loader.dataset) is PredictDataset

    def check_one_pass(self, loader: DataLoader, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            batches = list(loader)
        assert self.names(batches) == [["0"], ["2", "3"], ["6"]]
        assert all(is_read_rightly(image) for batch in batches for image in batch.image)
        assert [path.name for path in unreadable_files([loader])] == ["1.png", "4.png", "5.png"]
        messages = [record.getMessage() for record in caplog.records]
        assert [text.split(" cannot be read")[0] for text in messages] == [
            f"Skipped: {folder / name}" for name in ("1.png", "4.png", "5.png")
        ]

    def test_many_times_is_once(self, folder: Path) -> None:
        loader = self.loader(Subset(PredictDataset(folder), [0, 1, 2]))
        with skip_unreadable({"a": loader}), skip_unreadable([loader, loader]), skip_unreadable(loader):
            assert type(loader) is SkippingLoader
            assert self.names(list(loader)) == [["0"], ["2"]]
            assert [path.name for path in unreadable_files(loader)] == ["1.png"]
        assert type(loader) is DataLoader

    def test_another_loader_of_the_data_set_raises(self, folder: Path) -> None:
        dataset = PredictDataset(folder)
        skipping, other = self.loader(dataset), self.loader(dataset)
        with skip_unreadable(skipping):
            assert len(list(skipping)) == 4
            with pytest.raises(UnreadableImageError, match=r"1\.png"):
                list(other)

    def test_nothing_readable(self, folder: Path) -> None:
        loader = self.loader(Subset(PredictDataset(folder), [4, 1]), batch_size=2)
        with (
            skip_unreadable(loader),
            pytest.raises(UnreadableImageError, match=r"None of 2 files can be read\. The first: .*4\.png"),
        ):
            list(loader)

    def test_other_data_is_left(self, folder: Path) -> None:
        mixed = self.loader(ConcatDataset([PredictDataset(folder)]))
        with skip_unreadable([mixed, None]):
            assert type(mixed) is DataLoader
            assert unreadable_files(mixed) == []


class Looks(LightningModule):
    """Notes for every loop whether its images came as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[bool]] = {}
        self.hooks = ReadingHooks()

    def setup(self, stage: str) -> None:
        self.hooks.install(self.trainer, stage)

    def configure_callbacks(self) -> ReadingHooks:
        return self.hooks

    def look(self, batch: ImageBatch) -> None:
        stage = str(self.trainer.state.stage.value)
        self.seen.setdefault(stage, []).extend(is_read_rightly(image.cpu()) for image in batch.image)

    def training_step(self, batch: ImageBatch) -> None:
        self.look(batch)

    def validation_step(self, batch: ImageBatch) -> None:
        self.look(batch)

    def test_step(self, batch: ImageBatch) -> None:
        self.look(batch)

    def predict_step(self, batch: ImageBatch, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        del batch_idx, dataloader_idx
        self.look(batch)

    def configure_optimizers(self) -> None:
        return None


class TestTrainer:
    """With loaders as they are passed, and workers, which start before any hook of the loops."""

    @pytest.fixture
    def module(self) -> Looks:
        return Looks()

    @pytest.fixture
    def trainer(self, tmp_path: Path) -> Trainer:
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **options)

    @staticmethod
    def loader(folder: Path) -> DataLoader:
        for name in ("a.png", "b.png"):
            write_wide(folder / name)
        return DataLoader(PredictDataset(folder), collate_fn=ImageBatch.collate, num_workers=1)

    def test_fit(self, module: Looks, trainer: Trainer, tmp_path: Path) -> None:
        trainer.fit(module, self.loader(tmp_path / "train"), self.loader(tmp_path / "val"))
        assert module.seen == {"train": [True] * 2, "validate": [True] * 2, "sanity_check": [True] * 2}

    @pytest.mark.parametrize("stage", ["validate", "test", "predict"])
    def test_evaluation(self, module: Looks, trainer: Trainer, tmp_path: Path, stage: str) -> None:
        getattr(trainer, stage)(module, [self.loader(tmp_path / "parts")])
        assert module.seen == {stage: [True] * 2}

    def test_several_loaders(self, module: Looks, trainer: Trainer, tmp_path: Path) -> None:
        loaders = [self.loader(tmp_path / "one"), self.loader(tmp_path / "two")]
        (tmp_path / "two" / "a.png").write_bytes(b"broken")
        trainer.predict(module, loaders)
        assert module.seen == {"predict": [True] * 3}
        assert unreadable_files(trainer.predict_dataloaders) == [tmp_path / "two" / "a.png"]
        for loader in loaders:
            assert (type(loader), type(loader.dataset)) == (DataLoader, PredictDataset)
            assert loader.collate_fn == ImageBatch.collate

    @pytest.mark.parametrize("stage", ["validate", "test"])
    def test_broken_files_are_errors_but_in_prediction(
        self, module: Looks, trainer: Trainer, tmp_path: Path, stage: str
    ) -> None:
        loader = self.loader(tmp_path / "parts")
        (tmp_path / "parts" / "b.png").write_bytes(b"broken")
        with pytest.raises(UnreadableImageError, match=r"b\.png cannot be read"):
            getattr(trainer, stage)(module, loader, verbose=False)
        trainer.predict(module, loader)
        assert module.seen["predict"] == [True]
        assert unreadable_files(trainer.predict_dataloaders) == [tmp_path / "parts" / "b.png"]
        assert (type(loader), type(loader.dataset)) == (DataLoader, PredictDataset)
        assert loader.collate_fn == ImageBatch.collate

    def test_a_copy_of_the_module_in_a_run_has_nothing_to_put_back(self, trainer: Trainer, tmp_path: Path) -> None:
        """As the callbacks that average weights make one."""

        class Copies(Looks):
            def predict_step(self, batch: ImageBatch) -> None:
                self.look(batch)
                twin = copy.deepcopy(self)
                twin.hooks.restore(self.trainer)

        module = Copies()
        trainer.predict(module, self.loader(tmp_path / "parts"))
        assert module.seen == {"predict": [True] * 2}


@pytest.fixture(scope="module")
def model() -> AprilGAN:
    return AprilGAN(
        backbone="ViT-drawn-96",
        pretrained="drawn",
        image_size=96,
        stages=built_in.STAGES,
        class_name="nut",
        visualizer=False,
    )


class TestPrediction:
    def test_every_encoding_has_the_same_score(self, model: AprilGAN, tmp_path: Path) -> None:
        encode(tmp_path / "parts")
        engine = Engine(default_root_dir=tmp_path / "results", logger=False)
        predictions = engine.predict(model, data_path=tmp_path / "parts")
        scores = {Path(batch.image_path[0]).name: batch.pred_score.item() for batch in predictions}
        assert set(scores) == {path.name for path in (tmp_path / "parts").iterdir()}
        # JPEG changes pixels: the two of them are compared with each other.
        lossy = {name: score for name, score in scores.items() if name.endswith(".jpg")}
        lossless = {name: score for name, score in scores.items() if name not in lossy}
        assert lossless == pytest.approx(dict.fromkeys(lossless, scores["plain.png"]), abs=1e-3)
        assert lossy == pytest.approx(dict.fromkeys(lossy, scores["fine.jpg"]), abs=1e-3)

    def test_gray_in_eight_and_sixteen_bits(self, model: AprilGAN, tmp_path: Path) -> None:
        write_wide(tmp_path / "parts" / "wide.png")
        Image.fromarray(pixels(gray=True)[..., 0]).save(tmp_path / "parts" / "plain.png")
        engine = Engine(default_root_dir=tmp_path / "results", logger=False)
        plain, wide = engine.predict(model, data_path=tmp_path / "parts")
        assert wide.pred_score.item() == pytest.approx(plain.pred_score.item(), abs=1e-3)
        torch.testing.assert_close(wide.anomaly_map, plain.anomaly_map, rtol=0, atol=1e-3)

    @pytest.mark.parametrize("options", [{}, {"batch_size": 2, "num_workers": 1}])
    def test_broken_files_are_skipped(self, model: AprilGAN, tmp_path: Path, options: dict) -> None:
        for number in range(5):
            write_wide(tmp_path / "parts" / f"{number}.png")
        for number in (0, 2, 3):
            (tmp_path / "parts" / f"{number}.png").write_bytes(b"broken")
        engine = Engine(default_root_dir=tmp_path / "results", logger=False)
        dataset = PredictDataset(tmp_path / "parts")
        given = {"dataloaders": DataLoader(dataset, collate_fn=dataset.collate_fn, **options)} if options else {}
        predictions = engine.predict(model, **(given or {"data_path": tmp_path / "parts"}))
        assert [Path(path).stem for batch in predictions for path in batch.image_path] == ["1", "4"]
        assert all(batch.pred_score.shape == (1,) for batch in predictions)
        skipped = unreadable_files(engine.trainer.predict_dataloaders)
        assert [path.name for path in skipped] == ["0.png", "2.png", "3.png"]
