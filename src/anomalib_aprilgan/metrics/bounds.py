"""How far figures of bins can be off from those of the scores in them."""

from __future__ import annotations

import math

import numpy as np

from .bins import Bins, Floats, keys_of
from .exact import RATE_LIMIT, stretched_area, thresholds_of


class Bounds:
    """How far figures of bins can be off from those of the scores in them, whatever their order in a bin is.

    Arrays go from the highest bin down; ``doubtful`` are bins of more than one score.
    """

    def __init__(self, bins: Bins) -> None:
        self.bins = bins
        self.hits, self.overlap = bins.anomalous[::-1], bins.shares[::-1] / bins.shares.sum()
        self.false = bins.pixels[::-1] - self.hits
        self.doubtful = bins.shifts[::-1] > 0
        self.hits_from, self.false_from = np.cumsum(self.hits), np.cumsum(self.false)
        self.hits_above, self.false_above = self.hits_from - self.hits, self.false_from - self.false
        self.positives, self.normals = int(self.hits_from[-1]), int(self.false_from[-1])

    def by_name(self, lowest: np.float32, highest: np.float32) -> dict[str, float]:
        """Bounds of the metrics of pixels."""
        precision = self._average_precision()
        return {
            "pixel_auroc": float(np.sum((self.hits * self.false)[self.doubtful])) / (2 * self.positives * self.normals),
            "pixel_f1_max": self._f1_max(),
            "pixel_ap": precision,
            "pixel_aupr": precision,
            "aupro": self._published_overlap(lowest, highest),
            "aupro_exact": self._exact_overlap(),
        }

    def _f1_max(self) -> float:
        """Edges of bins are thresholds too; in a bin, the best case is that its anomalous pixels come first."""
        reached = np.max((2 * self.hits_from / (self.positives + self.hits_from + self.false_from))[self.hits > 0])
        best = 2 * self.hits_from / (self.positives + self.hits_from + self.false_above)
        return float(max(0.0, np.max(best[self.doubtful], initial=0.0) - reached))

    def _average_precision(self) -> float:
        has = self.doubtful & (self.hits > 0)
        hits, before, found = self.hits[has], self.hits_above[has] + 1, self.hits_from[has]
        counted = found / (found + self.false_from[has])
        best = found / (found + self.false_above[has])
        worst = before / (before + self.false_from[has])
        return float(max(np.sum(hits * (best - counted)), np.sum(hits * (counted - worst)))) / self.positives

    def _exact_overlap(self) -> float:
        """In a bin the curve may run above or below the straight line through it."""
        limit = RATE_LIMIT * self.normals
        widths = np.clip(np.minimum(self.false_from, limit) - self.false_above, 0.0, None)
        halves = np.where(self.false_from > limit, 1.0, 0.5)  # of the bin that is cut, the end is not known either
        return float(np.sum((halves * widths * self.overlap)[self.doubtful])) / limit

    def _published_overlap(self, lowest: np.float32, highest: np.float32) -> float:
        """A threshold within a bin may leave any of its pixels above; one within the kept rates may be kept or not."""
        thresholds = thresholds_of(lowest, highest)
        keys, normal, overlap_of = keys_of(thresholds), self.false[::-1], self.overlap[::-1]
        last = np.searchsorted(self.bins.keys, keys, side="right") - 1  # of every threshold the bin at or below
        inside = (self.bins.shifts[last] > 0) & (keys < self.bins.lasts[last])
        false, overlaps = np.append(self.false_from[::-1], 0), np.append(np.cumsum(self.overlap)[::-1], 0.0)
        rates, overlap = false[last + 1] / self.normals, overlaps[last + 1]
        more_rates = np.where(inside, normal[last], 0.0) / self.normals
        more_overlap = np.where(inside, overlap_of[last], 0.0)
        found = stretched_area(rates, overlap)
        if not (more_rates.any() or more_overlap.any()):
            return 0.0
        first, latest = (int(np.argmax(some < RATE_LIMIT)) for some in (rates, rates + more_rates))
        if math.isnan(found) or not (rates + more_rates < RATE_LIMIT).any():
            return 1.0
        ends = [
            end
            for start in range(first, latest + 1)
            for end in _ends(rates[start:], overlap[start:], more_rates[start:], more_overlap[start:])
        ]
        return min(1.0, max(abs(end - found) for end in ends))


def _ends(rates: Floats, overlap: Floats, more_rates: Floats, more_overlap: Floats) -> tuple[float, float]:
    """The least and the most that the stretched area can be, of rates and overlaps that may be more by so much."""
    if len(rates) < 2:
        return -math.inf, math.inf
    steps, middle, doubt = -np.diff(rates), (overlap[1:] + overlap[:-1]) / 2, (more_overlap[1:] + more_overlap[:-1]) / 2
    area, width = float(np.sum(steps * middle)), float(rates[0] - rates[-1])
    change = np.abs(np.diff(middle)) + doubt[1:] + doubt[:-1]
    off = np.sum(steps * doubt) + np.sum(more_rates[1:-1] * change)
    off += more_rates[0] * (middle[0] + doubt[0]) + more_rates[-1] * (middle[-1] + doubt[-1])
    narrower = width - max(more_rates[0], more_rates[-1])
    wider = width + max(more_rates[0], more_rates[-1])
    if narrower <= 0:
        return -math.inf, math.inf
    return max(0.0, area - off) / wider, (area + off) / narrower
