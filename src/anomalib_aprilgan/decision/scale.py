"""The scale on which 0.5 is the threshold: strictly increasing, whatever the bounds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Share of the scale that follows the whole possible range; the rest follows the bounds.
WHOLE_RANGE_SHARE = 0.1


class Bounds(NamedTuple):
    """What a scale is made of: scalars, or shapes that broadcast with the values.

    The threshold becomes 0.5. Values are expected from ``low`` to ``high``, and possible from ``floor`` to ``ceiling``.
    """

    low: Tensor
    threshold: Tensor
    high: Tensor
    floor: Tensor
    ceiling: Tensor


def scaled(values: Tensor, bounds: Bounds) -> Tensor:
    """The values, of any shape, on a scale from 0 to 1 with the threshold at 0.5.

    Nine tenths of the scale run linearly from ``low`` over the threshold to ``high``, and are cut there, as anomalib's
    scale is. One tenth runs linearly from ``floor`` over the threshold to ``ceiling``. So the scale increases strictly
    over the whole possible range, however close the bounds are to each other. It keeps values apart that differ by
    about a millionth of that range, and what is above the threshold stays above 0.5. Values beyond the possible range
    stay within ``[0, 1]``, and what is not a number stays so. A bound on the wrong side of the threshold gives way to
    the end of the range.
    """
    low, threshold, high, floor, ceiling = bounds
    floor, ceiling = torch.minimum(floor, threshold), torch.maximum(ceiling, threshold)
    low, high = torch.where(low < threshold, low, floor), torch.where(high > threshold, high, ceiling)
    share = 1.0 - WHOLE_RANGE_SHARE
    below = share * _fraction(values, low, threshold) + WHOLE_RANGE_SHARE * _fraction(values, floor, threshold)
    above = share * _fraction(values, threshold, high) + WHOLE_RANGE_SHARE * _fraction(values, threshold, ceiling)
    # A step so small that it is lost in rounding must not change the decision.
    step = torch.finfo(values.dtype).eps
    above = torch.where(values <= threshold, 0.5, (0.5 + 0.5 * above).clamp(0.5 + step, 1.0))
    return torch.where(values < threshold, (0.5 * below).clamp(max=0.5 - step), above)


def _fraction(values: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """How far the values are from ``start`` to ``end``, in ``[0, 1]``."""
    span = end - start
    return ((values - start) / torch.where(span > 0, span, torch.ones_like(span))).clamp(0.0, 1.0)
