"""Bootstrap over the test images: how much figures, and differences of figures, owe to which images were there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from scipy.stats import norm

from ..metrics import METRICS
from ..metrics.exact import RATE_LIMIT, regions, thresholds_of

Floats = NDArray[np.float64]
Samples = dict[str, NDArray[np.float32]]

_QUANTILES = 512
_AT_ONCE = 100
_LEVEL = 0.95


def bootstrap(
    labels: NDArray[np.bool_],
    scores: Floats,
    masks: Sequence[NDArray[np.bool_]] | None,
    maps: Sequence[NDArray[np.float32]] | None,
    number: int,
    seed: int,
) -> Samples:
    """Every metric of so many samples of the images, drawn with replacement, as many normal and anomalous as there are.

    Whoever draws from the same labels with the same seed draws the same images: differences are then paired. Pixels are
    counted in bins, 512 of about equal number and those between the thresholds of the published PRO.

    Args:
        labels: ``(N,)``.
        scores: ``(N,)``.
        masks: ``N`` arrays ``(H_i, W_i)``; none without metrics of pixels.
        maps: As ``masks``.
        number: Number of samples, ``B``.
        seed: Of the draws.

    Returns:
        For each of ``METRICS`` ``(B,)`` values; none for images of one label alone.
    """
    if labels.all() or not labels.any():
        return {}
    weights = _weights(labels, number, seed)
    falling = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[falling])), len(scores) - 1)
    images = _Curves(weights[:, falling] * labels[falling], weights[:, falling] * ~labels[falling], ends)
    found = {"image_auroc": images.auroc(), "image_f1_max": images.f1_max(), "image_ap": images.average_precision()}
    if masks is not None and maps is not None:
        found |= _of_pixels(weights, masks, maps)
        image, pixel = found["image_f1_max"], found["pixel_f1_max"]
        found["challenge_f1_max"] = 2 * image * pixel / (image + pixel)
    found |= {f"{name}r": values for name, values in found.items() if name.endswith("_ap")}
    named = {name.replace("_apr", "_aupr"): values.astype(np.float32) for name, values in found.items()}
    return {name: named[name] for name in METRICS if name in named}


def interval(samples: Floats) -> tuple[float, float]:
    """The middle 95 % of a figure's samples."""
    low, high = np.percentile(samples, [50 * (1 - _LEVEL), 50 * (1 + _LEVEL)])
    return float(low), float(high)


def p_value(difference: float, samples: Floats) -> float:
    """Two-sided, that a difference of two figures on the same images is 0: against its bootstrap deviation."""
    deviation = float(np.std(samples, ddof=1))
    if deviation == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * norm.sf(abs(difference) / deviation))


