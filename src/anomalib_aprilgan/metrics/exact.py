"""The metrics of the paper and anomalib's beside them, exact; where ``streaming`` takes them in bounded memory.

Every figure but the published PRO follows from the counts at or above each distinct anomalous score,
so the normal pixels are never looked at one by one:

==================  ===========================================================================================
``pixel_auroc``     Area under the ROC curve, ties counted half (as scikit-learn).
``pixel_f1_max``    Highest F1 score over all thresholds.
``pixel_ap``        Average precision, the sum of steps (as scikit-learn).
``aupro``           Per-region overlap by the paper's protocol: 200 thresholds evenly spaced between the lowest and
                    the highest pixel, false-positive rates below 0.3 stretched to [0, 1] (authors' ``test.py``).
``image_auroc``, ``image_f1_max``, ``image_ap``  The same of image scores.
``aupro_exact``     ``anomalib.metrics.AUPRO``: every threshold, area up to a rate of 0.3 divided by 0.3.
``pixel_aupr``, ``image_aupr``  ``anomalib.metrics.AUPR``: from 2.7 on the average precision, so equal to ``*_ap``.
``challenge_f1_max``  Harmonic mean of both F1-max, which ranks the VAND challenge.
==================  ===========================================================================================

A metric that does not exist is NaN: of pixels without an anomalous or without a normal one, of images of one
class alone, and ``aupro`` where no two different false-positive rates lie below 0.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.integrate import trapezoid

from .inputs import Arrays, Values, checked_images, checked_pixels

METRICS: tuple[str, ...] = (
    "pixel_auroc",
    "pixel_f1_max",
    "pixel_ap",
    "aupro",
    "image_auroc",
    "image_f1_max",
    "image_ap",
    "aupro_exact",
    "pixel_aupr",
    "image_aupr",
    "challenge_f1_max",
)
RATE_LIMIT = 0.3
THRESHOLDS = 200
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)

Counts = NDArray[np.int64]


def measure(masks: Arrays | None, maps: Arrays | None, labels: NDArray[Any], scores: NDArray[Any]) -> dict[str, float]:
    """All metrics, exact.

    Args:
        masks: ``(N, H, W)``, or ``N`` arrays ``(H_i, W_i)``, 1 for an anomalous pixel; none if there are no pixel
            labels.
        maps: As ``masks``, compared in single precision; a memory map or a tensor works as well.
        labels: ``(N,)``, 1 for an anomalous image.
        scores: ``(N,)``, higher for more anomalous.

    Returns:
        A value for each of ``METRICS``, NaN where it does not exist.

    Raises:
        ValueError: Shapes differ, a score is not finite, or a label is neither 0 nor 1.
    """
    labels, scores = checked_images(labels, scores)
    pixels = None
    if masks is not None and maps is not None:
        masks, maps = checked_pixels(masks, maps, len(labels))
        parts = [regions(mask, anomaly_map) for mask, anomaly_map in zip(masks, maps, strict=True)]
        values = np.empty(sum(one.size for one in maps), np.float32)
        np.concatenate([np.empty(0, np.float32), *map(np.ravel, maps)], out=values, casting="same_kind")
        values.sort()
        pixels = Curve.of(
            Ranking(values),
            np.concatenate([np.empty(0, np.float32), *(part.values for part in parts)]),
            weights=np.concatenate([np.empty(0), *(part.weights for part in parts)]),
        )
    return figures_of(image_curve(labels, scores), pixels)


def thresholds_of(lowest: np.float32, highest: np.float32) -> Values:
    """Those of the published PRO, rising, in single precision; none where their step is no number.

    The authors' are in double precision. The highest single at or below one compares with every score as that does.
    """
    with np.errstate(over="ignore"):
        step = (highest - lowest) / np.float32(THRESHOLDS)
    if not 0 < step < math.inf:
        return np.empty(0, np.float32)
    # Step and first sum in single precision and the rest in double, as there: what numpy makes of these types.
    exact = np.arange(lowest, highest, step, dtype=np.float64)
    rounded = exact.astype(np.float32)
    return np.where(rounded > exact, np.nextafter(rounded, -np.inf, dtype=np.float32), rounded)


@dataclass(frozen=True)
class Ranking:
    """Scores of everything, rising; ``below[i]`` members come before the ``i``-th, or ``i`` if not given.

    ``extremes`` are the lowest and the highest score where ``values`` are those of bins.
    """

    values: Values
    below: Counts | None = None
    extremes: tuple[np.float32, np.float32] | None = None

    @property
    def lowest(self) -> np.float32:
        """The lowest score."""
        return np.float32(self.values[0]) if self.extremes is None else self.extremes[0]

    @property
    def highest(self) -> np.float32:
        """The highest score."""
        return np.float32(self.values[-1]) if self.extremes is None else self.extremes[1]

    @property
    def total(self) -> int:
        """Number of members."""
        return self.values.size if self.below is None else int(self.below[-1])

    def at_or_above(self, thresholds: Values) -> Counts:
        """Number of members at or above each threshold."""
        return self._from(np.searchsorted(self.values, thresholds, side="left"))

    def above(self, thresholds: Values) -> Counts:
        """Number of members above each threshold."""
        return self._from(np.searchsorted(self.values, thresholds, side="right"))

    def _from(self, positions: NDArray[np.intp]) -> Counts:
        return self.total - (positions if self.below is None else self.below[positions])


@dataclass(frozen=True)
class Curve:
    """What lies at or above each distinct anomalous score, which fall; arrays of length ``n + 1`` start with nothing.

    Attributes:
        everything: All scores, normal ones among them.
        thresholds: ``(n,)`` distinct anomalous scores, falling.
        hits: ``(n + 1,)`` anomalous ones at or above.
        overlap: ``(n + 1,)`` mean share of a region at or above.
        false_above: ``(n,)`` normal ones above.
        false_from: ``(n,)`` normal ones at or above.
    """

    everything: Ranking
    thresholds: Values
    hits: Counts
    overlap: NDArray[np.float64]
    false_above: Counts
    false_from: Counts

    @classmethod
    def of(
        cls,
        everything: Ranking,
        anomalous: Values,
        counts: NDArray[Any] | None = None,
        weights: NDArray[np.float64] | None = None,
    ) -> Curve | None:
        """None unless there are normal and anomalous members; without weights, every member is a region."""
        counts = np.ones(anomalous.size) if counts is None else counts
        if not 0 < counts.sum() < everything.total:
            return None
        order = np.argsort(anomalous)[::-1]
        falling = anomalous[order]
        ends = np.append(starts_of(falling)[1:], falling.size)
        thresholds = falling[ends - 1]
        hits = rising_sums(counts[order])[np.append(0, ends)]
        overlap = np.append(0.0, np.cumsum((counts if weights is None else weights)[order])[ends - 1])
        return cls(
            everything=everything,
            thresholds=thresholds,
            hits=hits,
            overlap=overlap / overlap[-1],  # the shares of a region add up to one
            false_above=everything.above(thresholds) - hits[:-1],
            false_from=everything.at_or_above(thresholds) - hits[1:],
        )

    @property
    def normals(self) -> int:
        """Number of normal members."""
        return self.everything.total - int(self.hits[-1])

    def auroc(self) -> float:
        """Area under the ROC curve."""
        return self._area(self.hits / self.hits[-1], 1.0)

    def f1_max(self) -> float:
        """Highest F1 score."""
        hits = self.hits[1:]
        return float(np.max(2 * hits / (hits[-1] + hits + self.false_from)))

    def average_precision(self) -> float:
        """Average precision."""
        hits = self.hits[1:]
        return float(np.sum(np.diff(self.hits) * (hits / (hits + self.false_from))) / hits[-1])

    def exact_overlap(self) -> float:
        """Area under the per-region overlap over every threshold."""
        return self._area(self.overlap, RATE_LIMIT) / RATE_LIMIT

    def published_overlap(self) -> float:
        """PRO by the authors' protocol (their ``test.py``, ``cal_pro_score``), NaN where that fails."""
        thresholds = thresholds_of(self.everything.lowest, self.everything.highest)
        above = np.searchsorted(-self.thresholds, -thresholds, side="left")
        rates = (self.everything.above(thresholds) - self.hits[above]) / self.normals
        return stretched_area(rates, self.overlap[above])

    def _area(self, heights: NDArray[np.float64], limit: float) -> float:
        """Area under heights over false-positive rates up to a limit."""
        # Level while only normal ones come in, then up to the next height, slanting where both come in at once.
        rates = np.stack([self.false_above, self.false_from], axis=1).ravel() / self.normals
        rates = np.concatenate([[0.0], rates, [1.0]])
        heights = np.repeat(heights, 2)
        inside = int(np.searchsorted(rates, limit, side="right"))
        if inside < rates.size:
            share = (limit - rates[inside - 1]) / (rates[inside] - rates[inside - 1])
            last = heights[inside - 1] + share * (heights[inside] - heights[inside - 1])
            rates, heights = np.append(rates[:inside], limit), np.append(heights[:inside], last)
        return float(trapezoid(heights, rates))


