"""What one image costs: time and memory of the network alone."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import psutil
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..running import plain_images

_RUNS = 3
_LONGEST_S = 5.0
_SAMPLED_S = 0.002


class InferenceCost(Callback):
    """Measures, after a test, what the network takes for the first image of it: pre- and post-processing left out.

    Attributes:
        seconds: Median of three runs; NaN where the network cannot be run by itself.
        memory_mb: See ``measure_cost``.
    """

    def __init__(self) -> None:
        self.seconds, self.memory_mb = math.nan, math.nan
        self._image: Tensor | None = None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: ImageBatch,
        *_: object,
    ) -> None:
        """Keep the first image, as the network sees it."""
        del trainer, pl_module, outputs
        if self._image is None:
            self._image = plain_images(batch)[:1].clone()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        network, image = getattr(pl_module, "model", None), self._image
        if isinstance(network, torch.nn.Module) and image is not None:
            context = trainer.precision_plugin.forward_context()
            try:
                self.seconds, self.memory_mb = measure_cost(lambda: network(image), image.device, context)
            except (RuntimeError, TypeError, ValueError):  # it wants more than an image
                self.seconds, self.memory_mb = math.nan, math.nan


def measure_cost(
    run: Callable[[], object], device: torch.device, context: AbstractContextManager[object]
) -> tuple[float, float]:
    """Median seconds of up to three runs, and the peak of memory in MB while they last.

    The peak is that of PyTorch's allocator on a GPU, and of the whole process on a CPU.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    durations: list[float] = []
    with torch.no_grad(), context, _PeakOfProcess() as peak:
        while len(durations) < _RUNS and sum(durations) < _LONGEST_S:
            started = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
            durations.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else peak.bytes
    return statistics.median(durations), memory / 1e6


class _PeakOfProcess:
    """Looks at the memory of this process again and again for as long as the context lasts."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._ended.wait(_SAMPLED_S):
                return

    def __enter__(self) -> _PeakOfProcess:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes = max(self.bytes, psutil.Process().memory_info().rss)
