"""Regions of interest as a user gives them, and what the network makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.data.pre_processing import resize_image, sources, unmixed
from anomalib_aprilgan.data.roi import image_size_of, mask_of_shape, plain_roi, roi_of_class
from anomalib_aprilgan.network.roi import RegionsOfInterest, within

Build = Callable[..., AprilGAN]
SIZE = (40, 60)
BOX = [5, 8, 41, 30]


def of_box(left: int, top: int, right: int, bottom: int, size: tuple[int, int] = SIZE) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def save(path: Path, mask: torch.Tensor, value: int = 255) -> str:
    Image.fromarray((mask.numpy() * value).astype(np.uint8)).save(path)
    return str(path)


class TestShapes:
    def test_a_box_a_polygon_and_a_mask_image_of_it_are_the_same(self, tmp_path: Path) -> None:
        left, top, right, bottom = BOX
        polygon = [[left, top], [right, top], [right, bottom], [left, bottom]]
        file = save(tmp_path / "mask.png", of_box(*BOX))
        for given in (BOX, polygon, [polygon], [polygon[::-1]], file, Path(file), str(BOX), str([polygon])):
            shape = plain_roi(given)
            assert not isinstance(shape, dict)
            assert torch.equal(mask_of_shape(shape, SIZE), of_box(*BOX))

    def test_a_polygon_holds_the_pixels_whose_centres_it_holds(self) -> None:
        triangle = mask_of_shape(plain_roi([[0, 0], [20, 0], [0, 20]]), SIZE)
        y, x = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(60) + 0.5, indexing="ij")
        inside = x + y < 20
        assert not (triangle ^ inside)[x + y != 20].any()
        assert triangle.any()

    def test_polygons_are_united(self) -> None:
        two = [[[0, 0], [10, 0], [10, 10], [0, 10]], [[5, 5], [15, 5], [15, 15], [5, 15]]]
        assert torch.equal(mask_of_shape(plain_roi(two), SIZE), of_box(0, 0, 10, 10) | of_box(5, 5, 15, 15))

    def test_a_mask_image_is_inside_where_it_is_bright_however_bright(self, tmp_path: Path) -> None:
        for value in (1, 255):
            file = save(tmp_path / f"{value}.png", of_box(*BOX), value)
            assert torch.equal(mask_of_shape(file, SIZE), of_box(*BOX))

    def test_classes_have_their_own(self) -> None:
        given = plain_roi({"nut": BOX, "bolt": "mask.png"})
        names = ["bolt", "nut", "screw"]
        assert [roi_of_class(given, name, names) for name in names] == ["mask.png", BOX, None]
        assert roi_of_class(plain_roi(BOX), "nut", names) == BOX
        with pytest.raises(ValueError, match=r"`roi` is given for 'nut', which is none of the classes bolt"):
            roi_of_class(given, "bolt", ["bolt"])

    @pytest.mark.parametrize(
        ("given", "kind", "text"),
        [
            ({}, ValueError, "`roi` must have an entry"),
            ([], ValueError, "`roi` must be a mask image, a box"),
            ("", ValueError, "`roi` must be a mask image"),
            ("[1, 2", ValueError, r"`roi` must be a mask image, a box .* got '\[1, 2'"),
            (3, TypeError, "`roi` must be a mask image"),
            ([10, 0, 10, 5], ValueError, "left < right and top < bottom"),
            ([0, 0, float("nan"), 5], ValueError, "`roi` must be a mask image"),
            ([0, 0, True, 5], TypeError, "`roi` must be a mask image"),
            ([[0, 0], [1, 1]], ValueError, "a polygon is a list of three points"),
            ([[[0, 0], [1, 1], [2]]], ValueError, "a polygon is a list of three points"),
            ([[[0, 0], [1, 1], [2, "x"]]], ValueError, "a polygon is a list of three points"),
        ],
    )
    def test_what_is_none_is_refused(self, given: Any, kind: type[Exception], text: str) -> None:
        with pytest.raises(kind, match=text):
            plain_roi(given)

    @pytest.mark.parametrize(
        ("shape", "text"),
        [
            ([0, 0, 61, 10], r"`roi`: the point \[61, 0\] lies outside the images, which have 60 x 40 pixels"),
            ([[[0, -1], [9, 0], [9, 9]]], r"`roi`: the point \[0, -1\] lies outside"),
            ([[[1, 1], [9, 1], [20, 1]]], "`roi`: no pixel of the images"),
            ([0.1, 0.1, 0.2, 0.2], "`roi`: no pixel of the images"),
        ],
    )
    def test_what_does_not_fit_the_images_is_refused(self, shape: Any, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            mask_of_shape(plain_roi(shape), SIZE)

    def test_a_mask_image_of_another_size_a_black_one_and_a_missing_one(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"has 60 x 40 pixels, and the images have 64 x 64\. Give a mask"):
            mask_of_shape(save(tmp_path / "mask.png", of_box(*BOX)), (64, 64))
        with pytest.raises(ValueError, match=r"`roi`: no pixel of the images"):
            mask_of_shape(save(tmp_path / "black.png", torch.zeros(SIZE)), SIZE)
        with pytest.raises(FileNotFoundError, match=r"`roi`: no file .*gone.png"):
            mask_of_shape(str(tmp_path / "gone.png"), SIZE)
        (tmp_path / "broken.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"`roi`: .*broken.png cannot be read"):
            mask_of_shape(str(tmp_path / "broken.png"), SIZE)

    def test_the_size_of_an_image_is_told_as_it_is_shown(self, tmp_path: Path) -> None:
        image, exif = Image.new("RGB", (60, 40)), Image.Exif()
        image.save(tmp_path / "lying.jpg")
        exif[0x0112] = 6
        image.save(tmp_path / "turned.jpg", exif=exif)
        assert image_size_of(tmp_path / "lying.jpg") == (40, 60)
        assert image_size_of(tmp_path / "turned.jpg") == (60, 40)


class TestResize:
    @pytest.mark.parametrize("size", [(16, 24), (40, 60), (96, 96), (13, 61)])
    def test_pixels_that_are_kept_do_not_hang_on_what_is_outside(self, size: tuple[int, int]) -> None:
        inside, generator = of_box(*BOX), torch.Generator().manual_seed(0)
        image = torch.rand(3, *SIZE, generator=generator)
        changed = torch.where(inside, image, torch.rand(3, *SIZE, generator=generator))
        kept = unmixed(inside, size)
        first, second = (resize_image(one, size) for one in (image, changed))
        assert kept.any()
        assert torch.equal(first[:, kept], second[:, kept])
        if size != SIZE:
            assert not torch.equal(first, second)

    def test_about_two_pixels_of_the_border_are_lost_and_no_more(self) -> None:
        kept = unmixed(of_box(0, 0, 600, 200, (400, 600)), (40, 60))
        assert kept[:18].all()
        assert not kept[20:].any()


class TestRows:
    def test_each_class_has_its_mask_and_the_others_all(self) -> None:
        roi = RegionsOfInterest(2)
        assert roi.masks(torch.tensor([0, 1]), (4, 4)) is None
        roi.set(1, of_box(0, 0, 2, 2, (4, 4)), (8, 8))
        masks = roi.masks(torch.tensor([0, 1, 1]), (4, 4))
        assert masks is not None
        assert masks.sum(dim=(1, 2)).tolist() == [16, 4, 4]
        assert (roi.frame(0), roi.frame(1)) == (None, (8, 8))
        roi.set_rows([1, None])
        assert (roi.frame(0), roi.frame(1)) == ((8, 8), None)

    def test_values_outside_are_zero_and_inside_as_they_were(self) -> None:
        images, mask = torch.rand(2, 3, 4, 4) + 1.0, of_box(0, 0, 2, 2, (4, 4))[None]
        for values in (images, images[:, 0]):
            kept = within(values, mask)
            assert torch.equal(kept[..., :2, :2], values[..., :2, :2])
            assert kept.count_nonzero() == values.count_nonzero() // 4
            assert within(values, None) is values


def test_a_drawing_of_the_region_needs_no_clip(april_gan: Build, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (200, 100, 50)).save(tmp_path / "part.png")
    drawing = april_gan(roi=[0, 0, 30, 40], pretrained="nothing.safetensors").draw_roi(tmp_path / "part.png")
    pixels = np.asarray(drawing)
    assert pixels.shape == (40, 60, 3)
    assert pixels[20, 5].tolist() == [200, 100, 50]
    dark = pixels[20, 50].tolist()
    assert len(set(dark)) == 1
    assert dark[0] < 60
    with pytest.raises(ValueError, match="There is no `roi` of"):
        april_gan().draw_roi(tmp_path / "part.png")
    with pytest.raises(ValueError, match="lies outside the images"):
        april_gan(roi=[0, 0, 61, 40]).draw_roi(tmp_path / "part.png")


@pytest.mark.parametrize("size", [(16, 24), (96, 96), (40, 60)])
def test_the_sources_of_what_is_kept_are_enough_and_lie_inside(size: tuple[int, int]) -> None:
    inside = of_box(*BOX)
    kept = unmixed(inside, size)
    used = sources(kept, SIZE)
    assert not (used & ~inside).any()
    image = torch.rand(3, *SIZE)
    first, second = (resize_image(one, size) for one in (image, torch.where(used, image, 0.5)))
    assert torch.equal(first[:, kept], second[:, kept])


def test_classes_in_tiles_may_have_images_of_other_sizes() -> None:
    roi = RegionsOfInterest(2)
    roi.set(0, of_box(0, 0, 2, 2, (4, 4)), (4, 4))
    roi.set(1, of_box(0, 0, 3, 3, (6, 5)), (6, 5))
    for row, size, pixels in ((0, (4, 4), 4), (1, (6, 5), 9)):
        masks = roi.masks(torch.tensor([row, row]), size)
        assert masks is not None
        assert masks.shape == (2, *size)
        assert masks[0].sum() == pixels
