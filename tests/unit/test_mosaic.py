"""The 2 x 2 mosaic: where things land, what overwrites, what is cut."""

import pytest
import torch
from torch import Tensor

from anomalib_aprilgan.data.multi_category import mosaic


def parts(sizes: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Constant images 1..4 and masks that are set in the odd ones."""
    images = [torch.full((3, *size), number + 1, dtype=torch.uint8) for number, size in enumerate(sizes)]
    masks = [torch.full(size, (number + 1) % 2, dtype=torch.uint8) for number, size in enumerate(sizes)]
    return images, masks


def test_equal_sizes_by_hand() -> None:
    image, mask = mosaic(*parts([(1, 2)] * 4))
    assert image[0].tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert torch.equal(image[0], image[2])
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_smaller_images_leave_black_gaps() -> None:
    image, mask = mosaic(*parts([(2, 2), (1, 1), (1, 2), (2, 1)]))
    assert image[0].tolist() == [[1, 1, 2, 0], [1, 1, 0, 0], [3, 3, 4, 0], [0, 0, 4, 0]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_larger_images_are_cut_and_overwritten_by_later_ones() -> None:
    image, mask = mosaic(*parts([(1, 1), (3, 3), (2, 2), (1, 1)]))
    # The second sticks out and covers the right column, the third the lower row, the fourth its corner.
    assert image[0].tolist() == [[1, 2], [3, 4]]
    assert mask.tolist() == [[1, 0], [1, 0]]
    image, _ = mosaic(*parts([(2, 2), (4, 2), (2, 2), (1, 1)]))
    assert image[0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 2], [3, 3, 2, 2]]


def test_matches_a_pixel_by_pixel_version() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, 6), (5, 5), (3, 9), (8, 2)]
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    masks = [torch.randint(0, 2, size, generator=generator, dtype=torch.uint8) for size in sizes]
    expected_image, expected_mask = torch.zeros(3, 8, 12), torch.zeros(8, 12, dtype=torch.uint8)
    for number, (top, left) in enumerate([(0, 0), (0, 6), (4, 0), (4, 6)]):
        for row in range(sizes[number][0]):
            for column in range(sizes[number][1]):
                if top + row < 8 and left + column < 12:
                    expected_image[:, top + row, left + column] = images[number][:, row, column]
                    expected_mask[top + row, left + column] = masks[number][row, column]
    image, mask = mosaic(images, masks)
    assert torch.equal(image, expected_image)
    assert torch.equal(mask, expected_mask)


def test_dtypes_are_kept_and_arguments_left_alone() -> None:
    images, masks = parts([(2, 3)] * 4)
    image, mask = mosaic([image.float() for image in images], [mask.bool() for mask in masks])
    assert (image.dtype, mask.dtype) == (torch.float32, torch.bool)
    assert all(torch.equal(a, b) for a, b in zip(images, parts([(2, 3)] * 4)[0], strict=True))


@pytest.mark.parametrize(("images", "masks"), [(3, 4), (4, 5), (0, 0)])
def test_four_of_each(images: int, masks: int) -> None:
    given_images, given_masks = parts([(2, 2)] * 5)
    with pytest.raises(ValueError, match=rf"`images` and `masks` must be four each, got {images} and {masks}\."):
        mosaic(given_images[:images], given_masks[:masks])
