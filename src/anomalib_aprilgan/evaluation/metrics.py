"""The metrics of the paper and anomalib's beside them, exact or in bounded memory.

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
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage  # type: ignore[import-untyped]  # its stubs are a package of their own

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
# Of the streaming form: at most two million distinct scores; twice as many pixels are sorted at once, to make up
# for joining them to what is there.
DISTINCT_SCORES = 2**21
PIXELS_AT_ONCE = 2**22

Values = NDArray[np.floating[Any]]
Counts = NDArray[np.int64]
Keys = NDArray[np.uint32]


def measure(
    masks: NDArray[Any] | None, maps: NDArray[Any] | None, labels: NDArray[Any], scores: NDArray[Any]
) -> dict[str, float]:
    """All metrics, exact.

    Args:
        masks: ``(N, H, W)``, 1 for an anomalous pixel; none if there are no pixel labels.
        maps: ``(N, H, W)``, compared in single precision; a memory map or a tensor works as well.
        labels: ``(N,)``, 1 for an anomalous image.
        scores: ``(N,)``, higher for more anomalous.

    Returns:
        A value for each of ``METRICS``, NaN where it does not exist.

    Raises:
        ValueError: Shapes differ, a score is not finite, or a label is neither 0 nor 1.
    """
    labels, scores = _checked_images(labels, scores)
    pixels = None
    if masks is not None and maps is not None:
        masks, maps = _checked_pixels(masks, maps, len(labels))
        parts = [_regions(mask, anomaly_map) for mask, anomaly_map in zip(masks, maps, strict=True)]
        values = np.array(maps, dtype=np.float32).ravel()
        values.sort()
        pixels = _Curve.of(
            _Ranking(values),
            np.concatenate([np.empty(0, np.float32), *(part.values for part in parts)]),
            weights=np.concatenate([np.empty(0), *(part.weights for part in parts)]),
        )
    return _figures(_image_curve(labels, scores), pixels)


class StreamingMetrics:
    """All metrics of any number of images in bounded memory, in one pass.

    Distinct pixel scores are counted, not kept; figures of up to two million are exact. Of more, scores that share
    their leading bits are counted together, as few as that takes, and figures are off by some 1e-6. Beyond 1e-4 they
    are off only in odd cases: scores over dozens of orders of magnitude of which many anomalous ones are all but
    equal, or a threshold of ``aupro`` with a false-positive rate of 0.3 almost exactly, which is kept or not. Image
    scores are kept.
    """

    def __init__(self) -> None:
        self._images: list[tuple[NDArray[np.bool_], Values]] = []
        self._has_pixels: bool | None = None
        self._shift = 0
        self._all = _Tally.empty(columns=1)
        self._anomalous = _Tally.empty(columns=2)  # pixels, and their shares of regions
        self._waiting: list[Values] = []
        self._waiting_regions: list[_Regions] = []
        self._waiting_pixels = 0
        self._lowest, self._highest = math.inf, -math.inf

    def update(
        self, masks: NDArray[Any] | None, maps: NDArray[Any] | None, labels: NDArray[Any], scores: NDArray[Any]
    ) -> None:
        """Add a batch.

        Args:
            masks: ``(B, H, W)``, 1 for an anomalous pixel; none if no batch has pixel labels.
            maps: ``(B, H, W)``, compared in single precision; copied.
            labels: ``(B,)``, 1 for an anomalous image.
            scores: ``(B,)``, higher for more anomalous.

        Raises:
            ValueError: Shapes differ, a score is not finite, a label is neither 0 nor 1, or only some batches
                have masks and maps. Nothing of the batch is counted then.
        """
        labels, scores = _checked_images(labels, scores)
        has_pixels = masks is not None and maps is not None
        if self._has_pixels not in {None, has_pixels}:
            state = "without" if self._has_pixels is False else "with"
            msg = (
                f"`masks` and `maps` must come with every batch or with none: earlier ones came {state} them, "
                "this one did not do the same. Use one StreamingMetrics for each kind."
            )
            raise ValueError(msg)
        if masks is not None and maps is not None:
            masks, maps = _checked_pixels(masks, maps, len(labels))
            for mask, anomaly_map in zip(masks, maps, strict=True):
                self._add(mask, anomaly_map)
        self._has_pixels = has_pixels
        self._images.append((labels.copy(), scores.copy()))

    def compute(self, scores: Values | None = None) -> dict[str, float]:
        """Metrics of all batches so far.

        Args:
            scores: ``(N,)``, in place of those that came with the batches, for scores that are known at the end
                alone (fused ones, whose bounds are those of all maps).

        Returns:
            A value for each of ``METRICS``, NaN where it does not exist.

        Raises:
            RuntimeError: There was no batch.
            ValueError: ``scores`` are not finite or not one for each image.
        """
        if not self._images:
            msg = "There is nothing to measure yet: call `StreamingMetrics.update` first."
            raise RuntimeError(msg)
        pixels = None
        if self._has_pixels:
            self._count_waiting()
            pixels = _Curve.of(
                _Ranking(self._scores(self._all.keys), _rising_sums(self._all.sums[0])),
                self._scores(self._anomalous.keys),
                counts=self._anomalous.sums[0],
                weights=self._anomalous.sums[1],
            )
        labels, given = (np.concatenate(parts) for parts in zip(*self._images, strict=True))
        labels, scores = _checked_images(labels, given if scores is None else scores)
        return _figures(_image_curve(labels, scores), pixels)

    def _add(self, mask: NDArray[Any], anomaly_map: NDArray[Any]) -> None:
        values = np.array(anomaly_map, dtype=np.float32).ravel()
        self._waiting.append(values)
        self._waiting_regions.append(_regions(mask, anomaly_map))
        self._waiting_pixels += values.size
        if self._waiting_pixels >= PIXELS_AT_ONCE:
            self._count_waiting()

    def _count_waiting(self) -> None:
        if not self._waiting:
            return
        values = np.concatenate(self._waiting)
        regions = [np.concatenate(parts) for parts in zip(*self._waiting_regions, strict=True)]
        self._waiting, self._waiting_regions, self._waiting_pixels = [], [], 0
        values.sort()
        self._lowest, self._highest = min(self._lowest, float(values[0])), max(self._highest, float(values[-1]))
        keys = _keys(values) >> np.uint32(self._shift)
        starts = _starts(keys)
        counts = np.diff(starts, append=keys.size)
        self._all = self._all.joined(keys[starts], counts[None])
        keys = _keys(regions[0]) >> np.uint32(self._shift)
        self._anomalous = self._anomalous.joined(keys, np.stack([np.ones(keys.size), regions[1]]))
        while max(self._all.keys.size, self._anomalous.keys.size) > DISTINCT_SCORES:
            self._shift += 1
            self._all, self._anomalous = self._all.coarser(), self._anomalous.coarser()

    def _scores(self, keys: Keys) -> Values:
        scores = _values(keys << np.uint32(self._shift))  # the lowest that shares the bits
        # PRO's thresholds are laid from end to end, and maps often have many pixels at either, say 0 and 1.
        scores[keys == self._all.keys[:1]] = self._lowest
        scores[keys == self._all.keys[-1:]] = self._highest
        return scores


@dataclass(frozen=True)
class _Tally:
    """Sums by distinct key, keys rising: ``keys`` is ``(n,)``, ``sums`` ``(columns, n)``."""

    keys: Keys
    sums: NDArray[np.float64]

    @classmethod
    def empty(cls, columns: int) -> _Tally:
        return cls(np.empty(0, np.uint32), np.empty((columns, 0)))

    @classmethod
    def of(cls, keys: Keys, sums: NDArray[Any]) -> _Tally:
        """Of keys in any order, repeated or not."""
        if not keys.size:
            return cls(keys, sums)
        order = np.argsort(keys, kind="stable")  # two runs that rise are merged, not sorted
        keys = keys[order]
        starts = _starts(keys)
        return cls(keys[starts], np.stack([np.add.reduceat(column[order], starts) for column in sums]))

    def joined(self, keys: Keys, sums: NDArray[Any]) -> _Tally:
        return _Tally.of(np.concatenate([self.keys, keys]), np.concatenate([self.sums, sums], axis=1))

    def coarser(self) -> _Tally:
        return _Tally.of(self.keys >> np.uint32(1), self.sums)


@dataclass(frozen=True)
class _Ranking:
    """Scores of everything, rising; ``below[i]`` members come before the ``i``-th, or ``i`` if not given."""

    values: Values
    below: Counts | None = None

    @property
    def total(self) -> int:
        return self.values.size if self.below is None else int(self.below[-1])

    def at_or_above(self, thresholds: Values) -> Counts:
        return self._from(np.searchsorted(self.values, thresholds, side="left"))

    def above(self, thresholds: Values) -> Counts:
        return self._from(np.searchsorted(self.values, thresholds, side="right"))

    def _from(self, positions: NDArray[np.intp]) -> Counts:
        return self.total - (positions if self.below is None else self.below[positions])


@dataclass(frozen=True)
class _Curve:
    """What lies at or above each distinct anomalous score, which fall; arrays of length ``n + 1`` start with nothing.

    Attributes:
        everything: All scores, normal ones among them.
        thresholds: ``(n,)`` distinct anomalous scores, falling.
        hits: ``(n + 1,)`` anomalous ones at or above.
        overlap: ``(n + 1,)`` mean share of a region at or above.
        false_above: ``(n,)`` normal ones above.
        false_from: ``(n,)`` normal ones at or above.
    """

    everything: _Ranking
    thresholds: Values
    hits: Counts
    overlap: NDArray[np.float64]
    false_above: Counts
    false_from: Counts

    @classmethod
    def of(
        cls,
        everything: _Ranking,
        anomalous: Values,
        counts: NDArray[Any] | None = None,
        weights: NDArray[np.float64] | None = None,
    ) -> _Curve | None:
        """None unless there are normal and anomalous members; without weights, every member is a region."""
        counts = np.ones(anomalous.size) if counts is None else counts
        if not 0 < counts.sum() < everything.total:
            return None
        order = np.argsort(anomalous)[::-1]
        falling = anomalous[order]
        ends = np.append(_starts(falling)[1:], falling.size)
        thresholds = falling[ends - 1]
        hits = _rising_sums(counts[order])[np.append(0, ends)]
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
        return self.everything.total - int(self.hits[-1])

    def auroc(self) -> float:
        return self._area(self.hits / self.hits[-1], 1.0)

    def f1_max(self) -> float:
        hits = self.hits[1:]
        return float(np.max(2 * hits / (hits[-1] + hits + self.false_from)))

    def average_precision(self) -> float:
        hits = self.hits[1:]
        return float(np.sum(np.diff(self.hits) * (hits / (hits + self.false_from))) / hits[-1])

    def exact_overlap(self) -> float:
        return self._area(self.overlap, RATE_LIMIT) / RATE_LIMIT

    def published_overlap(self) -> float:
        """PRO by the authors' protocol (their ``test.py``, ``cal_pro_score``), NaN where that fails."""
        lowest, highest = self.everything.values[[0, -1]]
        with np.errstate(over="ignore"):
            step = (highest - lowest) / np.float32(THRESHOLDS)
        if not 0 < step < math.inf:
            return math.nan
        # Step and first sum in single precision and the rest in double, as there: what numpy makes of these types.
        exact = np.arange(lowest, highest, step, dtype=np.float64)
        # The highest score at or below a threshold compares with every score as the threshold does.
        thresholds = exact.astype(self.everything.values.dtype)
        thresholds = np.where(thresholds > exact, np.nextafter(thresholds, -np.inf, dtype=thresholds.dtype), thresholds)
        above = np.searchsorted(-self.thresholds, -thresholds, side="left")
        rates = (self.everything.above(thresholds) - self.hits[above]) / self.normals
        kept = rates < RATE_LIMIT
        rates, overlap = rates[kept], self.overlap[above][kept]
        if not rates.size or rates.max() == rates.min():
            return math.nan
        return -_trapezoid((rates - rates.min()) / (rates.max() - rates.min()), overlap)  # thresholds rise, rates fall

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
        return _trapezoid(rates, heights)


