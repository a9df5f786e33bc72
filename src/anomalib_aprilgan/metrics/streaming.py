"""All metrics in one pass and bounded memory, with a bound on their error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from .bins import Bins, keys_of
from .bounds import Bounds
from .exact import METRICS, Curve, Ranking, figures_of, image_curve, regions, rising_sums
from .inputs import Arrays, checked_images, checked_pixels

# At most so many bins of scores; twice as many pixels are sorted at once and joined to them.
MOST_BINS = 2**20
PIXELS_AT_ONCE = 2**21
PROMISED = 1e-4
"""Error from which on ``StreamingMetrics.compute`` warns."""


class Counting(Metric):
    """Base of metrics of any number of images in bounded memory.

    Distinct pixel scores are counted, not kept. Figures of up to a million distinct ones are exact. Of more, those
    are counted together that weigh least: few pixels, low in the ranking. ``bounds`` tells how far each figure can
    be off. Image scores are kept.

    Args:
        arguments: Of ``torchmetrics.Metric``.
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

    def __init__(self, **arguments: object) -> None:
        super().__init__(compute_with_cache=False, **arguments)
        # Counted are those of `Bins`; what waits for it is single scores, and those of anomalous pixels with their
        # shares of a region.
        counted, waiting = ("pixels", "anomalous", "shares"), ("waiting", "waiting_anomalous", "waiting_shares")
        for name in (*counted, *waiting, "labels", "scores"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self.add_state("extremes", torch.tensor([-math.inf, -math.inf]), dist_reduce_fx="max")  # -lowest, highest
        self.add_state("with_pixels", torch.tensor(0), dist_reduce_fx="max")
        self.add_state("without_pixels", torch.tensor(0), dist_reduce_fx="max")

    def count(self, masks: ArrayLike | None, maps: ArrayLike | None, labels: ArrayLike, scores: ArrayLike) -> None:
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
            for mask, anomaly_map in zip(
                *checked_pixels(_arrays(masks), _arrays(maps), len(given_labels)), strict=True
            ):
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

    def bounds(self, scores: ArrayLike | None = None) -> dict[str, float]:
        """How far each of ``METRICS`` can be off, from the counts per bin; 0 for one that is exact or does not exist.

        Args:
            scores: As in ``StreamingMetrics.compute``.
        """
        bounds = dict.fromkeys(METRICS, 0.0)
        bins = self._bins()
        if bins is None or not bins.shifts.any() or not 0 < bins.anomalous.sum() < bins.pixels.sum():
            return bounds
        bounds |= Bounds(bins).by_name(*self._extremes())
        figures = self.figures(scores)
        image, pixel = figures["image_f1_max"], figures["pixel_f1_max"] + bounds["pixel_f1_max"]
        if not math.isnan(image):
            bounds["challenge_f1_max"] = 2 * image * pixel / (image + pixel) - figures["challenge_f1_max"]
        return {name: float(bound) for name, bound in bounds.items()}

    def figures(self, scores: ArrayLike | None = None) -> dict[str, float]:
        """A value for each of ``METRICS``; scores and errors as in ``StreamingMetrics.compute``."""
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

    def warned(self, figures: dict[str, float], scores: ArrayLike | None = None) -> dict[str, float]:
        """The same figures; warns where one of them may be off by more than ``PROMISED``."""
        bounds = self.bounds(scores)
        doubtful = {name: bounds[name] for name in figures if bounds[name] > PROMISED}
        if doubtful:
            named = ", ".join(f"{name} ± {bound:.1g}" for name, bound in doubtful.items())
            warnings.warn(
                f"Streaming metrics may be off by more than {PROMISED:g}: {named}. Take the exact ones.", stacklevel=4
            )
        return figures

    def _extremes(self) -> tuple[np.float32, np.float32]:
        lowest, highest = self.extremes.float().tolist()
        return np.float32(-lowest), np.float32(highest)

    def _bins(self) -> Bins | None:
        """All that was counted, of all processes where they were gathered; none without pixels."""
        if not bool(self.with_pixels):
            return None
        self._count_waiting()
        return self._counted()

    def _counted(self) -> Bins:
        return Bins.of(*(_array(dim_zero_cat(given)) for given in (self.pixels, self.anomalous, self.shares)))

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
        bins = (self._counted() if len(self.pixels) else Bins.none()).joined(
            keys_of(values), keys_of(anomalous), shares
        )
        if len(bins.keys) > MOST_BINS:
            bins = bins.coarsened(3 * MOST_BINS // 4)
        has = bins.anomalous > 0
        self.pixels, self.anomalous, self.shares = [], [], []
        self._keep("pixels", np.stack([bins.keys, bins.shifts, bins.pixels], axis=1))
        self._keep("anomalous", np.stack([bins.keys[has], bins.anomalous[has]], axis=1))
        self._keep("shares", bins.shares[has])

    def _keep(self, state: str, values: NDArray[Any]) -> None:
        getattr(self, state).append(torch.from_numpy(values).to(self.device))


class StreamingMetrics(Counting):
    """All metrics of any number of images in bounded memory; see ``Counting``."""

    def update(self, masks: ArrayLike | None, maps: ArrayLike | None, labels: ArrayLike, scores: ArrayLike) -> None:
        """Add a batch; arguments and errors as in ``Counting.count``."""
        self.count(masks, maps, labels, scores)

    def compute(self, scores: ArrayLike | None = None) -> dict[str, float]:
        """Metrics of all batches so far; warns where a figure may be off by more than ``PROMISED``.

        Args:
            scores: ``(N,)``, in place of those that came with the batches, for scores that are known at the end
                alone (fused ones, whose bounds are those of all maps).

        Returns:
            A value for each of ``METRICS``, NaN where it does not exist.

        Raises:
            RuntimeError: There was no batch.
            ValueError: ``scores`` are not finite or not one for each image.
        """
        return self.warned(self.figures(scores), scores)


def _array(given: ArrayLike | Tensor) -> NDArray[Any]:
    """The same as numpy has it."""
    return given.detach().as_subclass(Tensor).cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)


def _arrays(given: ArrayLike | Tensor | Sequence[NDArray[Any]]) -> Arrays:
    """The same as one array, or as one for each image where their sizes differ."""
    return [_array(one) for one in given] if isinstance(given, list) else _array(given)