def _weights(labels: NDArray[np.bool_], number: int, seed: int) -> Floats:
    """``(B, N)`` how often each image is drawn."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((number, len(labels)))
    for label in (False, True):
        of_label = np.flatnonzero(labels == label)
        weights[:, of_label] = generator.multinomial(len(of_label), np.full(len(of_label), 1 / len(of_label)), number)
    return weights


class _Curves:
    """Curves of ``B`` samples over thresholds that fall, from the anomalous and normal ones in each step ``(B, T)``."""

    def __init__(self, hits: Floats, false: Floats, ends: NDArray[np.intp] | None = None) -> None:
        chosen = slice(None) if ends is None else ends
        start = np.zeros((len(hits), 1))
        self.hits = np.concatenate([start, np.cumsum(hits, axis=1)[:, chosen]], axis=1)
        self.false = np.concatenate([start, np.cumsum(false, axis=1)[:, chosen]], axis=1)
        self.rates = self.false / self.false[:, -1:]

    def auroc(self) -> Floats:
        area: Floats = trapezoid(self.hits / self.hits[:, -1:], self.rates, axis=1)
        return area

    def f1_max(self) -> Floats:
        best: Floats = (2 * self.hits / (self.hits[:, -1:] + self.hits + self.false)).max(axis=1)
        return best

    def average_precision(self) -> Floats:
        hits, false = self.hits[:, 1:], self.false[:, 1:]
        precision = hits / np.maximum(hits + false, 1e-12)
        found: Floats = (np.diff(self.hits, axis=1) * precision).sum(axis=1) / self.hits[:, -1]
        return found


def _of_pixels(
    weights: Floats, masks: Sequence[NDArray[np.bool_]], maps: Sequence[NDArray[np.float32]]
) -> dict[str, Floats]:
    thresholds = thresholds_of(min(one.min() for one in maps), max(one.max() for one in maps))
    sparse = np.concatenate([one.ravel()[:: max(1, one.size // 1024)] for one in maps])
    quantiles = np.quantile(sparse, np.linspace(0, 1, _QUANTILES + 1)[1:-1]).astype(np.float32)
    edges = np.unique(np.concatenate([thresholds, quantiles]))  # a bin is what lies above one edge and not the next
    counts = [_counted(mask, anomaly_map, edges) for mask, anomaly_map in zip(masks, maps, strict=True)]
    hits, false, shares = (np.stack(column)[:, ::-1] for column in zip(*counts, strict=True))
    at = len(edges) - np.searchsorted(edges, thresholds)  # steps from the top down to what lies above a threshold
    parts = [
        _figures(part, hits, false, shares, at) for part in np.array_split(weights, max(1, len(weights) // _AT_ONCE))
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _counted(mask: NDArray[np.bool_], anomaly_map: NDArray[np.float32], edges: NDArray[np.float32]) -> list[Floats]:
    """Of every bin the anomalous pixels, the normal ones and the shares of regions."""
    ends = np.searchsorted(np.sort(anomaly_map, axis=None), edges, side="right")  # pixels up to each edge
    everything = np.diff(np.concatenate([[0], ends, [anomaly_map.size]])).astype(np.float64)
    part, number = regions(mask, anomaly_map), len(edges) + 1
    places = np.searchsorted(edges, part.values)
    hits = np.bincount(places, minlength=number).astype(np.float64)
    return [hits, everything - hits, np.bincount(places, part.weights, number).astype(np.float64)]


def _figures(weights: Floats, hits: Floats, false: Floats, shares: Floats, at: NDArray[np.intp]) -> dict[str, Floats]:
    curves = _Curves(weights @ hits, weights @ false)
    overlap = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights @ shares, axis=1)], axis=1)
    overlap /= overlap[:, -1:]
    return {
        "pixel_auroc": curves.auroc(),
        "pixel_f1_max": curves.f1_max(),
        "pixel_ap": curves.average_precision(),
        "aupro": _published_overlap(curves.rates[:, at], overlap[:, at]),
        "aupro_exact": _exact_overlap(curves.rates, overlap),
    }


def _published_overlap(rates: Floats, overlap: Floats) -> Floats:
    """Of ``B`` samples over the published thresholds, over which rates fall."""
    kept = rates < RATE_LIMIT
    widths = -np.diff(rates, axis=1) * kept[:, :-1]
    area = (widths * (overlap[:, 1:] + overlap[:, :-1]) / 2).sum(axis=1)
    width = widths.sum(axis=1)
    found: Floats = np.divide(area, width, out=np.full(len(rates), math.nan), where=width > 0)
    return found


def _exact_overlap(rates: Floats, overlap: Floats) -> Floats:
    """Of ``B`` samples over all bins, over which rates rise: straight between them and up to the limit."""
    whole, cut = np.diff(rates, axis=1), np.diff(np.minimum(rates, RATE_LIMIT), axis=1)
    share = np.divide(cut, whole, out=np.zeros_like(cut), where=whole > 0)
    area: Floats = (cut * (overlap[:, :-1] + share * np.diff(overlap, axis=1) / 2)).sum(axis=1)
    return area / RATE_LIMIT
