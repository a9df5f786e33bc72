"""Whether the parts, or the light on them, are still those that thresholds were calibrated with."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray
from scipy import stats

# Images that are looked at together, and after how many new ones they are looked at again.
WINDOW, STEP = 50, 10
# Probability at which one look takes a difference for chance no longer. In 1,000 images there are 96 looks at scores
# and as many at features; all of them together stay below 0.05.
LEVEL = 1e-4
# Good parts below which no difference could be that certain.
_LEAST_PARTS = 10


class DriftMonitor:
    """Compares the latest images of a class with the good parts of its calibration.

    Two things are compared in a sliding window: the distribution of the scores (Kolmogorov-Smirnov test of two
    samples), and the mean image feature (squared distance of the means, as Chen and Qin, Annals of Statistics 38,
    2010, with a gamma distribution of the same mean and variance in place of the normal one).

    Args:
        scores: ``(n,)`` of good parts, on the same scale as those to come.
        features: Image features ``(m, D)`` of good parts, of unit length; perhaps none.
    """

    def __init__(self, scores: NDArray[np.float32], features: NDArray[np.float32]) -> None:
        self._scores, self._features = scores, features
        self._latest: deque[tuple[float, NDArray[np.float32] | None]] = deque(maxlen=WINDOW)
        self._until_look, self._words = WINDOW, ""
        self.seen = 0
        self.first: str | None = None  # in words, where and what changed first

    def update(self, score: float, feature: NDArray[np.float32] | None) -> str:
        """Take an image; returns what has changed: "no", "scores", "images", "scores and images", or "" for unknown.

        A score that is not a number, as of an image that could not be judged, does not count.
        """
        self.seen += 1
        if not np.isfinite(score) or len(self._scores) < _LEAST_PARTS:
            return self._words
        self._latest.append((score, feature))
        self._until_look -= 1
        if self._until_look == 0:
            self._until_look = STEP
            found = self._look()
            self._words = " and ".join(found) or "no"
            if found and self.first is None:
                self.first = f"image {self.seen}: {'; '.join(found.values())}"
        return self._words

    def _look(self) -> dict[str, str]:
        """What differs, and the numbers that tell."""
        found = {}
        scores = np.array([score for score, _ in self._latest])
        statistic, p_value = stats.ks_2samp(scores, self._scores)
        if p_value < LEVEL:
            found["scores"] = (
                f"the scores of the last {WINDOW} images have the median {np.median(scores):.4g}, those of "
                f"{len(self._scores)} good parts {np.median(self._scores):.4g} (Kolmogorov-Smirnov "
                f"{statistic:.2f}, p = {p_value:.1g})"
            )
        features = [feature for _, feature in self._latest if feature is not None]
        if len(features) == WINDOW and len(self._features) >= _LEAST_PARTS:
            distance, expected, p_value = mean_difference(np.stack(features), self._features)
            if p_value < LEVEL:
                found["images"] = (
                    f"their mean image feature is {distance:.2g} from that of the good parts, where {expected:.2g} "
                    f"would be chance (p = {p_value:.1g})"
                )
        return found


def mean_difference(first: NDArray[np.float32], second: NDArray[np.float32]) -> tuple[float, float, float]:
    """Distance between the means of two samples ``(n, D)``, its size by chance, and its p-value.

    The squared distance by chance is a weighted sum of chi-squared variables. It is taken for a gamma variable of the
    same mean and variance, both from the pooled covariance within the samples.
    """
    samples = [np.asarray(sample, dtype=np.float64) for sample in (first, second)]
    squared = float(((samples[0].mean(axis=0) - samples[1].mean(axis=0)) ** 2).sum())
    centred = np.concatenate([sample - sample.mean(axis=0) for sample in samples])
    # The traces of the covariance and of its square, by the smaller Gram matrix.
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    freedom, share = len(centred) - 2, sum(1.0 / len(sample) for sample in samples)
    mean = share * np.trace(gram) / freedom
    variance = 2.0 * share**2 * (gram**2).sum() / freedom**2
    if variance <= 0.0:  # all images are the same
        return squared**0.5, 0.0, float(squared == 0.0)
    return squared**0.5, float(mean) ** 0.5, float(stats.gamma.sf(squared, mean**2 / variance, scale=variance / mean))
