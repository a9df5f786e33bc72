"""What the good parts that thresholds were calibrated with looked like: their scores and image features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..running import FullPrecision

# Image features that are kept of a class at most: a mean is known well from fewer parts than a quantile.
_MOST_FEATURES = 1000
_BUFFERS = ("number", "scores", "number_of_features", "features")


class GoodParts(FullPrecision):
    """Scores and image features of the held-out good parts of every class.

    ``scores`` ``(N, n)`` are raw and fused, ``features`` ``(N, m, D)`` of unit length. Classes may have fewer parts
    than there are columns: ``number`` ``(N,)`` and ``number_of_features`` ``(N,)`` tell how many, and what is beyond
    is padding. All are ``None`` where no class has any.
    """

    number: Tensor | None
    scores: Tensor | None
    number_of_features: Tensor | None
    features: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in _BUFFERS:
            self.register_buffer(name, None)

    def of_row(self, row: int) -> tuple[Tensor, Tensor]:
        """Scores ``(n,)`` and image features ``(m, D)`` of a class; empty where there are none."""
        if self.number is None or self.scores is None or self.features is None or self.number_of_features is None:
            return torch.empty(0), torch.empty(0, 0)
        return self.scores[row, : self.number[row]], self.features[row, : self.number_of_features[row]]

    def set_row(self, row: int, number_of_rows: int, scores: Tensor, features: Tensor) -> None:
        """Replace those of one of so many classes; empty tensors forget them."""
        rows = [self.of_row(other) for other in range(number_of_rows)]
        if len(features) > _MOST_FEATURES:
            features = features[torch.linspace(0, len(features) - 1, _MOST_FEATURES).long()]
        features = F.normalize(features.detach().float(), dim=-1) if len(features) else features
        rows[row] = scores.detach().float(), features
        self._set(rows)

    def set_rows(self, kept: Sequence[int | None]) -> None:
        """Have as many classes, each with what the row named here has, and nothing for ``None``."""
        self._set([(torch.empty(0), torch.empty(0, 0)) if row is None else self.of_row(row) for row in kept])

    def _set(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        if not any(len(scores) for scores, _ in rows):
            self.number = self.scores = self.number_of_features = self.features = None
            return
        device = next(scores.device for scores, _ in rows if len(scores))
        width = max(features.shape[1] for _, features in rows)
        lowest = torch.finfo(torch.float32).min  # of no part: at least this are all scores
        self.number = torch.tensor([len(scores) for scores, _ in rows], device=device)
        self.number_of_features = torch.tensor([len(features) for _, features in rows], device=device)
        self.scores = torch.full((len(rows), int(self.number.max())), lowest, device=device)
        self.features = torch.zeros(len(rows), int(self.number_of_features.max()), width, device=device)
        for row, (scores, features) in enumerate(rows):
            self.scores[row, : len(scores)] = scores.to(device)
            if len(features):
                self.features[row, : len(features)] = features.to(device)

    def p_values(self, scores: Tensor, rows: Tensor | None = None) -> Tensor | None:
        """How likely a good part scores at least this: ``(B,)`` in ``(0, 1]``, or ``None`` where nothing is known.

        It is the share of good parts that do, this one counted among them: ``(1 + number at least) / (1 + number)``
        (conformal p-value; Vovk et al., Algorithmic Learning in a Random World, 2005, sec. 2.2). Good parts like those
        held out get values that are spread evenly, so that a part in a hundred gets 0.01 or less. A score ``(B,)``
        that is not a number has none, nor has one of a class without good parts: NaN.
        """
        if self.scores is None or self.number is None:
            return None
        rows = torch.zeros(len(scores), dtype=torch.long, device=scores.device) if rows is None else rows
        number = self.number[rows]
        at_least = (self.scores[rows] >= scores[:, None].float()).sum(dim=1)
        known = (number > 0) & scores.isfinite()
        return torch.where(known, (1.0 + at_least) / (1.0 + number), torch.nan)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
        """Take whatever good parts a checkpoint has, or none."""
        for name in _BUFFERS:
            value = state_dict.get(prefix + name)
            setattr(self, name, None if value is None else torch.empty_like(value))
        load: Any = super()._load_from_state_dict
        load(state_dict, prefix, *args)
