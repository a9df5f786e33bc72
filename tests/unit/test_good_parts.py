"""Scores and appearances of good parts by class, and the p-values that they give."""

import numpy as np
import pytest
import torch
from scipy import stats

from anomalib_aprilgan.decision.good_parts import GoodParts
from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor

NOTHING = torch.empty(0), torch.empty(0, 0)


def parts_of(*rows: list[float]) -> GoodParts:
    parts = GoodParts()
    parts.set_rows([None] * len(rows))
    for row, scores in enumerate(rows):
        if scores:
            parts.set_row(row, len(rows), torch.tensor(scores), torch.full((len(scores), 4), float(row)))
    return parts


def test_p_value_is_the_share_that_scores_at_least_this() -> None:
    parts = parts_of([0.1, 0.2, 0.3, 0.3])
    found = parts.p_values(torch.tensor([0.0, 0.2, 0.3, 0.31]))
    torch.testing.assert_close(found, torch.tensor([5 / 5, 4 / 5, 3 / 5, 1 / 5]))


def test_every_image_has_the_good_parts_of_its_class() -> None:
    parts = parts_of([0.1, 0.9], [], [0.5])
    found = parts.p_values(torch.tensor([0.6, 0.6, 0.6, 0.4]), torch.tensor([0, 1, 2, 2]))
    torch.testing.assert_close(found, torch.tensor([2 / 3, torch.nan, 1 / 2, 1.0]), equal_nan=True)


def test_what_is_no_number_has_none() -> None:
    found = parts_of([0.5]).p_values(torch.tensor([torch.nan, torch.inf, 0.5]))
    torch.testing.assert_close(found, torch.tensor([torch.nan, torch.nan, 1.0]), equal_nan=True)
    assert GoodParts().p_values(torch.tensor([0.5])) is None


def test_good_parts_like_those_held_out_get_even_p_values() -> None:
    generator = np.random.default_rng(0)
    parts = parts_of(generator.normal(size=2000).tolist())
    values = parts.p_values(torch.from_numpy(generator.normal(size=500)).float())
    assert stats.kstest(values.numpy(), "uniform").pvalue > 0.01
    assert 0.02 < (values <= 0.05).float().mean() < 0.09
    # At any level: on average over what could be held out, no more than so many.
    few = [parts_of(generator.normal(size=19).tolist()) for _ in range(400)]
    seen = [torch.from_numpy(generator.normal(size=20)).float() for _ in few]
    flagged = torch.stack([one.p_values(scores) <= 0.05 for one, scores in zip(few, seen, strict=True)])
    assert 0.04 < flagged.float().mean() < 0.06


def test_rows_are_kept_moved_and_dropped() -> None:
    parts = parts_of([0.1, 0.2], [0.3, 0.4, 0.5], [])
    parts.set_rows([1, None, 0])
    assert [scores.tolist() for scores, _ in map(parts.of_row, range(3))] == [
        pytest.approx([0.3, 0.4, 0.5]), [], pytest.approx([0.1, 0.2])
    ]  # fmt: skip
    assert [appearances[:, 0].tolist() for _, appearances in map(parts.of_row, range(3))] == [[1, 1, 1], [], [0, 0]]
    parts.set_rows([1])
    assert parts.state_dict() == {}


def test_forgetting_the_last_leaves_nothing() -> None:
    parts = parts_of([0.1])
    assert set(parts.state_dict()) == {"number", "scores", "number_of_appearances", "appearances"}
    parts.set_row(0, 1, *NOTHING)
    assert parts.state_dict() == {}
    assert parts.of_row(0)[0].tolist() == []


def test_travels_in_the_state_dict_whatever_was_there() -> None:
    parts, empty = parts_of([0.1, 0.2], [0.3]), GoodParts()
    empty.load_state_dict(parts.state_dict())
    assert all(torch.equal(*both) for both in zip(empty.of_row(0), parts.of_row(0), strict=True))
    parts.load_state_dict(GoodParts().state_dict())
    assert parts.scores is None


def test_appearances_are_bounded_and_scores_are_not() -> None:
    parts = GoodParts()
    parts.set_row(0, 1, torch.arange(2500.0), torch.arange(2500.0)[:, None].expand(-1, 5))
    scores, appearances = parts.of_row(0)
    assert (len(scores), len(appearances)) == (2500, 1000)
    assert (appearances[0, 0], appearances[-1, 0]) == (0, 2499)
    assert parts.half().scores.dtype == torch.float32


class TestInThePostProcessor:
    def test_other_bounds_of_the_fusion_forget_scores_and_thresholds_do_not(self) -> None:
        post_processor = AprilGANPostProcessor()
        values = post_processor.of_class(0)
        values.set_good_parts(torch.tensor([0.1]), torch.zeros(1, 4))
        values.set_values(image_threshold=0.3)
        assert len(values.good_parts()[0]) == 1
        values.set_values(map_maximum_max=2.0)
        assert len(values.good_parts()[0]) == 0

    def test_fixed_for_all_before_any_class_is_known(self) -> None:
        post_processor = AprilGANPostProcessor()
        post_processor.of_class(0).set_good_parts(torch.tensor([0.1, 0.2]), torch.zeros(2, 4))
        assert post_processor.state_dict()["good_parts.scores"].shape == (1, 2)
