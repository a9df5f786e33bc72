"""Bootstrap over test images, intervals, and comparisons of methods on the same images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest

from anomalib_aprilgan.evaluation import comparisons, resampling
from anomalib_aprilgan.evaluation.cells import Cell, CellResult
from anomalib_aprilgan.evaluation.resampling import bootstrap, interval, p_value
from anomalib_aprilgan.metrics import METRICS, measure


def arrays(seed: int = 0, images: int = 24, size: int = 40) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    masks = np.zeros((images, size, size), dtype=bool)
    for mask in masks[: images // 2]:
        for _ in range(2):
            top, left = generator.integers(0, size - 8, 2)
            mask[top : top + 6, left : left + 9] = True
    strength = generator.random((images, 1, 1)) * 3
    maps = (generator.standard_normal(masks.shape) + strength * masks).astype(np.float32)
    labels = masks.any(axis=(1, 2))
    return {"labels": labels, "scores": generator.random(images) + 0.4 * labels, "masks": [*masks], "maps": [*maps]}


def test_samples_are_the_metrics_of_the_images_drawn() -> None:
    given = arrays()
    found = bootstrap(**given, number=40, seed=5)
    assert set(found) == set(METRICS)
    weights = resampling._weights(given["labels"], 40, 5).astype(int)
    for sample, counts in enumerate(weights):
        drawn = np.repeat(np.arange(len(counts)), counts)
        exact = measure(*(np.array(given[name])[drawn] for name in ("masks", "maps", "labels", "scores")))
        for name, value in exact.items():
            tolerance = 1e-6 if name.startswith("image") else 0.01
            assert found[name][sample] == pytest.approx(value, abs=tolerance), name


def test_every_sample_has_as_many_of_each_label() -> None:
    labels = np.arange(20) < 6
    weights = resampling._weights(labels, 50, 0)
    assert (weights[:, labels].sum(axis=1) == 6).all()
    assert (weights[:, ~labels].sum(axis=1) == 14).all()
    assert len(np.unique(weights, axis=0)) > 40
    assert np.array_equal(weights, resampling._weights(labels, 50, 0))


def test_what_cannot_be_drawn() -> None:
    given = arrays()
    assert bootstrap(given["labels"] | True, given["scores"], None, None, 10, 0) == {}
    images = bootstrap(given["labels"], given["scores"], None, None, 10, 0)
    assert set(images) == {"image_auroc", "image_f1_max", "image_ap", "image_aupr"}


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Image AUROC of scores whose true one is known."""
    truth = 0.7602  # of normal scores one standard deviation apart
    inside = 0
    for trial in range(200):
        generator = np.random.default_rng(trial)
        labels = np.arange(80) % 2 == 1
        scores = generator.standard_normal(80) + labels
        low, high = interval(bootstrap(labels, scores, None, None, 300, trial)["image_auroc"])
        inside += low <= truth <= high
    assert 180 <= inside <= 198  # 190 are promised


def test_methods_that_differ_in_nothing_but_noise_are_rarely_told_apart() -> None:
    """Under the hypothesis that there is no difference, p is uniform."""
    found = []
    for trial in range(200):
        generator = np.random.default_rng(trial)
        labels = np.arange(100) % 2 == 1
        common = generator.standard_normal(100) + labels
        first, second = (common + 0.5 * generator.standard_normal(100) for _ in range(2))
        samples = [bootstrap(labels, scores, None, None, 200, trial)["image_auroc"] for scores in (first, second)]
        exact = [measure(None, None, labels, scores)["image_auroc"] for scores in (first, second)]
        found.append(p_value(exact[0] - exact[1], samples[0] - samples[1]))
    assert kstest(found, "uniform").pvalue > 0.01
    assert p_value(0.0, np.zeros(10)) == 1
    assert p_value(0.1, np.zeros(10)) == 0


class TestTables:
    def result(self, model: str, category: str, value: float, **arguments: Any) -> CellResult:
        generator = np.random.default_rng(len(category))
        samples = {"image_auroc": (value + 0.01 * generator.standard_normal(500)).astype(np.float32)}
        metrics = dict.fromkeys(METRICS, math.nan) | {"image_auroc": value}
        arguments = {"seed": 0, "files": category} | arguments
        cell = Cell(model, "D", category, 0, arguments["seed"])
        return CellResult(cell, metrics=metrics, samples=samples, test_files=arguments["files"])

    def test_intervals_are_of_the_mean_over_categories(self) -> None:
        text = comparisons.intervals([self.result("M", "a", 0.8), self.result("M", "bb", 0.6)])
        (line,) = [line for line in text.splitlines() if line.startswith("| zero-shot | M |")]
        assert "| 70.0 [68." in line
        assert comparisons.intervals([]) == ""

    def test_differences_are_between_methods_on_the_same_images(self) -> None:
        results = [
            self.result(model, category, value) for model, value in (("M", 0.8), ("N", 0.7)) for category in "ab"
        ]
        others = [self.result("O", "a", 0.9, files="others"), self.result("O", "b", 0.9)]
        lines = [line for line in comparisons.differences([*results, *others]).splitlines() if "zero-shot" in line]
        assert len(lines) == 1  # O was tested on other images
        assert lines[0].startswith("| zero-shot | M - N |")
        assert "+10.0 (p < 0.001)" in lines[0]

    def test_seeds_are_averaged(self) -> None:
        results = [self.result("M", "a", 0.8, seed=0), self.result("M", "a", 0.6, seed=1), self.result("N", "a", 0.7)]
        text = comparisons.differences(results)
        assert "+0.0 (p = 1.000)" in text
