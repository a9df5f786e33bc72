"""The few-shot score: how text probability and anomaly map become one number (arXiv:2305.17382, sec. 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..running import FullPrecision

# From text probability and map statistic, both ``(B,)`` and the latter scaled by its bounds, to the score ``(B,)``.
# A fusion must not decrease in either of them.
Fusion = Callable[[Tensor, Tensor], Tensor]

# By the name that `score_fusion` takes.
FUSIONS: dict[str, Fusion] = {
    "mean": lambda text, statistic: 0.5 * (text + statistic),  # the published few-shot score
    "text": lambda text, _: text,  # the zero-shot score, also where there are references
    "map": lambda _, statistic: statistic,
}


def map_statistic(anomaly_map: Tensor, top_share: float = 0.0) -> Tensor:
    """The number ``(B,)`` that stands for a map ``(B, H, W)`` in the score of its image.

    It is the mean of the highest pixels, ``top_share`` of them all and at least one; the maximum for a share of 0.
    """
    pixels = anomaly_map.flatten(1)
    if not top_share:
        return pixels.amax(dim=1)
    return pixels.topk(max(1, round(top_share * pixels.shape[1])), dim=1).values.mean(dim=1)


def check_top_share(top_share: float) -> None:
    """Raise an error that names the argument unless it is a share."""
    expected = "a share of the map in [0, 1], or 0 for its maximum"
    if not 0.0 <= check_number("top_share", top_share, expected) <= 1.0:
        msg = f"`top_share` must be {expected}, got {top_share}."
        raise ValueError(msg)


class ScoreFusion(FullPrecision):
    """Fuses scores by class, with the bounds between which the map statistic is scaled.

    The authors take the bounds from all test images of a class. Here they are buffers, learned in validation or from
    held-out references, so that an image can be scored alone. The rule is the name of one of ``FUSIONS``.
    """

    def __init__(self, rule: str = "mean", top_share: float = 0.0) -> None:
        super().__init__()
        check_choice("score_fusion", rule, FUSIONS)
        check_top_share(top_share)
        self.rule, self.top_share = rule, top_share
        self.register_buffer("low", torch.zeros(1))
        self.register_buffer("high", torch.ones(1))
        self.low: Tensor
        self.high: Tensor

    def statistic(self, anomaly_map: Tensor) -> Tensor:
        """The number ``(B,)`` that stands for each map ``(B, H, W)``."""
        return map_statistic(anomaly_map, self.top_share)

    def forward(self, text_probability: Tensor, statistic: Tensor, rows: Tensor | None = None) -> Tensor:
        """Few-shot scores ``(B,)``, within ``[0, 1]`` where the raw statistic ``(B,)`` is within its bounds.

        ``rows`` ``(B,)`` is the class of each image, ``None`` where there is one class.
        """
        bounds = (self.low, self.high) if rows is None else (self.low[rows], self.high[rows])
        return self.between(bounds, text_probability, statistic)

    def between(self, bounds: tuple[Tensor, Tensor], text_probability: Tensor, statistic: Tensor) -> Tensor:
        """Few-shot scores ``(B,)`` of a raw statistic ``(B,)`` between these bounds, ``(B,)`` or ``(1,)``."""
        low, high = bounds
        span = torch.where(high == low, torch.ones_like(high), high - low)
        return FUSIONS[self.rule](text_probability, (statistic - low) / span)

    def set_rows(self, kept: Sequence[int | None], map_limit: float) -> None:
        """Have bounds for as many classes: those of the rows named here, else from 0 to ``map_limit``."""
        low = [self.low.new_zeros(()) if row is None else self.low[row] for row in kept]
        high = [self.high.new_tensor(map_limit) if row is None else self.high[row] for row in kept]
        self.low, self.high = torch.stack(low), torch.stack(high)

    def range(self, map_ceiling: float, bounds: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Lowest and highest score that a map in ``[0, map_ceiling]`` can lead to, for each of some bounds.

        These are those of all classes where none are given.
        """
        bounds = (self.low, self.high) if bounds is None else bounds
        zeros = torch.zeros_like(bounds[0])
        return self.between(bounds, zeros, zeros), self.between(bounds, zeros + 1.0, zeros + map_ceiling)
