"""The scale on which 0.5 is the threshold: values by hand, and laws for many bounds."""

import pytest
import torch
from torch import Tensor

from anomalib_aprilgan.decision.scale import Bounds, scaled

FLOOR, CEILING = 0.0, 4.0
# Low, threshold and high between a floor of 0 and a ceiling of 4.
HAIR = 1e-7
CASES = {
    "ordinary": (0.5, 1.2, 3.0),
    "threshold a hair above low": (1.0, 1.0 + HAIR, 3.0),
    "threshold a hair below low": (1.0 + HAIR, 1.0, 3.0),
    "threshold a hair below high": (1.0, 3.0 - HAIR, 3.0),
    "threshold a hair above high": (1.0, 3.0, 3.0 - HAIR),
    "threshold at low": (1.0, 1.0, 3.0),
    "threshold at high": (1.0, 3.0, 3.0),
    "threshold far below low": (2.0, 0.5, 3.0),
    "threshold far above high": (1.0, 3.5, 2.0),
    "low is high": (2.0, 2.0, 2.0),
    "low is high below the threshold": (1.0, 2.0, 1.0),
    "low above high": (3.0, 2.0, 1.0),
    "threshold at the floor": (0.0, 0.0, 2.0),
    "threshold at the ceiling": (1.0, 4.0, 4.0),
    "threshold a hair above the floor": (0.0, HAIR, 2.0),
    "threshold a hair below the ceiling": (1.0, 4.0 - 4 * HAIR, 4.0),
    "bounds beyond the range": (-3.0, 2.0, 9.0),
}
ALL_CASES = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
Case = tuple[float, float, float]


def bounds(low: float, threshold: float, high: float, floor: float = FLOOR, ceiling: float = CEILING) -> Bounds:
    return Bounds(*(torch.tensor(bound) for bound in (low, threshold, high, floor, ceiling)))


