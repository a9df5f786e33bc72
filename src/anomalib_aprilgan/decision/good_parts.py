"""What the good parts that thresholds were calibrated with looked like: their scores and appearances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..running import FullPrecision

# Appearances that are kept of a class at most: a mean is known well from fewer parts than a quantile.
_MOST_APPEARANCES = 1000
_BUFFERS = ("number", "scores", "number_of_appearances", "appearances")


class GoodParts(FullPrecision):
    """Scores and appearances of the held-out good parts of every class.

    ``scores`` ``(N, n)`` are raw and fused, ``appearances`` ``(N, m, D)`` as in ``RawPredictions``. A class may have
    fewer parts: ``number`` ``(N,)`` and ``number_of_appearances`` ``(N,)`` tell how many, and what is beyond is
    padding. All are ``None`` where no class has any.
    """

    number: Tensor | None
    scores: Tensor | None
    number_of_appearances: Tensor | None
    appearances: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in _BUFFERS:
            self.register_buffer(name, None)

    def of_row(self, row: int) -> tuple[Tensor, Tensor]:
        """Scores ``(n,)`` and appearances ``(m, D)`` of a class; empty where there are none."""
        if self.number is None or self.scores is None or self.appearances is None or self.number_of_appearances is None:
            return torch.empty(0), torch.empty(0, 0)
        return self.scores[row, : self.number[row]], self.appearances[row, : self.number_of_appearances[row]]

    def set_row(self, row: int, number_of_rows: int, scores: Tensor, appearances: Tensor) -> None:
        """Replace those of one of so many classes; empty tensors forget them."""
        rows = [self.of_row(other) for other in range(number_of_rows)]
        if len(appearances) > _MOST_APPEARANCES:
            appearances = appearances[torch.linspace(0, len(appearances) - 1, _MOST_APPEARANCES).long()]
        rows[row] = scores.detach().float(), appearances.detach().float()
        self._set(rows)

    def set_rows(self, kept: Sequence[int | None]) -> None:
        """Have as many classes, each with what the row named here has, and nothing for ``None``."""
        self._set([(torch.empty(0), torch.empty(0, 0)) if row is None else self.of_row(row) for row in kept])

    def _set(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        if not any(len(scores) for scores, _ in rows):
            self.number = self.scores = self.number_of_appearances = self.appearances = None
            return
        device = next(scores.device for scores, _ in rows if len(scores))
        width = max(appearances.shape[1] for _, appearances in rows)
        lowest = torch.finfo(torch.float32).min  # of no part: at least this are all scores
        self.number = torch.tensor([len(scores) for scores, _ in rows], device=device)
        self.number_of_appearances = torch.tensor([len(appearances) for _, appearances in rows], device=device)
        self.scores = torch.full((len(rows), int(self.number.max())), lowest, device=device)
        self.appearances = torch.zeros(len(rows), int(self.number_of_appearances.max()), width, device=device)
        for row, (scores, appearances) in enumerate(rows):
            self.scores[row, : len(scores)] = scores.to(device)
            if len(appearances):
                self.appearances[row, : len(appearances)] = appearances.to(device)

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
