"""Focal and dice loss: values by hand, loops, laws, gradients."""

import math

import pytest
import torch
from torch import Tensor

from anomalib_aprilgan.network.losses import (
    SMOOTHING,
    UNKNOWN,
    adapter_loss,
    dice_loss,
    focal_loss,
    multiple_instance_loss,
    partial_adapter_loss,
)


def case(batch: int = 2, height: int = 3, width: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, 2, height, width, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 2, (batch, height, width), generator=generator)
    return logits.softmax(dim=1), target


class TestFocal:
    def test_by_hand(self) -> None:
        # One pixel with probability 3/4 of its true channel: (1/4)^2 * log(4/3).
        probabilities = torch.tensor([0.25, 0.75]).reshape(1, 2, 1, 1)
        loss = focal_loss(probabilities, torch.ones(1, 1, 1))
        assert loss.item() == pytest.approx(0.0625 * math.log(4 / 3), abs=1e-5)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
    def test_matches_loops(self, gamma: float) -> None:
        probabilities, target = case()
        terms = []
        for image in range(2):
            for row in range(3):
                for column in range(4):
                    true = int(target[image, row, column])
                    p = probabilities[image, :, row, column].tolist()
                    pt = (1 - SMOOTHING) * p[true] + SMOOTHING * p[1 - true] + SMOOTHING
                    terms.append(-((1 - pt) ** gamma) * math.log(pt))
        assert focal_loss(probabilities, target, gamma).item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)

    def test_gamma_zero_is_cross_entropy(self) -> None:
        probabilities, target = case(4, 8, 8)
        cross_entropy = torch.nn.functional.nll_loss(probabilities.log(), target)
        assert focal_loss(probabilities, target, gamma=0.0).item() == pytest.approx(cross_entropy.item(), abs=1e-4)

    def test_focusing_lowers_the_loss(self) -> None:
        probabilities, target = case()
        losses = [focal_loss(probabilities, target, gamma).item() for gamma in (0.0, 1.0, 2.0, 4.0)]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] > losses[-1] > 0

    def test_symmetric_in_the_channels(self) -> None:
        probabilities, target = case()
        flipped = focal_loss(probabilities.flip(1), 1 - target)
        assert flipped.item() == pytest.approx(focal_loss(probabilities, target).item(), abs=1e-12)

    def test_certain_and_right_costs_nothing_certain_and_wrong_stays_finite(self) -> None:
        target = torch.tensor([[[0, 1]]])
        right = torch.stack([1.0 - target, target.float()], dim=1)
        assert focal_loss(right, target).item() == pytest.approx(0.0, abs=1e-9)
        wrong = focal_loss(right.flip(1), target).item()
        assert wrong == pytest.approx(-math.log(2e-5), rel=1e-3)

    def test_mask_dtype_does_not_matter(self) -> None:
        probabilities, target = case()
        losses = {
            focal_loss(probabilities, target.to(dtype)).item() for dtype in (torch.bool, torch.uint8, torch.float32)
        }
        assert losses == {focal_loss(probabilities, target).item()}

    @pytest.mark.parametrize(
        ("shape", "target_shape"),
        [
            ((2, 2, 4, 4), (2, 4, 5)),
            ((2, 2, 4, 4), (2, 1, 4, 4)),
            ((2, 2, 4, 4), (4, 4)),
            ((2, 2, 4, 4), (1, 4, 4)),
            ((2, 1, 4, 4), (2, 4, 4)),
            ((2, 3, 4, 4), (2, 4, 4)),
            ((2, 2, 4), (2, 4)),
        ],
    )
    def test_shapes_that_do_not_belong_together(self, shape: tuple[int, ...], target_shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"must be \(B, 2, H, W\) and `target` \(B, H, W\), got \(2, .*\) and \("):
            focal_loss(torch.rand(shape), torch.zeros(target_shape))