class Regions(NamedTuple):
    """Scores of an image's anomalous pixels, and for each one over the area of its region."""

    values: Values
    weights: NDArray[np.float64]


def regions(mask: NDArray[Any], anomaly_map: NDArray[Any]) -> Regions:
    """Regions are 8-connected, as in scikit-image and anomalib."""
    mask = mask.astype(bool, copy=False)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return Regions(np.empty(0, np.float32), np.empty(0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside = mask[window]
    regions = ndimage.label(inside, EIGHT_NEIGHBOURS)[0][inside]
    weights = 1.0 / np.maximum(np.bincount(regions), 1)
    return Regions(anomaly_map[window][inside].astype(np.float32, copy=False), weights[regions])


def image_curve(labels: NDArray[np.bool_], scores: Values) -> Curve | None:
    """The curve of image scores."""
    return Curve.of(Ranking(np.sort(scores)), scores[labels])


def figures_of(images: Curve | None, pixels: Curve | None) -> dict[str, float]:
    """A value for each of ``METRICS``."""
    figures = dict.fromkeys(METRICS, math.nan)
    for name, curve in (("image", images), ("pixel", pixels)):
        if curve is not None:
            figures[f"{name}_auroc"] = curve.auroc()
            figures[f"{name}_f1_max"] = curve.f1_max()
            figures[f"{name}_ap"] = figures[f"{name}_aupr"] = curve.average_precision()
    if pixels is not None:
        figures["aupro"], figures["aupro_exact"] = pixels.published_overlap(), pixels.exact_overlap()
    image, pixel = figures["image_f1_max"], figures["pixel_f1_max"]
    return figures | {"challenge_f1_max": 2 * image * pixel / (image + pixel)}


def stretched_area(rates: NDArray[np.float64], overlap: NDArray[np.float64]) -> float:
    """Area under the overlap over falling false-positive rates below the limit, stretched to [0, 1]; else NaN."""
    kept = rates < RATE_LIMIT
    rates, overlap = rates[kept], overlap[kept]
    if not rates.size or rates.max() == rates.min():
        return math.nan
    return -float(trapezoid(overlap, (rates - rates.min()) / (rates.max() - rates.min())))


def rising_sums(counts: NDArray[Any]) -> Counts:
    """``(n + 1,)`` sums of the first counts, from none on."""
    return np.append(0, np.cumsum(counts, dtype=np.int64))


def starts_of(ordered: NDArray[Any]) -> NDArray[np.intp]:
    """Where each run of equal values starts."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
