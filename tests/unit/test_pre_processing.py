"""The 8-bit resize against Pillow, and its use as a torchvision transform and in a pre-processor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from PIL import Image as PillowImage
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import Compose, Normalize, Resize
from torchvision.tv_tensors import Image, Mask

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data.pre_processing import (
    CLIP_MEAN,
    CLIP_STD,
    AprilGANPreProcessor,
    EightBitResize,
    aspect_size,
    prepared,
    resize_image,
    resize_mask,
)

# From (height, width) to (height, width): down, up, both, odd, extreme.
SIZES = [
    ((100, 100), (37, 37)),
    ((64, 64), (96, 96)),
    ((61, 47), (96, 96)),
    ((40, 200), (96, 64)),
    ((200, 40), (64, 96)),
    ((97, 96), (96, 96)),
    ((3, 5), (50, 20)),
    ((300, 2), (7, 9)),
    ((50, 60), (1, 1)),
]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """8-bit noise, the hardest case: every filter tap counts."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def pillow(
    pixels: np.ndarray, size: tuple[int, int], kernel: PillowImage.Resampling = PillowImage.Resampling.BICUBIC
) -> np.ndarray:
    """Pillow's resize, along the width and then along the height.

    Up to version 12 that is what a single call does, and what the published results rest on;
    version 13 takes the cheaper order, which moves noise by up to 17 steps of 255.
    """
    image = PillowImage.fromarray(pixels)
    return np.array(image.resize((size[1], image.height), kernel).resize((size[1], size[0]), kernel))


class TestImage:
    @pytest.mark.parametrize(("before", "after"), SIZES)
    def test_within_one_step_of_pillow(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        pixels = noise(*before)
        ours = resize_image(as_tensor(pixels), after) * 255
        difference = (ours - as_tensor(pillow(pixels, after))).abs()
        assert ours.shape == (3, *after)
        assert difference.max() < 1.01
        assert difference.gt(0.5).float().mean() < 0.01  # where a sum lies half-way

    @pytest.mark.parametrize(("before", "after"), SIZES)
    def test_floats_give_the_same_as_bytes(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        image = as_tensor(noise(*before))
        assert torch.equal(resize_image(image, after), resize_image(image / 255, after))
        assert torch.equal(resize_image(image, after), resize_image(image.double() / 255, after))

    def test_result_lies_on_the_eight_bit_grid(self) -> None:
        resized = resize_image(torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)), (31, 33)) * 255
        assert resized.dtype == torch.float32
        assert (resized - resized.round()).abs().max() < 1e-4
        assert 0 <= resized.min() < resized.max() <= 255

    def test_same_size_is_identity(self) -> None:
        image = as_tensor(noise(20, 30))
        assert torch.equal(resize_image(image, (20, 30)), image / 255)

    def test_half_way_values_are_rounded_up(self) -> None:
        # Two pixels to one: (0 + 1) / 2 = 0.5, which Pillow's fixed point rounds up.
        image = torch.tensor([[[0, 1]]], dtype=torch.uint8)
        assert (resize_image(image, (1, 1)) * 255).item() == pytest.approx(1.0)
        assert np.asarray(PillowImage.fromarray(np.array([[0, 1]], np.uint8)).resize((1, 1), 3)).item() == 1

    def test_one_pixel_becomes_an_even_image(self) -> None:
        image = torch.tensor([10, 20, 30], dtype=torch.uint8).reshape(3, 1, 1)
        resized = resize_image(image, (8, 5)) * 255
        torch.testing.assert_close(resized, torch.tensor([10.0, 20.0, 30.0]).reshape(3, 1, 1).expand(3, 8, 5))

    def test_constant_images_stay_constant(self) -> None:
        resized = resize_image(torch.full((3, 33, 17), 0.6), (50, 9))
        torch.testing.assert_close(resized, torch.full((3, 50, 9), 0.6))

    def test_overshoot_is_cut(self) -> None:
        edge = torch.zeros(1, 16, 16)
        edge[..., 8:] = 1.0
        resized = resize_image(edge, (64, 64))
        assert resized.min() == 0.0
        assert resized.max() == 1.0

    def test_batch_equals_single_images(self) -> None:
        batch = torch.stack([as_tensor(noise(30, 40, seed)) for seed in range(3)])
        together = resize_image(batch, (16, 24))
        for image, resized in zip(batch, together, strict=True):
            assert torch.equal(resize_image(image, (16, 24)), resized)

    def test_transposing_changes_at_most_the_rounding(self) -> None:
        image = as_tensor(noise(30, 50))
        difference = resize_image(image.mT, (24, 16)) - resize_image(image, (16, 24)).mT
        assert difference.abs().max() * 255 < 2.01

    def test_antialias_matters(self) -> None:
        """What the class is for: without antialias the same reduction lands far off."""
        pixels = noise(100, 100)
        expected = as_tensor(pillow(pixels, (25, 25))).float()
        plain = torch.nn.functional.interpolate(as_tensor(pixels)[None].float(), (25, 25), mode="bicubic")[0]
        ours = resize_image(as_tensor(pixels), (25, 25)) * 255
        assert (plain - expected).abs().mean() > 20
        assert (ours - expected).abs().mean() < 0.05

    def test_argument_is_left_alone(self) -> None:
        image = torch.rand(3, 10, 10)
        copy = image.clone()
        resize_image(image, (5, 5))
        assert torch.equal(image, copy)