class _Regions(NamedTuple):
    """Scores of an image's anomalous pixels, and for each one over the area of its region."""

    values: Values
    weights: NDArray[np.float64]


def _regions(mask: NDArray[Any], anomaly_map: NDArray[Any]) -> _Regions:
    """Regions are 8-connected, as in scikit-image and anomalib."""
    mask = mask.astype(bool, copy=False)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return _Regions(np.empty(0, np.float32), np.empty(0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside = mask[window]
    regions = ndimage.label(inside, EIGHT_NEIGHBOURS)[0][inside]
    weights = 1.0 / np.maximum(np.bincount(regions), 1)
    return _Regions(anomaly_map[window][inside].astype(np.float32, copy=False), weights[regions])


def _image_curve(labels: NDArray[np.bool_], scores: Values) -> _Curve | None:
    return _Curve.of(_Ranking(np.sort(scores)), scores[labels])


def _figures(images: _Curve | None, pixels: _Curve | None) -> dict[str, float]:
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


def _trapezoid(places: NDArray[np.float64], heights: NDArray[np.float64]) -> float:
    return float(np.sum(np.diff(places) * (heights[1:] + heights[:-1])) / 2)


def _rising_sums(counts: NDArray[Any]) -> Counts:
    return np.append(0, np.cumsum(counts, dtype=np.int64))


def _starts(ordered: NDArray[Any]) -> NDArray[np.intp]:
    """Where each run of equal values starts."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _keys(values: Values) -> Keys:
    """Bits of single-precision scores, turned so that they rise with the scores; both zeros get one key."""
    bits = (values + np.float32(0)).view(np.uint32)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))


def _values(keys: Keys) -> Values:
    return np.where(keys >> np.uint32(31), keys & np.uint32(2**31 - 1), ~keys).view(np.float32)


def _checked_images(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], Values]:
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    for name, given in (("labels", labels), ("scores", scores)):
        if given.ndim != 1 or len(given) != len(labels):
            msg = f"`{name}` must have one value for each of the N images, got {_shapes(labels=labels, scores=scores)}."
            raise ValueError(msg)
    _check_binary("labels", labels, "pass 1 for an anomalous image and 0 for a normal one")
    _check_finite("scores", scores, "leave such images out or repair their scores")
    return labels.astype(bool), scores


def _checked_pixels(masks: ArrayLike, maps: ArrayLike, images: int) -> tuple[NDArray[Any], NDArray[Any]]:
    masks, maps = np.asarray(masks), np.asarray(maps)
    for name, given in (("masks", masks), ("maps", maps)):
        if given.ndim != 3 or given.shape[0] != images or 0 in given.shape[1:]:
            msg = f"`{name}` must be (N, H, W) for the N = {images} labels, got shape {given.shape}: drop other axes."
            raise ValueError(msg)
    if masks.shape != maps.shape:
        msg = f"`masks` must have the shape of `maps`, got {_shapes(masks=masks, maps=maps)}: resize one of them."
        raise ValueError(msg)
    for index, (mask, anomaly_map) in enumerate(zip(masks, maps, strict=True)):  # of a memory map, one at a time
        _check_binary("masks", mask, f"in image {index}, divide by 255 or compare with a threshold")
        with np.errstate(over="ignore"):  # doubles beyond single precision become infinite and are found so
            _check_finite("maps", anomaly_map.astype(np.float32, copy=False), f"look at image {index}")
    return masks, maps


def _check_binary(name: str, given: NDArray[Any], remedy: str) -> None:
    if given.dtype != np.bool_:
        wrong = given[(given != 0) & (given != 1)]
        if wrong.size:
            msg = f"`{name}` must hold 0 and 1 alone, got {wrong.flat[0]}: {remedy}."
            raise ValueError(msg)


def _check_finite(name: str, given: Values, remedy: str) -> None:
    for extreme in (given.min(), given.max()) if given.size else ():  # both are NaN if any value is
        if not np.isfinite(extreme):
            msg = f"`{name}` must be finite numbers, got {extreme}: {remedy}."
            raise ValueError(msg)


def _shapes(**arrays: NDArray[Any]) -> str:
    return " and ".join(f"`{name}` {array.shape}" for name, array in arrays.items())
