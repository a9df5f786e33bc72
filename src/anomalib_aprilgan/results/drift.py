"""Whether the parts, or the light on them, are still those that thresholds were calibrated with."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray
from scipy import stats

# Images that are looked at together, and after how many new ones they are looked at again.
WINDOW, STEP = 50, 10
# Probability at which one look takes a difference for chance no longer. In 1,000 images there are 96 looks; parts of
# a line are less independent than the tests take them for, and the test of means is only about right where good parts
# are of several kinds.
LEVEL, LEVEL_OF_MEANS = 1e-5, 1e-6
# Good parts below which no difference could be that certain.
_LEAST_PARTS = 10
_CHANNELS = ("red", "green", "blue")


class DriftMonitor:
    """Compares the latest images of a class with the good parts of its calibration.

    Three things are compared in a sliding window: the distributions of the scores and of the images' mean colours,
    which follow the light (Kolmogorov-Smirnov tests of two samples), and the mean image feature; see
    ``mean_difference``.

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

    @property
    def summary(self) -> str:
        """What changed first, in words, or that nothing has, or that there were too few images to tell."""
        unknown = f"not known before {WINDOW} images and {_LEAST_PARTS} good parts"
        return self.first or ("none" if self._words else unknown)

    def _look(self) -> dict[str, str]:
        """What differs, and the numbers that tell."""
        found = {}
        scores = np.array([score for score, _ in self._latest])
        told, p_value = _compared("scores", scores, self._scores)
        if p_value < LEVEL:
            found["scores"] = told
        latest, good = np.stack([appearance for _, appearance in self._latest]), self._appearances
        if len(good) < _LEAST_PARTS:
            return found
        if good.shape[1] > len(_CHANNELS):  # not for images in tiles
            distance, expected, p_value = mean_difference(latest[:, :-3], good[:, :-3])
            if p_value < LEVEL_OF_MEANS:
                found["images"] = (
                    f"the mean image feature is {distance:.2g} from that of {len(good)} good parts, where "
                    f"{expected:.2g} would be chance (p = {p_value:.1g})"
                )
        channels = [
            _compared(f"mean values of {channel}", latest[:, place], good[:, place])
            for place, channel in enumerate(_CHANNELS, good.shape[1] - len(_CHANNELS))
        ]
        told, p_value = min(channels, key=lambda channel: channel[1])
        if p_value < LEVEL / len(_CHANNELS):
            found["light"] = told
        return found


def _compared(what: str, latest: NDArray[np.float32], good: NDArray[np.float32]) -> tuple[str, float]:
    """How two samples of numbers differ, in words, and the p-value."""
    statistic, p_value = stats.ks_2samp(latest, good)
    text = (
        f"{what} have the median {np.median(latest):.4g}, those of {len(good)} good parts {np.median(good):.4g} "
        f"(Kolmogorov-Smirnov {statistic:.2f}, p = {p_value:.1g})"
    )
    return text, float(p_value)


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
