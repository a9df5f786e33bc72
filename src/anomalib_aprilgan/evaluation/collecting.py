"""What a test leaves for its metrics: labels, masks and maps of all images, the maps on disk and not in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from torch import Tensor

from .metrics import measure
from .streaming import StreamingMetrics


class Collection:
    """Labels, masks and, for any number of settings, the maps of a test, until all metrics are taken.

    Exact metrics need all maps at once: they go to files in a folder, which are gone when the context ends. With
    ``streaming`` they are counted and forgotten.

    Args:
        settings: Number of maps for every image.
        folder: Where there is room for the maps: 4 bytes a pixel, image and setting.
        streaming: Whether memory and disk are bounded, for metrics that are right to 1e-4.
        shown: Paths of images whose maps are kept, for pictures.
    """

    def __init__(self, settings: int, folder: Path, *, streaming: bool = False, shown: Sequence[str] = ()) -> None:
        self.labels: list[Tensor] = []
        self.shown: dict[str, list[Tensor]] = {path: [] for path in shown}
        self._settings, self._folder = settings, folder
        self._counted = [StreamingMetrics() for _ in range(settings)] if streaming else None
        self._masks: list[Tensor] | None = []
        self._size: tuple[int, ...] = ()
        self._stack = ExitStack()
        self._files: list[Any] = []

    def __enter__(self) -> Collection:
        """Open a file for the maps of every setting."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._counted is None:
            self._files = [
                self._stack.enter_context(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115  # the stack's
                for _ in range(self._settings)
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the files."""
        self._stack.close()

    def add(self, batch: ImageBatch, maps: Iterable[Tensor]) -> None:
        """Take a batch.

        Args:
            batch: With labels, and masks where there are any.
            maps: Of every setting ``(B, H, W)``; none at all for a model without maps.
        """
        self.labels.append(cast("Tensor", batch.gt_label).bool().cpu())
        labels = self.labels[-1].numpy()
        masks = None if batch.gt_mask is None else batch.gt_mask.as_subclass(Tensor).squeeze(1).bool().cpu()
        rows = {path: row for row, path in enumerate(batch.image_path or ()) if path in self.shown}
        number = -1
        for number, anomaly_map in enumerate(maps):
            pixels = anomaly_map.detach().as_subclass(Tensor).float().cpu()
            pixels = pixels.reshape(len(pixels), *pixels.shape[-2:]).contiguous()
            self._size = tuple(pixels.shape[-2:])
            for path, row in rows.items():
                self.shown[path].append(pixels[row].clone())
            if self._counted is None:
                self._files[number].write(pixels.numpy().tobytes())
            elif masks is not None:
                self._counted[number].update(masks.numpy(), pixels.numpy(), labels, np.zeros(len(labels)))
        if masks is None or number < 0:
            self._masks = None
        elif self._masks is not None and self._counted is None:
            self._masks.append(masks)

    def measure(self, scores: Sequence[Tensor]) -> list[dict[str, float]]:
        """The metrics of every setting, :data:`metrics.METRICS`.

        Args:
            scores: Of every setting ``(N,)``, in the order of the images.
        """
        labels = torch.cat(self.labels).numpy()
        results = []
        for number, of_setting in enumerate(scores):
            values = of_setting.detach().double().cpu().numpy()
            if self._masks is None:
                results.append(measure(None, None, labels, values))
            elif self._counted is not None:
                results.append(self._counted[number].compute(values))
            else:
                masks = torch.cat(self._masks).numpy()
                self._files[number].flush()
                maps = np.memmap(self._files[number], np.float32, "r", shape=(len(labels), *self._size))
                results.append(measure(masks, maps, labels, values))
        return results


class CollectingEvaluator(Evaluator):
    """Stands where a model has its evaluator, and hands scores and maps on as they come from the post-processor."""

    wants_raw = True  # see results.trainer

    def __init__(self, collection: Collection) -> None:
        super().__init__()
        self._collection = collection
        self._scores: list[Tensor] = []

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # anomalib's arguments
        """Take a batch."""
        batch = cast("ImageBatch", kwargs.get("batch", args[3] if len(args) > 3 else None))
        self._scores.append(cast("Tensor", batch.pred_score).detach().float().flatten().cpu())
        self._collection.add(batch, [] if batch.anomaly_map is None else [batch.anomaly_map])

    def scores(self) -> Tensor:
        """``(N,)``, of all images of the test."""
        return torch.cat(self._scores)
