"""Whether the parts, or the light on them, are still those that thresholds were calibrated with."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray
from scipy import stats

# Images that are looked at together, and after how many new ones they are looked at again.
WINDOW, STEP = 50, 10
# Probability at which one look takes a difference for chance no longer. In 1,000 images there are 96 looks at three
# things; all of them together stay below 0.05.
LEVEL = 1e-4
# Good parts below which no difference could be that certain.
_LEAST_PARTS = 10


class DriftMonitor:
    """Compares the latest images of a class with the good parts of its calibration.

    Three things are compared in a sliding window: the distribution of the scores (Kolmogorov-Smirnov test of two
    samples), the mean image feature and the mean colour, which follows the light; see ``mean_difference``.

    Args:
        scores: ``(n,)`` of good parts, on the same scale as those to come.
        appearances: ``(m, D + 3)`` of good parts, see ``RawPredictions``; perhaps none.
    """

    def __init__(self, scores: NDArray[np.float32], appearances: NDArray[np.float32]) -> None:
        self._scores, self._appearances = scores, appearances
        self._latest: deque[tuple[float, NDArray[np.float32]]] = deque(maxlen=WINDOW)
        self._until_look, self._words = WINDOW, ""
        self.seen = 0
        self.first: str | None = None  # in words, where and what changed first

    def update(self, score: float, appearance: NDArray[np.float32]) -> str:
        """Take an image; returns what has changed, or "" where that is not known yet.

        That is "no", or those of "scores", "images" and "light" that have, joined by "and". An image whose score is
        not a number does not count.
        """
        self.seen += 1
        if not (np.isfinite(score) and np.isfinite(appearance).all()) or len(self._scores) < _LEAST_PARTS:
            return self._words
        self._latest.append((score, appearance))
        self._until_look -= 1
        if self._until_look == 0:
            self._until_look = STEP
            found = self._look()
            self._words = " and ".join(found) or "no"
            if found and self.first is None:
                self.first = f"image {self.seen}, in the last {WINDOW}: {'; '.join(found.values())}"
        return self._words

    def _look(self) -> dict[str, str]:
        """What differs, and the numbers that tell."""
        found = {}
        scores = np.array([score for score, _ in self._latest])
        statistic, p_value = stats.ks_2samp(scores, self._scores)
        if p_value < LEVEL:
            found["scores"] = (
                f"scores have the median {np.median(scores):.4g}, those of {len(self._scores)} good parts "
                f"{np.median(self._scores):.4g} (Kolmogorov-Smirnov {statistic:.2f}, p = {p_value:.1g})"
            )
        latest, good = np.stack([appearance for _, appearance in self._latest]), self._appearances
        if len(good) < _LEAST_PARTS:
            return found
        for name, what, columns in (("images", "image feature", slice(-3)), ("light", "colour", slice(-3, None))):
            if not good[:, columns].size:
                continue
            distance, expected, p_value = mean_difference(latest[:, columns], good[:, columns])
            if p_value < LEVEL:
                found[name] = (
                    f"the mean {what} is {distance:.2g} from that of {len(good)} good parts, where {expected:.2g} "
                    f"would be chance (p = {p_value:.1g})"
                )
        return found


def mean_difference(first: NDArray[np.float32], second: NDArray[np.float32]) -> tuple[float, float, float]:
    """Distance between the means of two samples ``(n, D)``, its size by chance, and its p-value.

    The test is for any ``D``, also beyond the number of samples, as that of Chen and Qin (Annals of Statistics 38,
    2010). The squared distance by chance is a weighted sum of chi-squared variables. It is taken for a gamma variable
    of the same mean and variance, both from the pooled covariance within the samples.
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