class TestMask:
    @pytest.mark.parametrize(("before", "after"), SIZES)
    def test_matches_pillow(self, before: tuple[int, int], after: tuple[int, int]) -> None:
        rng = np.random.default_rng(1)
        mask = np.zeros(before, dtype=np.uint8)
        mask[rng.random(before) < 0.1] = 255
        mask[before[0] // 3 : before[0] // 3 * 2 + 1, before[1] // 3 : before[1] // 3 * 2 + 1] = 255
        theirs = pillow(mask, after, PillowImage.Resampling.BILINEAR)
        ours = resize_mask(torch.from_numpy(mask), after)
        # Where Pillow's value is not at the cut itself there is no room for a difference.
        clear = torch.from_numpy(np.abs(theirs.astype(float) - 127.5) > 1)
        assert torch.equal(ours[clear], torch.from_numpy(theirs > 127.5).to(torch.uint8)[clear])
        assert clear.float().mean() > 0.9 or clear.numel() == 1

    def test_anything_above_zero_is_set(self) -> None:
        mask = torch.tensor([[0, 1], [128, 255]], dtype=torch.uint8)
        assert resize_mask(mask, (2, 2)).tolist() == [[0, 1], [1, 1]]
        assert torch.equal(resize_mask(mask, (8, 8)), resize_mask((mask > 0).to(torch.uint8) * 7, (8, 8)))

    def test_one_quarter_of_a_cell_is_too_little_three_are_enough(self) -> None:
        little, much = torch.tensor([[1, 0], [0, 0]]), torch.tensor([[1, 1], [1, 0]])
        assert resize_mask(little, (1, 1)).item() == 0
        assert resize_mask(much, (1, 1)).item() == 1

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
    def test_keeps_the_dtype(self, dtype: torch.dtype) -> None:
        mask = torch.zeros(1, 12, 12, dtype=dtype)
        mask[..., 4:8, 4:8] = 1
        for size in ((12, 12), (24, 24)):
            resized = resize_mask(mask, size)
            assert resized.dtype == dtype
            assert resized.float().mean().item() == pytest.approx(1 / 9, abs=0.02)


class TestTransform:
    def test_is_a_resize_that_says_what_it_does(self) -> None:
        resize = EightBitResize((30, 20))
        assert isinstance(resize, Resize)
        assert tuple(resize.size) == (30, 20)
        assert resize.antialias

    def test_images_and_masks_by_type(self) -> None:
        image = Image(as_tensor(noise(40, 50)))
        mask = Mask(torch.zeros(40, 50, dtype=torch.uint8))
        mask[10:30, 10:30] = 1
        out_image, out_mask = EightBitResize((30, 20))(image, mask)
        assert isinstance(out_image, Image)
        assert isinstance(out_mask, Mask)
        assert torch.equal(out_image.as_subclass(Tensor), resize_image(image.as_subclass(Tensor), (30, 20)))
        assert torch.equal(out_mask.as_subclass(Tensor), resize_mask(mask.as_subclass(Tensor), (30, 20)))

    def test_plain_tensors_stay_plain(self) -> None:
        image = torch.rand(3, 40, 50)
        resized = EightBitResize((30, 20))(image)
        assert type(resized) is Tensor
        assert torch.equal(resized, resize_image(image, (30, 20)))

    def test_pillow_images_are_pillows_own_affair(self) -> None:
        resized = EightBitResize((30, 20))(PillowImage.fromarray(noise(40, 50)))
        assert resized.size == (20, 30)


class TestAspectSize:
    @pytest.mark.parametrize(
        ("image_size", "grid"),
        [
            ((900, 900), (37, 37)),
            ((1024, 2048), (26, 52)),
            ((2048, 1024), (52, 26)),
            ((1000, 1500), (30, 45)),
            ((1080, 1920), (27, 48)),
        ],
    )
    def test_worked_values(self, image_size: tuple[int, int], grid: tuple[int, int]) -> None:
        assert aspect_size(image_size, 518, 14) == (14 * grid[0], 14 * grid[1])

    @pytest.mark.parametrize(("side", "patch"), [(518, 14), (336, 14), (96, 8), (224, 32), (16, 16)])
    @pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.7, 0.99, 1.0, 1.25, 1.5, 2.0, 3.7, 20.0, 1000.0])
    def test_costs_no_more_than_the_square_and_bends_less(self, side: int, patch: int, ratio: float) -> None:
        height, width = aspect_size((1, ratio), side, patch)
        patches = (height // patch) * (width // patch)
        assert height % patch == width % patch == 0
        assert 0.9 * (side // patch) ** 2 <= patches <= (side // patch) ** 2
        bend = abs(np.log(width / height / ratio))
        assert bend <= abs(np.log(ratio)) + 1e-9
        if (side, patch) == (518, 14) and 0.2 < ratio < 5:
            assert bend < 0.02

    def test_transposed_images_give_transposed_sizes(self) -> None:
        for height, width in ((480, 640), (1000, 1301), (300, 2000)):
            assert aspect_size((width, height), 518, 14) == aspect_size((height, width), 518, 14)[::-1]

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="`image_size` must be a height and a width above 0, got 0 x 5"):
            aspect_size((0, 5), 518, 14)
        for side in (0, 520):
            with pytest.raises(ValueError, match=f"`side` must be a multiple of the patch of 14 pixels, got {side}"):
                aspect_size((5, 5), side, 14)


class TestPreProcessor:
    def test_forward_and_transform_are_one(self) -> None:
        pre_processor = AprilGANPreProcessor((24, 32))
        batch = torch.rand(2, 3, 50, 40)
        assert pre_processor(batch).shape == (2, 3, 24, 32)
        torch.testing.assert_close(pre_processor(batch), pre_processor.transform(batch), atol=1e-6, rtol=0)

    def test_normalises_by_clips_statistics(self) -> None:
        gray = AprilGANPreProcessor((8, 8))(torch.full((1, 3, 8, 8), 51 / 255))
        for channel in range(3):
            expected = (0.2 - CLIP_MEAN[channel]) / CLIP_STD[channel]
            torch.testing.assert_close(gray[0, channel], torch.full((8, 8), expected))

    def test_no_copy_without_antialias_is_exported(self) -> None:
        assert AprilGANPreProcessor((8, 8)).export_transform is None

    def test_checkpoint_config_is_plain_and_restores(self) -> None:
        original = AprilGANPreProcessor((24, 32), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
        config = original.checkpoint_config()
        assert config["image_size"] == [24, 32]
        restored = AprilGANPreProcessor((8, 8))
        restored.load_checkpoint_config(config)
        batch = torch.rand(1, 3, 40, 40)
        assert torch.equal(restored(batch), original(batch))
        assert torch.equal(restored.transform(batch), original.transform(batch))

    def test_tiled_leaves_batches_alone_and_prepares_tiles(self) -> None:
        tiled, whole = AprilGANPreProcessor((24, 32), tiled=True), AprilGANPreProcessor((24, 32))
        tiles = torch.rand(2, 3, 50, 40)
        assert tiled.transform is None  # anomalib's datamodules and hooks then touch neither image nor mask
        assert torch.equal(tiled(tiles), whole(tiles))

    @pytest.mark.parametrize("tiled", [False, True])
    def test_a_checkpoint_does_not_decide_about_tiles(self, tiled: bool) -> None:
        restored = AprilGANPreProcessor((8, 8), tiled=tiled)
        restored.load_checkpoint_config(AprilGANPreProcessor((24, 32), tiled=not tiled).checkpoint_config())
        assert (restored.transform is None) == tiled
        assert restored(torch.rand(1, 3, 40, 40)).shape == (1, 3, 24, 32)

    def test_statistics_are_no_part_of_the_state_dict(self) -> None:
        assert AprilGANPreProcessor((8, 8)).state_dict() == {}

    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"image_size": [24], "mean": CLIP_MEAN, "std": CLIP_STD},
            {"image_size": [24, 32], "mean": [0.5, 0.5], "std": CLIP_STD},
            {"image_size": [24, 32], "mean": CLIP_MEAN, "std": None},
        ],
    )
    def test_a_config_that_does_not_fit_changes_nothing(self, config: dict) -> None:
        pre_processor, batch = AprilGANPreProcessor((8, 8), mean=(0.1, 0.2, 0.3)), torch.rand(1, 3, 40, 40)
        before = pre_processor(batch), pre_processor.transform(batch), pre_processor.checkpoint_config()
        with pytest.raises((KeyError, TypeError, ValueError, RuntimeError)):
            pre_processor.load_checkpoint_config(config)
        assert torch.equal(pre_processor(batch), before[0])
        assert torch.equal(pre_processor.transform(batch), before[1])
        assert pre_processor.checkpoint_config() == before[2]


