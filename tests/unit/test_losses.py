"""Focal and dice loss: values by hand, loops, laws, gradients."""

import math

import pytest
import torch
from torch import Tensor

from anomalib_aprilgan.losses import SMOOTHING, adapter_loss, dice_loss, focal_loss


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

    def test_bad_shapes_are_refused(self) -> None:
        probabilities, target = case()
        with pytest.raises(ValueError, match=r"`probabilities` must be \(B, 2, H, W\)"):
            adapter_loss([probabilities, probabilities[..., :-1]], target)


@pytest.mark.parametrize("name", ["focal", "dice", "adapter"])
def test_gradients(name: str) -> None:
    _, target = case()
    logits = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    functions = {
        "focal": lambda x: focal_loss(x.softmax(dim=1), target),
        "dice": lambda x: dice_loss(x.softmax(dim=1)[:, 1], target),
        "adapter": lambda x: adapter_loss([x.softmax(dim=1), (2 * x).softmax(dim=1)], target),
    }
    assert torch.autograd.gradcheck(functions[name], (logits.requires_grad_(),))
