"""What stands for a map, and how text and map become one score."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from anomalib_aprilgan.decision.fusion import FUSIONS, ScoreFusion, map_statistic


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def fusion(*bounds: tuple[float, float], rule: str = "mean", top_share: float = 0.0) -> ScoreFusion:
    """With low and high of each class."""
    built = ScoreFusion(rule, top_share)
    built.low, built.high = torch.tensor(bounds).T
    return built


class TestMapStatistic:
    def test_by_hand(self) -> None:
        anomaly_map = torch.tensor([[[1.0, 7.0], [3.0, 5.0]], [[0.0, 0.0], [4.0, 0.0]]])
        assert map_statistic(anomaly_map).tolist() == [7.0, 4.0]
        assert map_statistic(anomaly_map, 0.5).tolist() == [6.0, 2.0]

    def test_the_number_of_pixels_is_rounded(self) -> None:
        # A tenth of 35 pixels is 3.5, so 4 of them: (35 + 34 + 33 + 32) / 4.
        anomaly_map = torch.arange(1.0, 36.0).flip(0).reshape(1, 5, 7)
        assert map_statistic(anomaly_map, 0.1).item() == 33.5
        # A tenth of 24 is 2.4, so 2: (24 + 23) / 2.
        assert map_statistic(anomaly_map[:, :, :].flatten()[11:].reshape(1, 4, 6), 0.1).item() == 23.5

    def test_all_pixels_give_the_mean_and_hardly_any_the_maximum(self) -> None:
        anomaly_map = random(3, 9, 11)
        torch.testing.assert_close(map_statistic(anomaly_map, 1.0), anomaly_map.mean(dim=(1, 2)))
        assert torch.equal(map_statistic(anomaly_map, 1e-9), anomaly_map.amax(dim=(1, 2)))

    def test_falls_with_the_share(self) -> None:
        anomaly_map = random(3, 10, 10)
        statistics = [map_statistic(anomaly_map, share) for share in (0.0, 0.02, 0.1, 0.5, 1.0)]
        assert all((more < fewer).all() for fewer, more in pairwise(statistics))

    @pytest.mark.parametrize("top_share", [0.0, 0.1])
    def test_no_maps_no_numbers(self, top_share: float) -> None:
        assert map_statistic(torch.empty(0, 4, 4), top_share).shape == (0,)


class TestScoreFusion:
    def test_by_hand(self) -> None:
        # 0.5 * (0.5 + (8 - 0) / 8) and 0.5 * (1 + (2 - 0) / 8).
        maps = torch.zeros(2, 3, 3)
        maps[0, 1, 1], maps[1, 2, 0] = 8.0, 2.0
        published = fusion((0.0, 8.0))
        fused = published(torch.tensor([0.5, 1.0]), published.statistic(maps))
        torch.testing.assert_close(fused, torch.tensor([0.75, 0.625]))

    @pytest.mark.parametrize(("rule", "expected"), [("mean", 0.4), ("text", 0.2), ("map", 0.6)])
    def test_rules(self, rule: str, expected: float) -> None:
        fused = fusion((1.0, 6.0), rule=rule)(torch.tensor([0.2]), torch.tensor([4.0]))
        assert fused.item() == pytest.approx(expected)

    def test_another_rule_is_one_function(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(FUSIONS, "highest", torch.maximum)
        fused = fusion((0.0, 10.0), rule="highest")(torch.tensor([0.2, 0.9]), torch.tensor([4.0, 4.0]))
        torch.testing.assert_close(fused, torch.tensor([0.4, 0.9]))

    def test_every_image_by_the_bounds_of_its_class(self) -> None:
        fused = fusion((0.0, 8.0), (2.0, 4.0))(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 3.0]), torch.tensor([1, 0]))
        torch.testing.assert_close(fused, torch.tensor([0.25, 0.1875]))

    def test_bounds_of_equal_values_do_not_divide_by_zero(self) -> None:
        assert fusion((3.0, 3.0))(torch.tensor([0.4]), torch.tensor([3.0])).item() == pytest.approx(0.2)

    def test_the_mean_of_the_highest_pixels_in_place_of_the_maximum(self) -> None:
        anomaly_map = torch.zeros(1, 4, 2)
        anomaly_map[0, 1], anomaly_map[0, 3, 0] = torch.tensor([6.0, 4.0]), 1.0
        assert fusion((0.0, 8.0), top_share=0.25).statistic(anomaly_map).item() == 5.0

    @pytest.mark.parametrize("rule", FUSIONS)
    def test_never_falls_and_stays_within_its_range(self, rule: str) -> None:
        by_class = fusion((0.5, 2.5), (0.0, 4.0), rule=rule)
        floor, ceiling = by_class.range(4.0)
        text, statistic = random(50), 4.0 * random(50, seed=1)
        for row in range(2):
            rows = torch.full((50,), row)
            fused = by_class(text, statistic, rows)
            assert (by_class((text + 0.1).clamp(max=1.0), statistic, rows) >= fused).all()
            assert (by_class(text, (statistic + 0.1).clamp(max=4.0), rows) >= fused).all()
            assert floor[row] - 1e-6 <= fused.min() <= fused.max() <= ceiling[row] + 1e-6

    def test_range_by_hand(self) -> None:
        floor, ceiling = fusion((1.0, 3.0), (0.0, 4.0)).range(4.0)
        torch.testing.assert_close(floor, torch.tensor([-0.25, 0.0]))
        torch.testing.assert_close(ceiling, torch.tensor([1.25, 1.0]))

    def test_rows_are_kept_moved_and_new_ones_have_defaults(self) -> None:
        by_class = fusion((1.0, 2.0), (3.0, 4.0))
        by_class.set_rows([1, None, 0], 6.0)
        assert by_class.low.tolist() == [3.0, 0.0, 1.0]
        assert by_class.high.tolist() == [4.0, 6.0, 2.0]

    def test_bounds_travel_in_the_state_dict(self) -> None:
        restored = ScoreFusion()
        restored.load_state_dict(fusion((1.0, 2.0)).state_dict())
        assert (restored.low.item(), restored.high.item()) == (1.0, 2.0)

    def test_unknown_rule(self) -> None:
        with pytest.raises(ValueError, match=r"`score_fusion` must be one of mean, text, map, got 'product'\."):
            ScoreFusion("product")

    @pytest.mark.parametrize("top_share", [-0.1, 1.1, float("nan")])
    def test_share_out_of_range(self, top_share: float) -> None:
        with pytest.raises(ValueError, match=rf"`top_share` must be a share of the map in \[0, 1\].*got {top_share}"):
            ScoreFusion(top_share=top_share)
