"""Taking a batch of several classes apart."""

import torch
from torchvision.tv_tensors import Image

from anomalib_aprilgan.class_rows import class_index_of, part_of, rows_by_class
from anomalib_aprilgan.data.class_batch import ClassImageBatch


def batch() -> ClassImageBatch:
    return ClassImageBatch(
        image=Image(torch.rand(4, 3, 8, 8)),
        gt_label=torch.tensor([0, 1, 1, 0]),
        pred_score=torch.tensor([0.1, 0.2, 0.3, 0.4]),
        class_name=["tile", "nut", "tile", "nut"],
        class_index=torch.tensor([2, 0, 2, 0]),
    )


def test_every_image_is_in_the_rows_of_its_class() -> None:
    rows = {number: rows.tolist() for number, rows in rows_by_class(torch.tensor([2, 0, 2, 0]))}
    assert rows == {0: [1, 3], 2: [0, 2]}


def test_a_part_has_the_fields_of_its_images() -> None:
    part = part_of(batch(), torch.tensor([1, 3]))
    torch.testing.assert_close(part.pred_score, torch.tensor([0.2, 0.4]))
    assert part.gt_label.tolist() == [1, 0]
    assert part.gt_mask is None


def test_the_class_index_is_a_field_of_our_batches() -> None:
    assert class_index_of(batch()).tolist() == [2, 0, 2, 0]
    assert [int(item.class_index) for item in batch()] == [2, 0, 2, 0]
    assert class_index_of(object()) is None
