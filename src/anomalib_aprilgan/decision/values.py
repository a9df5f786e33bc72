"""The bounds and thresholds of one class, to be read and set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..value_names import BUFFERS, COLUMNS

if TYPE_CHECKING:
    from .post_processing import AprilGANPostProcessor


def value_table(post_processor: AprilGANPostProcessor) -> Tensor:
    """The values of every class ``(N, 10)``, a column for each of ``COLUMNS``."""
    device = post_processor.image_min.device
    cuts = [1.0 - torch.tensor(post_processor.sensitivities(level), device=device) for level in ("image", "pixel")]
    return torch.stack([*map(post_processor.get_buffer, BUFFERS.values()), *cuts], dim=1)


def values_of_images(
    post_processor: AprilGANPostProcessor, rows: Tensor | None, number: int | torch.SymInt
) -> dict[str, Tensor]:
    """By the names of ``COLUMNS``, ``(B,)`` for so many images; ``(1,)`` where all are of the one class.

    ``rows`` ``(B,)`` is the class of each image. A ValueError where there are several classes and no rows.
    """
    table, several = post_processor.table, len(post_processor.fixed) > 1
    if several and rows is None:
        msg = f"`rows` are needed to choose among the classes {post_processor.classes.names}, got None."
        raise ValueError(msg)
    if table is None:
        found = value_table(post_processor)
        found = found[rows] if several else found
    else:  # looked up even if there is one class: what follows from constants alone is folded in a graph
        chosen = rows if several and rows is not None else torch.zeros(number, dtype=torch.long, device=table.device)
        found = table.index_select(0, chosen)
    return dict(zip(COLUMNS, found.unbind(dim=1), strict=True))


class ClassValues:
    """The bounds, thresholds and sensitivities of one class: a view of its row in a post-processor."""

    def __init__(self, post_processor: AprilGANPostProcessor, row: int) -> None:
        self._post_processor, self._row = post_processor, row

    def values(self) -> dict[str, float]:
        """Bounds and thresholds by name, raw: what is cut at, and between what the scale runs."""
        return {name: self._post_processor.get_buffer(buffer)[self._row].item() for name, buffer in BUFFERS.items()}

    def set_values(self, **values: float) -> None:
        """Fix some of ``values``; a ValueError if a name is unknown or a value not finite.

        From then on validation changes none of this class.
        """
        for name, value in values.items():
            if name not in BUFFERS or not math.isfinite(value):
                msg = f"`values` must be finite numbers for some of {', '.join(BUFFERS)}, got {name}={value}."
                raise ValueError(msg)
        self.take(values)
        self._post_processor.fixed[self._row] = True

    def take(self, values: Mapping[str, float]) -> None:
        """Set some of ``values``, without fixing them; scores of good parts are those of one fusion, and go with it."""
        if {"map_maximum_min", "map_maximum_max"} & set(values):
            self.set_good_parts(torch.empty(0), torch.empty(0, 0))
        for name, value in values.items():
            self._post_processor.get_buffer(BUFFERS[name])[self._row] = value

    def set_good_parts(self, scores: Tensor, appearances: Tensor) -> None:
        """Replace scores ``(n,)``, raw and fused, and appearances ``(m, D)`` of held-out good parts."""
        number_of_rows = len(self._post_processor.fixed)
        self._post_processor.good_parts.set_row(self._row, number_of_rows, scores, appearances)

    def good_parts(self) -> tuple[Tensor, Tensor]:
        """Scores ``(n,)`` and appearances ``(m, D)`` of held-out good parts; empty where there are none."""
        return self._post_processor.good_parts.of_row(self._row)

    def set_defaults(self, map_limit: float, map_low: float = 0.0, pixel_threshold: float | None = None) -> None:
        """Bounds and thresholds until a validation tells better ones; nothing is fixed any more.

        Maps are expected up to ``map_limit``, their statistic from ``map_low`` on; without a threshold, pixels are cut
        in the middle.
        """
        pixel_threshold = map_limit / 2.0 if pixel_threshold is None else pixel_threshold
        self.take({"image_min": 0.0, "image_threshold": 0.5, "image_max": 1.0})
        self.take({"pixel_min": 0.0, "pixel_threshold": pixel_threshold, "pixel_max": map_limit})
        self.take({"map_maximum_min": map_low, "map_maximum_max": map_limit})
        self._post_processor.fixed[self._row] = False

    @property
    def image_sensitivity(self) -> float:
        """One minus the score above which an image of this class is anomalous."""
        return self._post_processor.sensitivities("image")[self._row]

    @image_sensitivity.setter
    def image_sensitivity(self, value: float) -> None:
        self._post_processor.set_sensitivity("image", self._row, value)

    @property
    def pixel_sensitivity(self) -> float:
        """One minus the value of the map above which a pixel is anomalous."""
        return self._post_processor.sensitivities("pixel")[self._row]

    @pixel_sensitivity.setter
    def pixel_sensitivity(self, value: float) -> None:
        self._post_processor.set_sensitivity("pixel", self._row, value)