class NoFloat64(TorchDispatchMode):
    """Stands for an accelerator without float64, such as MPS: nothing of it may be on ``meta``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta and leaf.dtype == torch.float64:
                msg = f"no float64 on this device ({func})"
                raise TypeError(msg)
        return out


class TestDevices:
    @pytest.mark.parametrize("size", [(200, 300), (60, 70), (96, 96)])
    def test_needs_no_float64(self, size: tuple[int, int]) -> None:
        pre_processor = AprilGAN.configure_pre_processor((96, 96)).to("meta")
        with NoFloat64():
            assert pre_processor(torch.empty(2, 3, *size, device="meta")).shape == (2, 3, 96, 96)


class TestPrepared:
    TRANSFORM = Compose([Resize((24, 32), antialias=True), Normalize(CLIP_MEAN, CLIP_STD)])

    def test_ours(self) -> None:
        batch = torch.rand(2, 3, 50, 40)
        ours = AprilGANPreProcessor((24, 32))
        assert torch.equal(prepared(ours, batch), ours(batch))
        eight_bit = (batch * 255).to(torch.uint8)
        assert torch.equal(prepared(ours, eight_bit), ours(eight_bit / 255))

    def test_anomalibs_resizes_as_in_the_engine(self) -> None:
        batch, theirs = torch.rand(2, 3, 50, 40), PreProcessor(self.TRANSFORM)
        assert torch.equal(prepared(theirs, batch), self.TRANSFORM(batch))
        assert not torch.allclose(prepared(theirs, batch), theirs(batch))

    def test_anomalibs_in_an_export(self) -> None:
        class Model(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return prepared(theirs, images)

        batch, theirs = torch.rand(2, 3, 50, 40), PreProcessor(self.TRANSFORM)
        exported = torch.export.export(Model(), (batch,)).module()
        torch.testing.assert_close(exported(batch), theirs(batch))

    def test_others(self) -> None:
        batch = torch.rand(2, 3, 50, 40)
        assert prepared(None, batch) is batch
        assert prepared(PreProcessor(), batch) is batch
        assert torch.equal(prepared(nn.AvgPool2d(2), batch), nn.AvgPool2d(2)(batch))

    @pytest.mark.parametrize("pre_processor", [AprilGANPreProcessor((24, 32)), PreProcessor(TRANSFORM), nn.Identity()])
    def test_range(self, pre_processor: nn.Module) -> None:
        batch = torch.rand(2, 3, 50, 40)
        batch[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
        prepared(pre_processor, batch)
        prepared(pre_processor, batch * (1 + 1e-6))  # a resize of white may give this
        for wrong, values in ((batch * 255, "0, 255"), (batch - 0.5, "-0.5, 0.5"), (batch * float("nan"), "nan, nan")):
            message = rf"Images must be floats in \[0, 1\] or uint8, got floats in \[{values}\]\. Scale them"
            with pytest.raises(ValueError, match=message):
                prepared(pre_processor, wrong)

    def test_overshoot_of_augmentations_is_cut_and_other_scales_are_errors(self) -> None:
        image, resize = torch.rand(3, 40, 50), EightBitResize((30, 20))
        assert torch.equal(resize(image * 1.5 - 0.25), resize((image * 1.5 - 0.25).clamp(0, 1)))
        with pytest.raises(ValueError, match=r"Images must be floats in \[0, 1\]"):
            resize(image * 255)


class TestModel:
    """On the public face: what a user sees of it."""

    @pytest.fixture
    def engine(self, tmp_path: Path) -> Engine:
        options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False}
        return Engine(default_root_dir=tmp_path / "run", **options)

    @pytest.fixture
    def image(self, tmp_path: Path) -> Path:
        PillowImage.fromarray(noise(200, 230)).save(tmp_path / "a.png")
        return tmp_path / "a.png"

    @staticmethod
    def build(april_gan: Callable[..., AprilGAN], **options: Any) -> AprilGAN:
        transform = Compose([Resize((96, 96), antialias=True), Normalize(CLIP_MEAN, CLIP_STD)])
        plain = {"post_processor": False, "evaluator": False, "visualizer": False}
        return april_gan(class_name="part", pre_processor=PreProcessor(transform), **plain, **options)

    def test_with_anomalibs_pre_processor_an_image_is_like_itself(
        self, april_gan: Callable[..., AprilGAN], engine: Engine, image: Path
    ) -> None:
        few_shot = self.build(april_gan, k_shot=1, references=[str(image)])
        (few,), (zero,) = (engine.predict(model, data_path=image) for model in (few_shot, self.build(april_gan)))
        # The distance to the references is added to the map of the text.
        torch.testing.assert_close(few.anomaly_map, zero.anomaly_map, atol=1e-4, rtol=0)

    def test_with_anomalibs_pre_processor_forward_is_the_engine(
        self, april_gan: Callable[..., AprilGAN], engine: Engine, image: Path
    ) -> None:
        model = self.build(april_gan)
        (batch,) = engine.predict(model, data_path=image)
        with torch.no_grad():
            out = model.eval()(read_image(image, as_tensor=True).as_subclass(Tensor)[None])
        torch.testing.assert_close(out.anomaly_map, batch.anomaly_map, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.pred_score, batch.pred_score, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("change", [lambda x: x * 255, lambda x: x - 0.5, lambda x: x / 0])
    def test_values_out_of_range(self, april_gan: Callable[..., AprilGAN], change: Callable) -> None:
        model = april_gan(class_name="part").eval()
        with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
            model(change(torch.rand(1, 3, 50, 60)))


def test_large_images_are_resized_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(3, 150, 70, generator=torch.Generator().manual_seed(0))
    eight_bit, mask = (image * 255).to(torch.uint8), (image[0] > 0.5).to(torch.uint8)

    def resized() -> list[Tensor]:
        return [resize_image(image, (64, 48)), resize_image(eight_bit, (64, 48)), resize_mask(mask, (9, 7))]

    whole = resized()
    monkeypatch.setattr("anomalib_aprilgan.data.pre_processing._PIXELS_AT_ONCE", 5000)
    for one, other in zip(whole, resized(), strict=True):
        assert torch.equal(one, other)