def random_cases(count: int) -> list[tuple[float, ...]]:
    """Low, threshold, high, floor, ceiling: the first three anywhere within the last two, in any order."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for _ in range(count):
        floor = 2 * torch.rand(1, generator=generator).item() - 1
        span = 10 ** (4 * torch.rand(1, generator=generator).item() - 2)
        within = floor + span * torch.rand(3, generator=generator)
        cases.append((*within.tolist(), floor, floor + span))
    return cases


def test_by_hand() -> None:
    # Nine tenths run from 1 over 2 to 3, one tenth from 0 over 2 to 4.
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0])
    expected = [0.0, 0.0125, 0.025, 0.5 * (0.45 + 0.075), 0.5, 0.5 + 0.5 * (0.45 + 0.025), 0.975, 1.0]
    torch.testing.assert_close(scaled(values, bounds(1.0, 2.0, 3.0)), torch.tensor(expected))


def test_a_bound_on_the_wrong_side_gives_way_to_the_end_of_the_range() -> None:
    values = torch.linspace(FLOOR, CEILING, 50)
    assert torch.equal(scaled(values, bounds(3.0, 2.0, 1.0)), scaled(values, bounds(FLOOR, 2.0, CEILING)))
    assert torch.equal(scaled(values, bounds(2.5, 2.0, 3.0)), scaled(values, bounds(FLOOR, 2.0, 3.0)))


def test_identity_where_the_bounds_are_the_range_and_the_threshold_is_its_middle() -> None:
    values = torch.linspace(0.0, 1.0, 1001)
    torch.testing.assert_close(scaled(values, bounds(0.0, 0.5, 1.0, 0.0, 1.0)), values, atol=1e-6, rtol=0)


def test_symmetric() -> None:
    values = torch.linspace(-1, 5, 61)
    mirrored = scaled(-values, bounds(-3.0, -1.2, -0.5, -CEILING, -FLOOR))
    torch.testing.assert_close(scaled(values, bounds(0.5, 1.2, 3.0)), 1 - mirrored)


@ALL_CASES
def test_strictly_increasing_over_the_whole_range(case: Case) -> None:
    values = torch.cat([torch.linspace(FLOOR, CEILING, 1001), torch.tensor([case[1]])]).unique()
    result = scaled(values, bounds(*case))
    assert result.diff().min() > 0
    assert 0.0 <= result.min() < result.max() <= 1.0


def test_strictly_increasing_for_random_bounds() -> None:
    for case in random_cases(500):
        floor, ceiling = case[3:]
        values = torch.linspace(floor, ceiling, 1001).clamp(floor, ceiling).unique()
        assert len(values) > 900
        result = scaled(values, bounds(*case))
        assert result.diff().min() > 0, case
        assert torch.equal(result > 0.5, values > torch.tensor(case[1])), case


@ALL_CASES
def test_a_thousand_distinct_floats_are_not_tied(case: Case) -> None:
    values = CEILING * torch.rand(1000, generator=torch.Generator().manual_seed(0)).unique()
    result = scaled(values, bounds(*case))
    assert torch.equal(result.argsort(), values.argsort())
    assert result.unique().numel() == values.numel() > 990


@ALL_CASES
def test_the_threshold_is_one_half_and_only_what_is_above_it_is_above(case: Case) -> None:
    limits = bounds(*case)
    threshold = limits.threshold
    assert scaled(threshold, limits).item() == 0.5
    above, below = threshold.nextafter(torch.tensor(9.0)), threshold.nextafter(torch.tensor(-9.0))
    assert scaled(above, limits).item() > 0.5 > scaled(below, limits).item()


@pytest.mark.parametrize("threshold", [0.1, 1.0, 1000.0])
def test_steps_too_small_for_the_scale_do_not_change_the_decision(threshold: float) -> None:
    limits = bounds(0.0, threshold, 1e6, 0.0, 1e6)  # one step of fp32 above the threshold is lost in 0.5 + ...
    above = limits.threshold.nextafter(torch.tensor(1e9))
    assert scaled(above, limits).item() > 0.5
    assert scaled(limits.threshold, limits).item() == 0.5


@pytest.mark.parametrize("case", [(0.5, 1.2, 3.0), (1.0, 1.0, 3.0), (2.0, 2.0, 2.0), (3.0, 2.0, 1.0)])
def test_beyond_the_range_it_is_zero_or_one(case: Case) -> None:
    values = torch.tensor([-1e6, -0.01, FLOOR, CEILING, 4.01, 1e6])
    torch.testing.assert_close(scaled(values, bounds(*case)), torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))


def test_a_threshold_beyond_the_range_moves_its_end() -> None:
    values = torch.linspace(FLOOR, CEILING, 101)
    for threshold, side in ((-1.0, 1.0), (5.0, -1.0)):
        result = scaled(values, bounds(1.0, threshold, 3.0))
        assert result.diff().min() > 0
        assert (side * (result - 0.5) > 0).all()


def test_bounds_of_each_image_broadcast() -> None:
    maps = 4 * torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0))
    cases = [bounds(0.5, 1.2, 3.0), bounds(1.0, 2.0, 2.5)]
    together = Bounds(*(torch.stack(pair).view(2, 1, 1) for pair in zip(*cases, strict=True)))
    expected = torch.stack([scaled(anomaly_map, of_map) for anomaly_map, of_map in zip(maps, cases, strict=True)])
    assert torch.equal(scaled(maps, together), expected)


def test_arguments_are_left_alone() -> None:
    values, limits = torch.rand(2, 3, 4), bounds(3.0, 2.0, 1.0)
    copies: list[Tensor] = [values.clone(), *(bound.clone() for bound in limits)]
    assert scaled(values, limits).shape == (2, 3, 4)
    assert all(torch.equal(one, other) for one, other in zip([values, *limits], copies, strict=True))


def test_nothing_stays_nothing() -> None:
    assert scaled(torch.empty(0, 3, 3), bounds(0.5, 1.2, 3.0)).shape == (0, 3, 3)