class TestDice:
    def test_by_hand(self) -> None:
        # Overlap 0.5, sums 1.0 and 2: 1 - (2 * 0.5 + 1) / (1 + 2 + 1) = 1/2.
        probability = torch.tensor([[[0.5, 0.0], [0.5, 0.0]]])
        target = torch.tensor([[[1, 1], [0, 0]]])
        assert dice_loss(probability, target).item() == pytest.approx(0.5, abs=1e-7)

    def test_matches_loops(self) -> None:
        probabilities, target = case(3, 5, 4)
        overlaps = []
        for p, m in zip(probabilities[:, 1].flatten(1).tolist(), target.flatten(1).tolist(), strict=True):
            overlap = sum(a * b for a, b in zip(p, m, strict=True))
            overlaps.append((2 * overlap + 1) / (sum(p) + sum(m) + 1))
        assert dice_loss(probabilities[:, 1], target).item() == pytest.approx(1 - sum(overlaps) / 3, rel=1e-12)

    def test_is_the_mean_over_images_for_any_batch(self) -> None:
        probabilities, target = case(3)
        single = [dice_loss(probabilities[i : i + 1, 1], target[i : i + 1]).item() for i in range(3)]
        assert dice_loss(probabilities[:, 1], target).item() == pytest.approx(sum(single) / 3, rel=1e-12)
        assert max(single) > min(single)

    def test_perfect_overlap_and_empty_mask_cost_nothing(self) -> None:
        _, target = case(2)
        assert dice_loss(target.double(), target).item() == pytest.approx(0.0, abs=1e-12)
        assert dice_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)).item() == 0.0

    def test_lies_between_zero_and_one(self) -> None:
        opposite = dice_loss(torch.ones(1, 50, 50), torch.zeros(1, 50, 50)).item()
        assert 0.999 < opposite < 1.0

    def test_shapes_differ(self) -> None:
        with pytest.raises(ValueError, match=r"must have one shape, got \(2, 3, 4\) and \(2, 1, 3, 4\)"):
            dice_loss(torch.rand(2, 3, 4), torch.zeros(2, 1, 3, 4))


class TestAdapterLoss:
    def test_is_the_sum_over_stages(self) -> None:
        stages = [case(seed=seed)[0] for seed in (1, 2, 3)]
        _, target = case()
        parts = [focal_loss(maps, target) + dice_loss(maps[:, 1], target) for maps in stages]
        assert adapter_loss(stages, target).item() == pytest.approx(sum(part.item() for part in parts), rel=1e-12)

    def test_one_stage_twice_counts_twice(self) -> None:
        probabilities, target = case()
        assert adapter_loss([probabilities] * 2, target).item() == pytest.approx(
            2 * adapter_loss([probabilities], target).item(), rel=1e-12
        )

    def test_bad_shapes(self) -> None:
        probabilities, target = case()
        with pytest.raises(ValueError, match=r"`probabilities` must be \(B, 2, H, W\)"):
            adapter_loss([probabilities, probabilities[..., :-1]], target)


class TestMultipleInstance:
    @staticmethod
    def stages(*maps: Tensor) -> list[Tensor]:
        return [torch.stack([1 - anomalous, anomalous], dim=1) for anomalous in maps]

    def test_by_hand(self) -> None:
        # Of 100 pixels the 2 highest: (0.9 + 0.5) / 2 in one stage, 0.3 in the other.
        first, second = torch.zeros(1, 10, 10), torch.full((1, 10, 10), 0.3)
        first[0, 3, 4], first[0, 8, 1], first[0, 0, 0] = 0.9, 0.5, 0.4
        assert multiple_instance_loss(self.stages(first)).item() == pytest.approx(-math.log(0.7), abs=1e-4)
        expected = -math.log(0.7) - math.log(0.3)
        assert multiple_instance_loss(self.stages(first, second)).item() == pytest.approx(expected, abs=1e-4)

    def test_matches_loops(self) -> None:
        stages = [case(2, 9, 13, seed)[0] for seed in (1, 2, 3)]
        losses = []
        for image in range(2):
            highest = [sorted(maps[image, 1].flatten().tolist(), reverse=True)[:3] for maps in stages]  # 2.34 of 117
            losses.append(sum(-math.log(sum(pixels) / 3 + SMOOTHING) for pixels in highest))
        assert multiple_instance_loss(stages).item() == pytest.approx(sum(losses) / 2, rel=1e-9)

    def test_where_the_highest_pixels_lie_does_not_matter(self) -> None:
        stages = [case(2, 8, 8, seed)[0] for seed in (1, 2)]
        moved = [
            maps.flatten(2)[..., torch.randperm(64, generator=torch.Generator().manual_seed(seed))].unflatten(2, (8, 8))
            for seed, maps in enumerate(stages)
        ]
        assert multiple_instance_loss(moved).item() == pytest.approx(multiple_instance_loss(stages).item(), rel=1e-12)

    def test_falls_with_the_evidence_and_stays_finite(self) -> None:
        losses = [multiple_instance_loss(self.stages(torch.full((1, 5, 5), p))).item() for p in (0.0, 0.1, 0.5, 1.0)]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] == pytest.approx(-math.log(SMOOTHING), rel=1e-5)
        assert losses[-1] == pytest.approx(0.0, abs=1e-4)

    def test_only_the_highest_pixels_learn(self) -> None:
        maps = case(1, 10, 10)[0].requires_grad_()
        multiple_instance_loss([maps]).backward()
        learning = maps.grad[0, 1].flatten().nonzero().flatten()
        assert sorted(learning.tolist()) == sorted(maps[0, 1].flatten().topk(2).indices.tolist())
        assert (maps.grad[0, 1].flatten()[learning] < 0).all()


