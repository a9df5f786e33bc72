"""What every few-shot scorer has: features by class, kept and dropped by row, and batches taken apart."""

from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from anomalib_aprilgan.clip.backbone import VisionOutput
from anomalib_aprilgan.network.few_shot import FewShotScorer, rows_in

OUTPUT = VisionOutput([], torch.empty(0), ())


class Brightness(FewShotScorer):
    """Remembers how bright each reference is; needs nothing of CLIP."""

    map_limit, map_ceiling = 1.0, 1.0

    def fill(self, row: int, images: Tensor, output: VisionOutput) -> None:
        del output
        self.set_features(row, images.mean(dim=(1, 2, 3))[:, None])

    def distance_maps(
        self, images: Tensor, output: VisionOutput, rows: Tensor | None, without: Collection[int] = ()
    ) -> Tensor:
        del output
        maps = torch.empty(len(images), *images.shape[-2:])
        for row, chosen in rows_in(rows, len(self.remembered)):
            kept = [level for shot, level in enumerate(self.features(row)[:, 0]) if shot not in without]
            maps[chosen] = (images[chosen].mean(dim=1) - torch.stack(kept).mean()).abs()
        return maps


def scorer(*levels: list[float]) -> Brightness:
    """A row for each list, with an image of each grey level."""
    built = Brightness()
    built.set_rows([None] * len(levels))
    for row, of_row in enumerate(levels):
        if of_row:
            built.fill(row, torch.tensor(of_row).view(-1, 1, 1, 1).expand(-1, 3, 4, 4), OUTPUT)
    return built


def test_the_base_alone_scores_nothing() -> None:
    with pytest.raises(TypeError, match="abstract"):
        FewShotScorer()  # type: ignore[abstract]


def test_it_needs_no_stage_unless_it_says_so() -> None:
    assert Brightness().stages == ()


def test_the_first_axis_counts_references() -> None:
    assert [scorer([0.1, 0.2], [], [0.3]).number(row) for row in range(3)] == [2, 0, 1]


def test_a_class_without_references_says_which_call_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"empty: call `AprilGAN\.setup` with `references` or a datamodule first"):
        scorer([0.1], []).features(1)


def test_rows_are_kept_moved_and_dropped() -> None:
    built = scorer([0.1], [0.2, 0.3], [0.4])
    built.set_rows([2, None, 1])
    assert [built.number(row) for row in range(3)] == [1, 0, 2]
    torch.testing.assert_close(built.features(0), torch.tensor([[0.4]]))
    torch.testing.assert_close(built.features(2), torch.tensor([[0.2], [0.3]]))
    assert set(built.state_dict()) == {f"remembered.{row}.features" for row in range(3)}
    built.set_rows([])
    assert len(built.remembered) == 0


def test_a_subclass_scores_by_class_and_holds_out() -> None:
    built = scorer([0.0, 0.4], [1.0])
    batch = torch.full((3, 3, 4, 4), 0.5)
    maps = built.distance_maps(batch, OUTPUT, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(maps[:, 0, 0], torch.tensor([0.5, 0.3, 0.5]))
    held_out = built.distance_maps(batch[:1], OUTPUT, torch.tensor([0]), without=[1])
    torch.testing.assert_close(held_out[0, 0], torch.full((4,), 0.5))


class TestRowsIn:
    @pytest.mark.parametrize(("rows", "number"), [(None, 1), (None, 3), (torch.tensor([0, 0]), 1)])
    def test_one_class_is_the_whole_batch(self, rows: Tensor | None, number: int) -> None:
        assert list(rows_in(rows, number)) == [(0, slice(None))]

    def test_every_image_is_where_its_class_is(self) -> None:
        parts = {row: chosen.tolist() for row, chosen in rows_in(torch.tensor([2, 0, 2, 0]), 3)}
        assert parts == {0: [1, 3], 2: [0, 2]}

    def test_no_images_no_parts(self) -> None:
        assert list(rows_in(torch.empty(0, dtype=torch.long), 3)) == []
