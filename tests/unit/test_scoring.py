"""The arithmetic of scores and maps against loops written out, and the laws it obeys."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from einops import EinopsError
from torch import Tensor

from anomalib_aprilgan.network.scoring import (
    TEMPERATURE,
    accepted_share,
    distance_map,
    mean_colour,
    nearest_normal_distance,
    neighbourhood_mean,
    smooth,
    smoothing_radius,
    text_logits,
    text_probability,
    text_probability_maps,
    unlabelled_distance,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit_columns(*shape: int, seed: int = 1) -> Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-2)


def bilinear(plane: Tensor, height: int, width: int) -> Tensor:
    """Corner-aligned bilinear interpolation, pixel by pixel."""
    rows, columns = plane.shape
    result = torch.empty(height, width)
    for y in range(height):
        for x in range(width):
            v = y * (rows - 1) / (height - 1)
            u = x * (columns - 1) / (width - 1)
            top, left = min(int(v), rows - 2), min(int(u), columns - 2)
            a, b = v - top, u - left
            result[y, x] = (
                (1 - a) * (1 - b) * plane[top, left]
                + (1 - a) * b * plane[top, left + 1]
                + a * (1 - b) * plane[top + 1, left]
                + a * b * plane[top + 1, left + 1]
            )
    return result


class TestText:
    def test_logits_by_hand(self) -> None:
        features = torch.tensor([[[3.0, 4.0]]])  # length 5
        text = torch.eye(2)
        torch.testing.assert_close(text_logits(features, text), torch.tensor([[[60.0, 80.0]]]))

    def test_probability_by_hand(self) -> None:
        # Cosines 1 and 0.99: the sigmoid of -100 * 0.01.
        text = torch.tensor([[1.0, 0.99], [0.0, math.sqrt(1 - 0.99**2)]])
        probability = text_probability(torch.tensor([[2.0, 0.0]]), text)
        assert probability.item() == pytest.approx(1 / (1 + math.e), abs=1e-5)

    def test_logits_match_loops(self) -> None:
        features, text = random(2, 3, 5), unit_columns(5, 2)
        logits = text_logits(features, text)
        for image in range(2):
            for patch in range(3):
                for state in range(2):
                    feature = features[image, patch]
                    cosine = (feature @ text[:, state] / feature.norm()).item()
                    assert logits[image, patch, state].item() == pytest.approx(TEMPERATURE * cosine, abs=1e-4)

    def test_length_of_features_does_not_matter_and_logits_are_bounded(self) -> None:
        features, text = random(2, 9, 6), unit_columns(6, 2)
        logits = text_logits(features, text)
        torch.testing.assert_close(text_logits(1e3 * features, text), logits)
        assert logits.abs().max() <= TEMPERATURE * (1 + 1e-5)

    def test_text_per_image_equals_text_of_each_image(self) -> None:
        features, text = random(3, 4, 6), unit_columns(3, 6, 2)
        together = text_logits(features, text)
        for image in range(3):
            torch.testing.assert_close(together[image], text_logits(features[image : image + 1], text[image])[0])

    def test_swapping_the_texts_gives_the_complement(self) -> None:
        feature, text = random(7, 6), unit_columns(6, 2)
        swapped = text_probability(feature, text.flip(-1))
        torch.testing.assert_close(text_probability(feature, text) + swapped, torch.ones(7))
        assert text_probability(feature, text).shape == (7,)


class TestMaps:
    def test_even_logits_give_one_half(self) -> None:
        maps = text_probability_maps(torch.full((1, 6, 2), 17.0), (2, 3), (8, 9))
        assert maps.shape == (1, 2, 8, 9)
        assert torch.equal(maps, torch.full_like(maps, 0.5))

    def test_matches_slow_version(self) -> None:
        logits = 5 * random(2, 6, 2)
        maps = text_probability_maps(logits, (2, 3), (7, 8))
        for image in range(2):
            planes = [bilinear(logits[image, :, state].reshape(2, 3), 7, 8) for state in range(2)]
            torch.testing.assert_close(maps[image, 1], torch.sigmoid(planes[1] - planes[0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(maps.sum(dim=1), torch.ones(2, 7, 8))

    def test_softmax_comes_after_interpolation(self) -> None:
        # Half-way between logits (0, 40) and (0, 0) lies (0, 20): all but certain, not three quarters.
        logits = torch.tensor([[[0.0, 40.0], [0.0, 0.0], [0.0, 40.0], [0.0, 0.0]]])
        middle = text_probability_maps(logits, (2, 2), (3, 3))[0, 1, :, 1]
        assert middle.min() > 1 - 1e-6
        before = F.interpolate(
            logits.softmax(-1)[..., 1].reshape(1, 1, 2, 2), (3, 3), mode="bilinear", align_corners=True
        )
        torch.testing.assert_close(before[0, 0, :, 1], torch.full((3,), 0.75))

    def test_corners_keep_their_patches(self) -> None:
        distance = random(1, 6).abs()
        plane = distance_map(distance, (2, 3), (20, 31))[0]
        corners = torch.stack([plane[0, 0], plane[0, -1], plane[-1, 0], plane[-1, -1]])
        torch.testing.assert_close(corners, distance[0, [0, 2, 3, 5]])

    def test_distance_map_matches_slow_version(self) -> None:
        distance = random(2, 12).abs()
        maps = distance_map(distance, (4, 3), (9, 11))
        assert maps.shape == (2, 9, 11)
        for image in range(2):
            slow = bilinear(distance[image].reshape(4, 3), 9, 11)
            torch.testing.assert_close(maps[image], slow, atol=1e-5, rtol=0)

    def test_a_grid_that_does_not_hold_the_patches(self) -> None:
        with pytest.raises(EinopsError, match=r"rearrange"):
            distance_map(random(1, 6), (4, 4), (8, 8))


class TestNearestNormalDistance:
    def test_by_hand(self) -> None:
        patches = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [5.0, 5.0]]])
        bank = [torch.tensor([[1.0, 0.0]])]
        expected = torch.tensor([[0.0, 1.0, 2.0, 1 - math.sqrt(0.5)]])
        torch.testing.assert_close(nearest_normal_distance(patches, bank), expected)

    def test_matches_loops(self) -> None:
        patches = random(2, 5, 8)
        bank = [F.normalize(random(4, 8, seed=seed), dim=-1) for seed in (2, 3, 4)]
        distance = nearest_normal_distance(patches, bank)
        for image in range(2):
            for patch in range(5):
                own = patches[image, patch]
                slow = min(1 - F.cosine_similarity(own, other, dim=0).item() for part in bank for other in part)
                assert distance[image, patch].item() == pytest.approx(slow, abs=1e-6)

    def test_more_shots_never_raise_it(self) -> None:
        patches = random(3, 20, 8)
        bank = [F.normalize(random(20, 8, seed=seed), dim=-1) for seed in range(10, 15)]
        distances = [nearest_normal_distance(patches, bank[:shots]) for shots in range(1, 6)]
        for fewer, more in pairwise(distances):
            assert (more <= fewer).all()
            assert (more < fewer).any()

    def test_seen_patches_have_none_and_opposite_ones_two(self) -> None:
        patches = random(1, 20, 8)
        bank = [F.normalize(patches[0], dim=-1)]
        assert nearest_normal_distance(100 * patches, bank).abs().max() < 1e-6
        one = [bank[0][:1]]
        assert nearest_normal_distance(-patches[:, :1], one).item() == pytest.approx(2.0, abs=1e-6)

    def test_parts_and_their_order_do_not_matter(self) -> None:
        patches, bank = random(2, 6, 8), F.normalize(random(12, 8, seed=5), dim=-1)
        whole = nearest_normal_distance(patches, [bank])
        torch.testing.assert_close(nearest_normal_distance(patches, bank.split(5)), whole)
        torch.testing.assert_close(nearest_normal_distance(patches, iter(bank.flip(0).split(4))), whole)

    def test_arguments_are_left_alone(self) -> None:
        patches, bank = random(1, 4, 8), [random(4, 8, seed=6)]
        copies = patches.clone(), bank[0].clone()
        nearest_normal_distance(patches, bank)
        assert torch.equal(patches, copies[0])
        assert torch.equal(bank[0], copies[1])

    def test_empty_bank(self) -> None:
        with pytest.raises(RuntimeError, match=r"memory bank is empty: fill it with `MemoryBank.fill`"):
            nearest_normal_distance(random(1, 4, 8), [])


class TestNeighbourhoodMean:
    def test_by_hand(self) -> None:
        tokens = torch.arange(12.0).reshape(1, 12, 1)  # 3 rows of 4
        means = neighbourhood_mean(tokens, (3, 4), 3)[0, :, 0].reshape(3, 4)
        assert means[0, 0].item() == pytest.approx((0 + 1 + 4 + 5) / 4)  # a corner has three neighbours
        assert means[0, 1].item() == pytest.approx((0 + 1 + 2 + 4 + 5 + 6) / 6)
        assert means[1, 2].item() == pytest.approx(6.0)

    @pytest.mark.parametrize("side", [1, 3, 5, 9])
    def test_matches_loops(self, side: int) -> None:
        tokens, reach = random(2, 12, 3), side // 2
        planes = tokens.reshape(2, 4, 3, 3)
        means = neighbourhood_mean(tokens, (4, 3), side).reshape(2, 4, 3, 3)
        for row in range(4):
            for column in range(3):
                rows = slice(max(0, row - reach), row + reach + 1)
                columns = slice(max(0, column - reach), column + reach + 1)
                torch.testing.assert_close(means[:, row, column], planes[:, rows, columns].mean(dim=(1, 2)))

    def test_constant_tokens_stay_and_a_side_of_one_changes_nothing(self) -> None:
        tokens = random(1, 1, 5).repeat(2, 12, 1)
        torch.testing.assert_close(neighbourhood_mean(tokens, (3, 4), 3), tokens)
        half = random(1, 12, 5).bfloat16()
        assert neighbourhood_mean(half, (3, 4), 1) is half
        assert neighbourhood_mean(half, (3, 4), 3).dtype == torch.float32


class TestSmoothing:
    def test_by_hand(self) -> None:
        point = torch.zeros(1, 21, 21)
        point[0, 10, 10] = 1.0
        weights = [math.exp(-0.5 * offset**2 / 1.5**2) for offset in range(-6, 7)]
        assert smoothing_radius(1.5) == 6
        smoothed = smooth(point, 1.5)[0]
        expected = weights[8] / sum(weights) * weights[5] / sum(weights)  # two down, one to the left
        assert smoothed[12, 9].item() == pytest.approx(expected, rel=1e-4)
        assert smoothed[10, 3].item() == 0.0
        assert smoothed.sum().item() == pytest.approx(1.0, abs=1e-5)

    def test_constant_maps_stay_and_others_keep_their_range(self) -> None:
        constant = torch.full((2, 20, 30), 2.5)
        torch.testing.assert_close(smooth(constant, 2.0), constant)
        anomaly_map = random(3, 20, 30)
        smoothed = smooth(anomaly_map, 1.0)
        assert smoothed.shape == (3, 20, 30)
        assert anomaly_map.min() < smoothed.min() < smoothed.max() < anomaly_map.max()

    def test_linear_and_image_by_image(self) -> None:
        first, second = random(2, 12, 14), random(2, 12, 14, seed=1)
        torch.testing.assert_close(smooth(first + 2 * second, 1.0), smooth(first, 1.0) + 2 * smooth(second, 1.0))
        torch.testing.assert_close(smooth(first, 1.0)[1:], smooth(first[1:], 1.0))

    def test_none_leaves_the_map(self) -> None:
        anomaly_map = random(1, 4, 4)
        assert smooth(anomaly_map, 0.0) is anomaly_map


class TestUnlabelledDistance:
    def patches(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)

    @pytest.mark.parametrize(("share", "counted"), [(0.3, 2), (0.5, 3), (1.0, 7), (0.01, 1)])
    def test_is_the_mean_over_the_lowest_references(self, share: float, counted: int) -> None:
        tokens = [self.patches(2, 5, 8), self.patches(2, 3, 6, seed=1)]
        banks = [[*self.patches(7, 5, 8, seed=2)], [*self.patches(7, 3, 6, seed=3)]]
        found = unlabelled_distance(tokens, banks, share)
        for stage, bank, of_stage in zip(tokens, banks, found, strict=True):
            for image, distances in zip(stage, of_stage, strict=True):
                for patch, distance in zip(image, distances, strict=True):
                    nearest = sorted(min(1 - float(patch @ other) for other in reference) for reference in bank)
                    assert float(distance) == pytest.approx(sum(nearest[:counted]) / counted, abs=1e-5)

    def test_one_reference_is_a_memory_bank_of_one(self) -> None:
        tokens, bank = self.patches(3, 5, 8), [self.patches(5, 8, seed=1)]
        expected = nearest_normal_distance(tokens, bank)
        torch.testing.assert_close(unlabelled_distance([tokens], [bank], 1.0)[0], expected, atol=1e-6, rtol=0)
        itself = [tokens[0]]
        torch.testing.assert_close(
            unlabelled_distance([tokens], [itself], 0.3)[0], nearest_normal_distance(tokens, itself), atol=1e-6, rtol=0
        )

    @pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
    def test_an_image_is_not_compared_with_itself(self, share: float) -> None:
        """In a batch with an image that is none of the references, and with the image twice among them."""
        references, stranger = self.patches(5, 4, 8), self.patches(1, 4, 8, seed=9)
        seen = torch.cat([references[1:2], stranger])
        twice = [*references, references[1]]
        found = unlabelled_distance([seen], [twice], share)[0]
        others = [references[place] for place in (0, 2, 3, 4)]
        torch.testing.assert_close(found[:1], unlabelled_distance([references[1:2]], [others], share)[0])
        torch.testing.assert_close(found[1:], unlabelled_distance([stranger], [twice], share)[0])

    def test_a_part_in_common_is_not_the_image_itself(self) -> None:
        references = self.patches(4, 4, 8)
        seen = references[:1].clone()
        seen[0, 3] = -seen[0, 3]
        found = unlabelled_distance([seen], [[*references]], 0.3)[0]
        torch.testing.assert_close(found[0, :3], torch.zeros(3), atol=1e-6, rtol=0)

    def test_a_defect_that_a_few_share_stays_far(self) -> None:
        good, defect = self.patches(4, 8), self.patches(1, 8, seed=5)
        noisy = [F.normalize(good + 0.02 * self.patches(4, 8, seed=number), dim=-1) for number in range(10, 18)]
        with_defect = [torch.cat([part[:3], F.normalize(defect + 0.02 * part[3:], dim=-1)]) for part in noisy[:2]]
        seen = torch.cat([good[:3], defect])[None]
        far = unlabelled_distance([seen], [[*with_defect, *noisy[2:]]], 0.5)[0]
        assert far[0, 3] > 10 * far[0, :3].max()
        near = nearest_normal_distance(seen, [*with_defect, *noisy[2:]])
        assert near[0, 3] < 0.01  # what two of eight show passes for normal there

    def test_the_order_of_references_does_not_count(self) -> None:
        tokens, bank = self.patches(2, 4, 8), [*self.patches(6, 4, 8, seed=1)]
        found, turned = (unlabelled_distance([tokens], [given], 0.4)[0] for given in (bank, bank[::-1]))
        torch.testing.assert_close(found, turned, atol=1e-7, rtol=0)

    def test_without_references_it_says_which_call_is_missing(self) -> None:
        with pytest.raises(RuntimeError, match="The memory bank is empty"):
            unlabelled_distance([self.patches(1, 2, 4)], [[]], 0.3)


class TestAcceptedShare:
    def test_worked_values(self) -> None:
        references = torch.tensor([0.4, 0.4, 0.4, 0.4, 0.0])
        accepted = torch.tensor([0.0, 0.1, 0.2, 0.6, 0.0])
        torch.testing.assert_close(accepted_share(references, accepted), torch.tensor([1.0, 0.5, 0.0, 0.0, 1.0]))


def test_mean_colour_is_that_of_every_channel() -> None:
    images = torch.arange(24.0).view(2, 3, 2, 2)
    torch.testing.assert_close(mean_colour(images.half()), images.flatten(2).mean(dim=2))