class TestPartialAdapterLoss:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_with_masks_it_is_the_adapter_loss_to_the_last_bit(self, batch: int, dtype: torch.dtype) -> None:
        stages = [case(batch, 7, 5, seed)[0].float().requires_grad_() for seed in (1, 2, 3)]
        target = case(batch, 7, 5)[1].to(dtype)
        target[0] = 0  # a normal image
        ours, papers = partial_adapter_loss(stages, target), adapter_loss(stages, target)
        assert torch.equal(ours, papers)
        for one, other in zip(torch.autograd.grad(ours, stages), torch.autograd.grad(papers, stages), strict=True):
            assert torch.equal(one, other)

    def test_without_masks_it_is_the_multiple_instance_loss(self) -> None:
        stages = [case(2, seed=seed)[0] for seed in (1, 2)]
        loss = partial_adapter_loss(stages, torch.full((2, 3, 4), UNKNOWN))
        assert torch.equal(loss, multiple_instance_loss(stages))

    def test_every_image_contributes_by_what_it_has(self) -> None:
        stages = [case(4, seed=seed)[0] for seed in (1, 2)]
        _, target = case(4)
        target[1], target[3, 1, 2] = UNKNOWN, UNKNOWN  # one unknown pixel, and the mask is not to be relied on
        single = [
            adapter_loss([maps[[image]] for maps in stages], target[[image]])
            if image in {0, 2}
            else multiple_instance_loss([maps[[image]] for maps in stages])
            for image in range(4)
        ]
        mean = torch.stack(single).mean().item()
        assert partial_adapter_loss(stages, target).item() == pytest.approx(mean, rel=1e-7)

    @pytest.mark.parametrize("with_masks", [1, 3])
    def test_unequal_shares_by_hand(self, with_masks: int) -> None:
        # Everywhere one quarter anomalous. With a mask, of a normal image of 100 pixels: focal (1/4)^2 * log(4/3), and
        # dice 1 - 1 / (25 + 1). Without one: log(4).
        maps = torch.tensor([0.75, 0.25]).view(1, 2, 1, 1).expand(4, 2, 10, 10)
        target = torch.zeros(4, 10, 10, dtype=torch.uint8)
        target[with_masks:] = UNKNOWN
        masked, labelled = 0.0625 * math.log(4 / 3) + 25 / 26, math.log(4)
        expected = (with_masks * masked + (4 - with_masks) * labelled) / 4
        assert partial_adapter_loss([maps], target).item() == pytest.approx(expected, abs=1e-4)
        assert partial_adapter_loss([maps, maps], target).item() == pytest.approx(2 * expected, abs=2e-4)

    def test_bad_shapes(self) -> None:
        probabilities, target = case()
        target[0] = UNKNOWN
        with pytest.raises(ValueError, match=r"`probabilities` must be \(B, 2, H, W\)"):
            partial_adapter_loss([probabilities[..., :-1]], target)


@pytest.mark.parametrize("name", ["focal", "dice", "adapter", "multiple instance", "partial"])
def test_gradients(name: str) -> None:
    _, target = case()
    half_known = target.clone()
    half_known[0] = UNKNOWN
    logits = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    functions = {
        "focal": lambda x: focal_loss(x.softmax(dim=1), target),
        "dice": lambda x: dice_loss(x.softmax(dim=1)[:, 1], target),
        "adapter": lambda x: adapter_loss([x.softmax(dim=1), (2 * x).softmax(dim=1)], target),
        "multiple instance": lambda x: multiple_instance_loss([x.softmax(dim=1), (2 * x).softmax(dim=1)]),
        "partial": lambda x: partial_adapter_loss([x.softmax(dim=1), (2 * x).softmax(dim=1)], half_known),
    }
    assert torch.autograd.gradcheck(functions[name], (logits.requires_grad_(),))
