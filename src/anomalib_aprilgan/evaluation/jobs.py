"""The jobs of the benchmark: cells of any anomalib model one by one, those of ours in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.pipelines.benchmark.job import BenchmarkJob
from anomalib.utils.logging import hide_output
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..clip.backbone import ClipBackbone
from ..data.references import ReferenceSource
from ..files import temporary_folder, write_atomically
from .cells import Cell, CellResult, file_stem
from .collecting import CollectingEvaluator, Collection
from .provenance import hardware, now, weights_checksum
from .shared_pass import Setting, SharedPass


@dataclass(frozen=True)
class Task:
    """What the jobs of one run have in common.

    Args:
        accelerator: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        streaming: Whether metrics are taken in bounded memory.
        scratch: Folder for what does not outlive a job.
        maps: Folder for the maps that are shown in drawings.
        shown: Number of images per category whose maps are shown.
    """

    accelerator: str
    streaming: bool
    scratch: Path
    maps: Path
    shown: int

    def engine(self, folder: Path, *callbacks: Callback, **arguments: Any) -> Engine:  # noqa: ANN401  # Lightning's
        """An Engine that leaves nothing behind."""
        return Engine(
            accelerator=self.accelerator,
            devices=1,
            default_root_dir=folder,
            callbacks=list(callbacks),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        )


class KeepReferences(Callback):
    """Leaves of the training images only those that a few-shot model of the same seed would draw.

    Args:
        k_shot: How many.
        seed: Seed of the draw.
    """

    def __init__(self, k_shot: int, seed: int) -> None:
        self.k_shot, self.seed = k_shot, seed
        self.files: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002  # Lightning's hook
        """After the datamodule is set up, each time."""
        datamodule = cast("AnomalibDataModule", trainer.datamodule)  # type: ignore[attr-defined]
        if not self.files:
            drawn = ReferenceSource(self.k_shot, self.seed, None, datamodule).draw()
            self.files = [str(file) for file in drawn]
        samples = datamodule.train_data.samples
        if len(samples) > len(self.files):
            datamodule.train_data.samples = samples[samples.image_path.isin(self.files)]


class CellJob(BenchmarkJob):
    """One cell of any anomalib model, by the Engine; metrics are taken from raw scores and maps.

    A model that learns from normal images gets exactly the references that a few-shot model would draw.

    Args:
        task: What is common to all jobs.
        cell: Which.
        build: Makes the model.
        datamodule: Makes its data.
    """

    def __init__(
        self, task: Task, cell: Cell, build: Callable[[], AnomalibModule], datamodule: Callable[[], AnomalibDataModule]
    ) -> None:
        # Model and data are made when the job runs: what they cannot do is then the reason of this cell alone.
        super().__init__(task.accelerator, cast("Any", None), cast("Any", None), cell.seed, {})
        self.task, self.cells, self._build, self._load = task, [cell], build, datamodule

    def split(self) -> list[CellJob]:
        """Jobs of one cell each: this one."""
        return [self]

    @hide_output
    def run(self, task_id: int | None = None) -> dict[str, Any]:  # noqa: ARG002  # one process
        """Build, fit and test; returns :class:`CellResult` by cell."""
        started = time.perf_counter()
        (cell,) = self.cells
        seed_everything(cell.seed, verbose=False)
        self.model, self.datamodule = model, _ = self._build(), self._load()
        learns = model.learning_type == LearningType.ONE_CLASS
        if model.learning_type == LearningType.ZERO_SHOT and cell.k_shot != 0:
            msg = f"{type(model).__name__} takes no reference images: ask `k_shot: 0` of it."
            raise ValueError(msg)
        checksum = weights_checksum(model)
        keep = KeepReferences(cell.k_shot, cell.seed) if cell.k_shot > 0 else None
        with (
            temporary_folder(self.task.scratch) as folder,
            Collection(1, self.task.scratch, streaming=self.task.streaming) as collection,
        ):
            evaluator = CollectingEvaluator(collection)
            _show_raw_scores(model, evaluator)
            engine = self.task.engine(folder, *([keep] if keep else []))
            if learns:
                engine.fit(model=model, datamodule=self.datamodule)
            engine.test(model=model, datamodule=self.datamodule, verbose=False)
            metrics = collection.measure([evaluator.scores()])
        details = {"weights_sha256": checksum, "references": keep.files if keep else []}
        return {"results": _results(self.cells, metrics, collection, details, started)}


class SharedPassJob(BenchmarkJob):
    """All settings of APRIL-GAN on one category, from one pass over its test images.

    Args:
        task: What is common to all jobs.
        cells: Which, all of one model and category.
        arguments: Of :class:`AprilGAN`.
        datamodule: Makes its data.
        clips: CLIPs that earlier jobs loaded, by the names of their models; this job's comes to them.
    """

    def __init__(
        self,
        task: Task,
        cells: Sequence[Cell],
        arguments: dict[str, Any],
        datamodule: Callable[[], AnomalibDataModule],
        clips: dict[str, ClipBackbone] | None = None,
    ) -> None:
        super().__init__(task.accelerator, cast("Any", None), cast("Any", None), cells[0].seed, {})
        self.task, self.cells, self._arguments, self._load = task, list(cells), arguments, datamodule
        self._clips = {} if clips is None else clips

    def split(self) -> list[SharedPassJob]:
        """Jobs of one cell each."""
        return [SharedPassJob(self.task, [cell], self._arguments, self._load, self._clips) for cell in self.cells]

    @hide_output
    def run(self, task_id: int | None = None) -> dict[str, Any]:  # noqa: ARG002  # one process
        """Test all settings; returns a :class:`CellResult` for each."""
        started = time.perf_counter()
        seed_everything(self.seed, verbose=False)
        shots = [Setting(cell.k_shot, cell.seed) for cell in self.cells]
        self.datamodule = self._load()
        self.datamodule.prepare_data()
        self.datamodule.setup()
        shown = first_defects(self.datamodule, self.task.shown)
        with (
            temporary_folder(self.task.scratch) as folder,
            Collection(len(shots), self.task.scratch, streaming=self.task.streaming, shown=list(shown)) as collection,
        ):
            model = SharedPass(shots, **self._arguments)
            name = self.cells[0].model
            if name in self._clips:
                model.model.attach_backbone(self._clips[name])
            model.collection = collection
            engine = self.task.engine(folder, limit_val_batches=0)
            engine.test(model=model, datamodule=self.datamodule, verbose=False)
            self._clips[name] = model.model.backbone
            metrics = collection.measure(model.scores())
        details = {
            "weights_sha256": weights_checksum(model),
            "clip_digest": model.model.backbone.digest,
            "adapters": model.made.provenance.to_dict(),
        }
        found = _results(self.cells, metrics, collection, details, started)
        results = [
            replace(result, details=result.details | {"references": files})
            for result, files in zip(found, model.files_of_banks, strict=True)
        ]
        self._keep_maps(collection, model, shown)
        return {"results": results}

    def _keep_maps(self, collection: Collection, model: SharedPass, shown: dict[str, str]) -> None:
        """The maps of the shown images, on the scale from 0 to what a map of these stages reaches."""
        stages, limit = len(model.model.stages), model.model.map_limit
        for number, (path, mask) in enumerate(shown.items()):
            maps = {
                f"{setting.k_shot}-shot": (of_setting / (limit if setting.k_shot else stages)).half()
                for setting, of_setting in zip(model.shots, collection.shown[path], strict=True)
                if setting.seed == model.shots[0].seed or not setting.k_shot
            }
            cell = self.cells[0]
            arrays: dict[str, Any] = {name: values.numpy() for name, values in maps.items()}
            arrays |= {"image": np.array(path), "mask": np.array(mask)}
            file = self.task.maps / f"{file_stem(cell.model, cell.dataset, cell.category)}-{number}.npz"
            if file.exists():  # of the settings that were done before
                with np.load(file) as kept:
                    arrays = dict(kept) | arrays
            write_atomically(file, partial(np.savez, **arrays))


def first_defects(datamodule: AnomalibDataModule, number: int) -> dict[str, str]:
    """The first images with a mask of so many kinds of defects: image path by mask path."""
    samples = datamodule.test_data.samples
    samples = samples[(samples.label_index == 1) & (samples.mask_path.fillna("") != "")]
    firsts = samples.sort_values("image_path").groupby("label").head(1) if "label" in samples else samples
    return dict(zip(firsts.image_path[:number], firsts.mask_path[:number], strict=True))


def _show_raw_scores(model: AnomalibModule, evaluator: CollectingEvaluator) -> None:
    """No scale that ties scores, no thresholds, no drawings; fused scores stay fused."""
    post_processor: Any = model.post_processor  # anomalib allows none
    if post_processor is not None:
        post_processor.enable_normalization = False
        post_processor.enable_thresholding = False
    model.evaluator = evaluator
    model.visualizer = None


def _results(
    cells: Sequence[Cell],
    metrics: Sequence[dict[str, float]],
    collection: Collection,
    details: dict[str, Any],
    started: float,
) -> list[CellResult]:
    labels: Tensor = torch.cat(collection.labels)
    seconds = (time.perf_counter() - started) / len(cells)
    details = details | {"hardware": hardware(), "finished": now()}
    return [
        CellResult(
            cell,
            n_images=len(labels),
            n_anomalous=int(labels.sum()),
            metrics=of_cell,
            seconds=seconds,
            details=details,
        )
        for cell, of_cell in zip(cells, metrics, strict=True)
    ]
