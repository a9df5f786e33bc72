"""All metrics in one pass and bounded memory, with a bound on their error."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from .metrics import (
    METRICS,
    RATE_LIMIT,
    Curve,
    Ranking,
    checked_images,
    checked_pixels,
    figures_of,
    image_curve,
    regions,
    rising_sums,
    starts_of,
    stretched_area,
    thresholds_of,
)

# At most so many bins of scores; twice as many pixels are sorted at once and joined to them.
MOST_BINS = 2**20
PIXELS_AT_ONCE = 2**21
PROMISED = 1e-4
"""Error from which on :meth:`StreamingMetrics.compute` warns."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class StreamingMetrics(Metric):
    """All metrics of any number of images in bounded memory.

    Distinct pixel scores are counted, not kept. Figures of up to a million distinct ones are exact. Of more, those
    are counted together that weigh least: few pixels, low in the ranking. :meth:`bounds` tells how far each figure can
    be off. Image scores are kept.

    Args:
        arguments: Of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    pixels: list[Tensor]
    anomalous: list[Tensor]
    shares: list[Tensor]
    waiting: list[Tensor]
    waiting_anomalous: list[Tensor]
    waiting_shares: list[Tensor]
    labels: list[Tensor]
    scores: list[Tensor]
    extremes: Tensor
    with_pixels: Tensor
    without_pixels: Tensor

    def __init__(self, **arguments: Any) -> None:  # noqa: ANN401  # torchmetrics'
        super().__init__(compute_with_cache=False, **arguments)
        # Counted are those of `_Bins`; what waits for it is single scores, and those of anomalous pixels with their
        # shares of a region.
        counted, waiting = ("pixels", "anomalous", "shares"), ("waiting", "waiting_anomalous", "waiting_shares")
        for name in (*counted, *waiting, "labels", "scores"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.add_state("extremes", torch.tensor([-math.inf, -math.inf]), dist_reduce_fx="max")  # -lowest, highest
        self.add_state("with_pixels", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("without_pixels", torch.tensor(0), dist_reduce_fx="max")

    def update(self, masks: ArrayLike | None, maps: ArrayLike | None, labels: ArrayLike, scores: ArrayLike) -> None:
        """Add a batch.

        Args:
            masks: ``(B, H, W)``, or ``B`` arrays ``(H_i, W_i)``, 1 for an anomalous pixel; none if no batch has pixel
                labels.
            maps: As ``masks``, compared in single precision; copied.
            labels: ``(B,)``, 1 for an anomalous image.
            scores: ``(B,)``, higher for more anomalous.

        Raises:
            ValueError: Shapes differ, a score is not finite, a label is neither 0 nor 1, or only some batches
                have masks and maps. Nothing of the batch is counted then.
        """
        given_labels, given_scores = checked_images(_array(labels), _array(scores))
        has_pixels = masks is not None and maps is not None
        if bool(self.without_pixels if has_pixels else self.with_pixels):
            msg = (
                "`masks` and `maps` must come with every batch or with none: earlier ones came "
                f"{'without' if has_pixels else 'with'} them, this one did not do the same. Use one StreamingMetrics "
                "for each kind."
            )
            raise ValueError(msg)
        if masks is not None and maps is not None:
            for mask, anomaly_map in zip(*checked_pixels(_array(masks), _array(maps), len(given_labels)), strict=True):
                part = regions(mask, anomaly_map)
                self._keep("waiting", np.array(anomaly_map, dtype=np.float32).ravel())
                self._keep("waiting_anomalous", part.values)
                self._keep("waiting_shares", part.weights)
                if sum(len(values) for values in self.waiting) >= PIXELS_AT_ONCE:
                    self._count_waiting()
            self.with_pixels.fill_(1)
        else:
            self.without_pixels.fill_(1)
        self._keep("labels", given_labels.copy())
        self._keep("scores", given_scores.copy())

    def compute(self, scores: ArrayLike | None = None) -> dict[str, float]:
        """Metrics of all batches so far; warns where a figure may be off by more than :data:`PROMISED`.

        Args:
            scores: ``(N,)``, in place of those that came with the batches, for scores that are known at the end
                alone (fused ones, whose bounds are those of all maps).

        Returns:
            A value for each of ``METRICS``, NaN where it does not exist.

        Raises:
            RuntimeError: There was no batch.
            ValueError: ``scores`` are not finite or not one for each image.
        """
        figures = self._figures(scores)
        doubtful = {name: bound for name, bound in self.bounds(scores).items() if bound > PROMISED}
        if doubtful:
            named = ", ".join(f"{name} ± {bound:.1g}" for name, bound in doubtful.items())
            warnings.warn(
                f"Streaming metrics may be off by more than {PROMISED:g}: {named}. Take the exact ones.", stacklevel=3
            )
        return figures

    def bounds(self, scores: ArrayLike | None = None) -> dict[str, float]:
        """How far each of ``METRICS`` can be off, from the counts per bin; 0 for one that is exact or does not exist.

        Args:
            scores: As in :meth:`compute`.
        """
        bounds = dict.fromkeys(METRICS, 0.0)
        bins = self._bins()
        if bins is None or not bins.shifts.any() or not 0 < bins.anomalous.sum() < bins.pixels.sum():
            return bounds
        bounds |= _Bounds(bins).by_name(*self._extremes())
        figures = self._figures(scores)
        image, pixel = figures["image_f1_max"], figures["pixel_f1_max"] + bounds["pixel_f1_max"]
        if not math.isnan(image):
            bounds["challenge_f1_max"] = 2 * image * pixel / (image + pixel) - figures["challenge_f1_max"]
        return {name: float(bound) for name, bound in bounds.items()}

    def _figures(self, scores: ArrayLike | None) -> dict[str, float]:
        if not len(self.labels):
            msg = "There is nothing to measure yet: call `StreamingMetrics.update` first."
            raise RuntimeError(msg)
        pixels = None
        bins = self._bins()
        if bins is not None:
            has = bins.anomalous > 0
            pixels = Curve.of(
                Ranking(bins.values, rising_sums(bins.pixels), self._extremes()),
                bins.values[has],
                counts=bins.anomalous[has],
                weights=bins.shares[has],
            )
        labels, given = _array(dim_zero_cat(self.labels)), _array(dim_zero_cat(self.scores))
        return figures_of(image_curve(*checked_images(labels, given if scores is None else _array(scores))), pixels)

    def _extremes(self) -> tuple[np.float32, np.float32]:
        lowest, highest = self.extremes.float().tolist()
        return np.float32(-lowest), np.float32(highest)

    def _bins(self) -> _Bins | None:
        """All that was counted, of all processes where they were gathered; none without pixels."""
        if not bool(self.with_pixels):
            return None
        self._count_waiting()
        return self._counted()

    def _counted(self) -> _Bins:
        return _Bins.of(*(_array(dim_zero_cat(given)) for given in (self.pixels, self.anomalous, self.shares)))

    def _count_waiting(self) -> None:
        if not len(self.waiting):
            return
        values, anomalous, shares = (
            _array(dim_zero_cat(given)) for given in (self.waiting, self.waiting_anomalous, self.waiting_shares)
        )
        self.waiting, self.waiting_anomalous, self.waiting_shares = [], [], []
        values.sort()
        extremes = torch.tensor([-values[0], values[-1]], device=self.extremes.device)
        self.extremes = torch.maximum(self.extremes, extremes)
        bins = (self._counted() if len(self.pixels) else _Bins.none()).joined(_keys(values), _keys(anomalous), shares)
        if len(bins.keys) > MOST_BINS:
            bins = bins.coarsened(3 * MOST_BINS // 4)
        has = bins.anomalous > 0
        self.pixels, self.anomalous, self.shares = [], [], []
        self._keep("pixels", np.stack([bins.keys, bins.shifts, bins.pixels], axis=1))
        self._keep("anomalous", np.stack([bins.keys[has], bins.anomalous[has]], axis=1))
        self._keep("shares", bins.shares[has])

    def _keep(self, state: str, values: NDArray[Any]) -> None:
        getattr(self, state).append(torch.from_numpy(values).to(self.device))


@dataclass(frozen=True)
class _Bins:
    """Counts by intervals of scores, which rise.

    A score is known by its bits, turned so that they rise with it. An interval is all scores that share their leading
    bits: two of them lie in each other or apart.

    Attributes:
        keys: ``(n,)`` the lowest score of each, as bits.
        shifts: ``(n,)`` number of bits that its scores do not share; 0 for a single score.
        pixels: ``(n,)`` pixels in it.
        anomalous: ``(n,)`` anomalous ones.
        shares: ``(n,)`` the shares of regions that these are.
    """

    keys: Integers
    shifts: Integers
    pixels: Integers
    anomalous: Integers
    shares: Floats

    @classmethod
    def none(cls) -> _Bins:
        """Nothing counted yet."""
        nothing = np.empty(0, np.int64)
        return cls(nothing, nothing, nothing, nothing, np.empty(0))

    @classmethod
    def of(cls, pixels: Integers, anomalous: Integers, shares: Floats) -> _Bins:
        """Of columns ``(n, 3)``: keys, shifts and pixels, and ``(m, 2)``: keys and anomalous pixels, with their shares.

        The intervals may come in any order; what lies in another is added to it.
        """
        keys, shifts, counts = np.ascontiguousarray(pixels.T)
        if (keys[1:] < keys[:-1] + (1 << shifts[:-1])).any():
            order = np.argsort(keys << 6 | 63 - shifts, kind="stable")  # runs that rise are merged
            keys, shifts = keys[order], shifts[order]
            reached = np.maximum.accumulate(keys + (1 << shifts))
            starts = np.flatnonzero(np.append(True, keys[1:] >= reached[:-1]))
            keys, shifts, counts = keys[starts], shifts[starts], np.add.reduceat(counts[order], starts)
        bins = cls(keys, shifts, counts, np.zeros_like(keys), np.zeros(len(keys)))
        return bins.marked(anomalous[:, 0], anomalous[:, 1], shares)

    def marked(self, keys: Integers, counts: Integers | None, shares: Floats) -> _Bins:
        """With these anomalous pixels, which are counted as pixels already."""
        places = np.searchsorted(self.keys, keys, side="right") - 1
        number = len(self.keys)
        marked = np.bincount(places, counts, number).astype(np.int64)
        of_regions = np.bincount(places, shares, number)
        return replace(self, anomalous=self.anomalous + marked, shares=self.shares + of_regions)

    def joined(self, keys: Integers, anomalous: Integers, shares: Floats) -> _Bins:
        """With pixels of these scores, which rise, and of anomalous ones among them."""
        starts = starts_of(keys)
        counts, keys = np.diff(starts, append=keys.size), keys[starts]
        places = np.searchsorted(self.keys, keys, side="right")
        known = places > 0
        known[known] = keys[known] <= self.lasts[places[known] - 1]
        pixels = self.pixels.copy()
        np.add.at(pixels, places[known] - 1, counts[known])
        new, at = keys[~known], places[~known]
        joined = _Bins(
            keys=np.insert(self.keys, at, new),
            shifts=np.insert(self.shifts, at, 0),
            pixels=np.insert(pixels, at, counts[~known]),
            anomalous=np.insert(self.anomalous, at, 0),
            shares=np.insert(self.shares, at, 0.0),
        )
        return joined.marked(anomalous, None, shares)

    @property
    def values(self) -> NDArray[np.float32]:
        """``(n,)`` the lowest score of each interval."""
        return _values(self.keys)

    @property
    def lasts(self) -> Integers:
        """``(n,)`` the highest score of each interval, as bits."""
        return self.keys + (1 << self.shifts) - 1

    def coarsened(self, most: int) -> _Bins:
        """At most so many intervals: those are merged first that hold few pixels and lie low in the ranking."""
        bins = self
        while len(bins.keys) > most:
            bins = bins.merged(len(bins.keys) - most)
        return bins

    def merged(self, number: int) -> _Bins:
        """So many intervals fewer, or as few as one pass over them may leave."""
        # Bits that neighbours do not share. Where it is fewer than beside them, nothing else lies in what they share.
        levels = np.frexp((self.keys[:-1] ^ self.lasts[1:]).astype(np.float64))[1].astype(np.int64)
        padded = np.concatenate([[64], levels, [64]])
        places = np.flatnonzero((levels < padded[:-2]) & (levels < padded[2:]))
        rank = np.cumsum(self.pixels[::-1])[::-1]  # pixels at or above
        harm = (self.pixels[places] + self.pixels[places + 1]) ** 2 / rank[places]
        taken = min(number, (len(places) + 1) // 2)
        places = places[np.argpartition(harm, taken - 1)[:taken]]
        keys, shifts = self.keys.copy(), self.shifts.copy()
        keys[places], shifts[places] = keys[places] >> levels[places] << levels[places], levels[places]
        kept = np.ones(len(keys), dtype=bool)
        kept[places + 1] = False
        starts = np.flatnonzero(kept)
        pixels, anomalous = (np.add.reduceat(counts, starts) for counts in (self.pixels, self.anomalous))
        return _Bins(keys[kept], shifts[kept], pixels, anomalous, np.add.reduceat(self.shares, starts))


class _Bounds:
    """How far figures of bins can be off from those of the scores in them, whatever their order in a bin is.

    Arrays go from the highest bin down; ``doubtful`` are bins of more than one score.
    """

    def __init__(self, bins: _Bins) -> None:
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
        keys, normal, overlap_of = _keys(thresholds), self.false[::-1], self.overlap[::-1]
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


def _array(given: Any) -> Any:  # noqa: ANN401  # arrays, tensors or lists of either
    """The same as numpy has it."""
    if isinstance(given, list | tuple):
        return [_array(one) if np.ndim(one) else one for one in given]
    return given.detach().as_subclass(Tensor).cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)


def _keys(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Bits of single-precision scores, turned so that they rise with the scores; both zeros get one key."""
    bits = (values + np.float32(0)).view(np.uint32)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31)).astype(np.int64)


def _values(keys: NDArray[np.int64]) -> NDArray[np.float32]:
    bits = keys.astype(np.uint32)
    return np.where(bits >> np.uint32(31), bits & np.uint32(2**31 - 1), ~bits).view(np.float32)
