"""The watch for drift: told once, with numbers, and seldom by chance."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from anomalib_aprilgan.results.drift import LEVEL, STEP, WINDOW, DriftMonitor, mean_difference

Appearances = NDArray[np.float32]


def appearances(number: int, seed: int, width: int = 40, light: float = 1.0) -> Appearances:
    """Features that vary in a few directions, and colours of parts that are lit by 4 % more or less."""
    generator = np.random.default_rng(seed)
    basis = np.random.default_rng(99).normal(size=(3, width))
    features = 1.0 + 0.1 * generator.normal(size=(number, 3)) @ basis + 0.01 * generator.normal(size=(number, width))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    colours = light * np.array([0.5, 0.4, 0.3]) * (1.0 + 0.04 * generator.normal(size=(number, 1)))
    return np.concatenate([features, colours], axis=1).astype(np.float32)


def monitor_of(number: int = 50, seed: int = 0) -> DriftMonitor:
    scores = np.random.default_rng(seed).beta(2, 5, size=number).astype(np.float32)
    return DriftMonitor(scores, appearances(number, seed))


def run(monitor: DriftMonitor, number: int, seed: int, shift: float = 0.0, light: float = 1.0) -> list[str]:
    scores = np.random.default_rng(seed).beta(2, 5, size=number) + shift
    seen = appearances(number, seed, light=light)
    return [monitor.update(float(score), appearance) for score, appearance in zip(scores, seen, strict=True)]


@pytest.mark.thorough
def test_good_parts_raise_no_alarm() -> None:
    alarms = 0
    for seed in range(40):
        monitor = monitor_of(seed=seed)
        words = run(monitor, 1000, 1000 + seed)
        assert words[: WINDOW - 1] == [""] * (WINDOW - 1)
        assert words[WINDOW - 1] == "no"
        assert monitor.seen == 1000
        alarms += monitor.first is not None
    assert alarms <= 2


def test_other_scores_are_told_with_numbers() -> None:
    monitor = monitor_of()
    run(monitor, 100, 1)
    words = run(monitor, 60, 2, shift=0.3)
    assert words[-1] == "scores"
    assert "no" in words  # the window fills with them
    place = 100 + words.index("scores") + 1
    assert monitor.first is not None
    assert monitor.first.startswith(f"image {place}, in the last {WINDOW}: scores have the median 0.")
    assert "50 good parts" in monitor.first
    assert "Kolmogorov-Smirnov 0." in monitor.first


@pytest.mark.parametrize("light", [0.9, 1.1])
def test_other_light_is_told_within_a_hundred_images(light: float) -> None:
    for seed in range(10):
        monitor = monitor_of(seed=seed)
        words = run(monitor, 100, 500 + seed, light=light)
        assert "light" in words[-1]
        assert monitor.first is not None
        assert "mean values of " in monitor.first


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_parts_on_another_ground_now_and_then_hide_no_change_of_light(share: float) -> None:
    """Some of the good parts lie on a far brighter ground."""

    def seen(number: int, seed: int, light: float) -> Appearances:
        found = appearances(number, seed)
        found[np.random.default_rng(seed).random(number) < share, -3:] += 0.4
        found[:, -3:] *= light
        return found

    for seed in range(5):
        scores = np.random.default_rng(seed).random(200, dtype=np.float32)
        for light, told in ((1.0, "no"), (0.9, "light")):
            monitor = DriftMonitor(scores, seen(200, seed, 1.0))
            draw = np.random.default_rng(50 + seed)
            words = [monitor.update(float(draw.random()), one) for one in seen(100, 100 + seed, light)]
            assert words[-1] == told


def test_the_first_is_kept_and_the_word_follows_the_window() -> None:
    monitor = monitor_of()
    run(monitor, WINDOW, 1, shift=0.4)
    first = monitor.first
    words = run(monitor, 2 * WINDOW, 2)
    assert words[0] == "scores"
    assert words[-1] == "no"
    assert monitor.first == first


def test_scores_that_are_no_numbers_do_not_count() -> None:
    monitor = monitor_of()
    seen = appearances(200, 3)
    assert {monitor.update(float("nan"), one) for one in seen} == {""}
    assert run(monitor, WINDOW, 4)[-1] == "no"
    assert monitor.seen == 200 + WINDOW


def test_too_few_good_parts_or_images_tell_nothing() -> None:
    monitor = monitor_of(9)
    assert set(run(monitor, 200, 1, shift=1.0)) == {""}
    assert monitor.summary == "not known before 50 images and 10 good parts"
    monitor = monitor_of()
    run(monitor, WINDOW - 1, 1)
    assert monitor.summary.startswith("not known before 50 images")
    run(monitor, 1, 2)
    assert monitor.summary == "none"


def test_images_in_tiles_have_colours_alone() -> None:
    monitor = DriftMonitor(np.linspace(0, 1, 50, dtype=np.float32), appearances(50, 0)[:, -3:])
    generator = np.random.default_rng(1)
    words = [monitor.update(float(generator.random()), one) for one in appearances(60, 1, light=1.2)[:, -3:]]
    assert words[-1] == "light"


def test_it_looks_again_after_some_images() -> None:
    monitor = monitor_of()
    words = run(monitor, WINDOW, 1) + run(monitor, STEP - 1, 2, shift=5.0)
    assert words[-1] == "no"
    assert run(monitor, 1, 3, shift=5.0) == ["no"]  # ten of fifty
    assert run(monitor, 4 * STEP, 4, shift=5.0)[-1] == "scores"


class TestMeanDifference:
    def test_by_chance_p_values_are_even_and_small_ones_rare(self) -> None:
        values = [
            mean_difference(appearances(50, seed)[:, :-3], appearances(60, 10_000 + seed)[:, :-3])[2]
            for seed in range(600)
        ]
        assert stats.kstest(values, "uniform").pvalue > 0.01
        assert sum(value < LEVEL for value in values) == 0

    @pytest.mark.parametrize("width", [2, 200])
    def test_numbers_of_one_direction_are_those_of_a_t_test(self, width: int) -> None:
        """With all variance in one direction the distance is that of two numbers' means."""
        generator = np.random.default_rng(0)
        first, second = generator.normal(size=(400, 1)), generator.normal(0.2, size=(300, 1))
        direction = np.zeros((1, width))
        direction[0, 0] = 1.0
        distance, expected, p_value = mean_difference(
            (first * direction).astype(np.float32), (second * direction).astype(np.float32)
        )
        assert distance == pytest.approx(abs(first.mean() - second.mean()), rel=1e-4)
        assert expected == pytest.approx((1 / 400 + 1 / 300) ** 0.5, rel=0.1)
        assert p_value == pytest.approx(stats.ttest_ind(first[:, 0], second[:, 0]).pvalue, rel=0.1)

    def test_images_that_are_all_the_same(self) -> None:
        same = np.ones((50, 3), dtype=np.float32)
        assert mean_difference(same, same) == (0.0, 0.0, 1.0)
        assert mean_difference(same, 2 * same)[2] == 0.0
