"""What a test leaves for its metrics: scores and maps of all images, the maps on disk and not in memory."""

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
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from ..metrics import StreamingMetrics, measure
from .resampling import Samples, bootstrap
from .truth import Frame, GroundTruth


class Collection:
    """The maps of a test, for any number of settings, until all metrics are taken.

    Exact metrics need all maps at once: they go to files in a folder, which are gone when the context ends. With
    ``streaming`` they are counted and forgotten. Every map is brought to the size of its ground truth.

    Args:
        truth: What the images are.
        settings: Number of maps for every image.
        folder: Where there is room for the maps: 4 bytes a pixel, image and setting.
        streaming: Whether memory and disk are bounded, for metrics that may be off by what they say.
        shown: Indices of images whose maps are kept, for pictures.
    """

    def __init__(
        self, truth: GroundTruth, settings: int, folder: Path, *, streaming: bool = False, shown: Sequence[int] = ()
    ) -> None:
        self.truth = truth
        self.frame = Frame()
        self.shown: dict[int, list[Tensor]] = {index: [] for index in shown}
        self.bounds: list[dict[str, float]] = []
        self._settings, self._folder = settings, folder
        self._counted = [StreamingMetrics() for _ in range(settings)] if streaming else None
        self._number = 0
        self._has_maps = truth.masks is not None
        self._sizes: list[tuple[int, ...]] = []
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
            batch: The images that come next in the ground truth.
            maps: Of every setting ``(B, H, W)``; none at all for a model without maps.

        Raises:
            RuntimeError: The images are others.
        """
        indices = range(self._number, self._number + batch.batch_size)
        expected = self.truth.paths[indices.start : indices.stop]
        if len(expected) < len(indices) or (batch.image_path and [*map(str, batch.image_path)] != expected):
            msg = (
                "The test images or their order differ from those of the ground truth: "
                f"{(batch.image_path or ['?'])[0]} came instead of {(expected or ['nothing'])[0]}."
            )
            raise RuntimeError(msg)
        self._number = indices.stop
        number = -1
        for number, anomaly_map in enumerate(maps):
            pixels = anomaly_map.detach().as_subclass(Tensor).float().cpu()
            pixels = pixels.reshape(len(pixels), *pixels.shape[-2:]).contiguous()
            for index in self.shown:
                if index in indices:
                    self.shown[index].append(pixels[index - indices.start].clone())
            if number == 0:
                self._sizes += [tuple(pixels.shape[1:])] * len(pixels)
            if self._counted is None:
                self._files[number].write(pixels.numpy().tobytes())
            elif self.truth.masks is not None:
                masks = self.truth.masks[indices.start : indices.stop]
                fitted = [self.frame.fitted(one, mask.shape) for one, mask in zip(pixels.numpy(), masks, strict=True)]
                labels = self.truth.labels[indices.start : indices.stop]
                self._counted[number].update(masks, fitted, labels, np.zeros(len(labels)))
        self._has_maps = self._has_maps and number >= 0

    def measure(self, scores: Sequence[Tensor], resamples: int = 0) -> list[tuple[dict[str, float], Samples]]:
        """The metrics of every setting, ``metrics.METRICS``, and those of bootstrap samples of the images.

        Args:
            scores: Of every setting ``(N,)``, in the order of the images.
            resamples: Number of samples; of pixels there are none in bounded memory.

        Raises:
            RuntimeError: Images are missing.
        """
        if self._number < len(self.truth.paths):
            msg = f"The test ended after {self._number} of {len(self.truth.paths)} images."
            raise RuntimeError(msg)
        labels = self.truth.labels
        results = []
        for number, of_setting in enumerate(scores):
            values = of_setting.detach().double().cpu().numpy()
            masks, maps = self.truth.masks if self._has_maps else None, None
            if masks is not None and self._counted is not None:
                figures = self._counted[number].compute(values)
                self.bounds.append(self._counted[number].bounds(values))
            else:
                maps = None if masks is None else self._maps(number, masks)
                figures = measure(masks, maps, labels, values)
            seed = int(self.truth.digest, 16)
            drawn = bootstrap(labels, values, masks, maps, resamples, seed) if resamples else {}
            results.append((figures, drawn))
        return results

    def _maps(self, number: int, masks: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.float32]]:
        """Maps of a setting, at the sizes of the masks."""
        self._files[number].flush()
        pixels = np.memmap(self._files[number], np.float32, "r")
        ends = np.cumsum([height * width for height, width in self._sizes])
        return [
            self.frame.fitted(np.array(flat).reshape(size), mask.shape)
            for flat, size, mask in zip(np.split(pixels, ends[:-1]), self._sizes, masks, strict=True)
        ]


class CollectingEvaluator(Evaluator):
    """Stands where a model has its evaluator, and hands scores and maps on as they come from the post-processor."""

    wants_raw = True  # see results.trainer

    def __init__(self, collection: Collection) -> None:
        super().__init__()
        self._collection = collection
        self._scores: list[Tensor] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn which part of an image the maps show."""
        del trainer
        self._collection.frame = Frame.of(cast("Any", pl_module).pre_processor)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # anomalib's arguments
        """Take a batch."""
        batch = cast("ImageBatch", kwargs.get("batch", args[3] if len(args) > 3 else None))
        self._scores.append(cast("Tensor", batch.pred_score).detach().float().flatten().cpu())
        self._collection.add(batch, [] if batch.anomaly_map is None else [batch.anomaly_map])

    def scores(self) -> list[Tensor]:
        """``(N,)``, of all images of the test, as the scores of one setting."""
        return [torch.cat(self._scores)]
