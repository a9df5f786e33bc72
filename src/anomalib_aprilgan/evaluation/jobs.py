"""The jobs of the benchmark: cells of any anomalib model one by one, those of ours in one pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from anomalib import LearningType
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.utils.logging import hide_output
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from ..clip.backbone import ClipBackbone
from ..data.references import ReferenceSource
from ..files import temporary_folder, write_atomically
from .cells import Cell, CellResult, file_stem
from .collecting import CollectingEvaluator, Collection
from .cost import InferenceCost
from .plan import SPLIT_SEED, DataEntry, ModelEntry
from .provenance import hardware, now, versions, weights_checksum
from .shared_pass import Setting, SharedPass
from .truth import GroundTruth, Size


class Workplace:
    """What the jobs of one process hand on: CLIPs by model, and the ground truth that was read last."""

    def __init__(self) -> None:
        self.clips: dict[str, ClipBackbone] = {}
        self._data: DataEntry | None = None
        self._truth: GroundTruth | None = None

    def truth_of(self, data: DataEntry, datamodule: AnomalibDataModule, size: Size | None) -> GroundTruth:
        """The ground truth of a datamodule that was set up."""
        if self._truth is None or self._data != data or not self._truth.is_of(datamodule):
            self._data, self._truth = data, None  # one fills enough memory
            self._truth = GroundTruth.of(datamodule, size)
        return self._truth


@dataclass(frozen=True)
class Task:
    """What the jobs of one run have in common.

    Args:
        accelerator: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        streaming: Whether metrics are taken in bounded memory.
        scratch: Folder for what does not outlive a job.
        maps: Folder for the maps that are shown in drawings.
        shown: Number of images per category whose maps are shown.
        evaluation_size: Height and width of maps and masks for the metrics of pixels; that of each ground truth
            otherwise.
        resamples: Number of bootstrap samples of the images.
    """

    accelerator: str
    streaming: bool
    scratch: Path
    maps: Path
    shown: int
    evaluation_size: Size | None = None
    resamples: int = 0

    def engine(self, folder: Path, device: int | None, *callbacks: Callback, **arguments: Any) -> Engine:  # noqa: ANN401  # Lightning's
        """An Engine on one device that leaves nothing behind."""
        return Engine(
            accelerator=self.accelerator,
            devices=1 if device is None else [device],
            default_root_dir=folder,
            callbacks=list(callbacks),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        )

    def collection(self, truth: GroundTruth, settings: int, shown: Sequence[int] = ()) -> Collection:
        """A collection of the maps of a test."""
        return Collection(truth, settings, self.scratch, streaming=self.streaming, shown=shown)

    def results(
        self,
        cells: Sequence[Cell],
        data: DataEntry,
        collection: Collection,
        measured: Sequence[tuple[dict[str, float], dict[str, Any]]],
        model: nn.Module,
        started: float,
    ) -> list[CellResult]:
        """What became of cells that were tested on the same images."""
        truth, size = collection.truth, self.evaluation_size
        details = {"weights_sha256": weights_checksum(model), "hardware": hardware(), "versions": versions()}
        details |= {"finished": now()}
        bounds = collection.bounds or [{}] * len(cells)
        return [
            CellResult(
                cell,
                n_images=len(truth.labels),
                n_anomalous=int(truth.labels.sum()),
                metrics=metrics,
                seconds=(time.perf_counter() - started) / len(cells),
                datamodule=data.datamodule,
                evaluation_size="ground truth" if size is None else f"{size[0]} x {size[1]}",
                test_files=truth.digest,
                details=details | ({"error_bounds": of_cell} if of_cell else {}),
                samples=samples,
            )
            for cell, (metrics, samples), of_cell in zip(cells, measured, bounds, strict=True)
        ]


class KeepReferences(Callback):
    """Leaves of the training images only those that a few-shot model of the same seed would draw.

    Args:
        k_shot: How many, of each class where the images tell it.
        seed: Seed of the draw.
    """

    def __init__(self, k_shot: int, seed: int) -> None:
        self.k_shot, self.seed = k_shot, seed
        self.files: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002  # Lightning's hook
        """After the datamodule is set up, each time."""
        datamodule = cast("AnomalibDataModule", trainer.datamodule)  # type: ignore[attr-defined]
        samples = datamodule.train_data.samples
        if not self.files:
            classes = sorted(set(samples.class_name)) if "class_name" in samples else [None]
            sources = [ReferenceSource(self.k_shot, self.seed, None, datamodule, name) for name in classes]
            self.files = [str(file) for source in sources for file in source.draw()]
        if len(samples) > len(self.files):
            datamodule.train_data.samples = samples[samples.image_path.isin(self.files)]


@dataclass(frozen=True)
class CellJob:
    """One cell of any anomalib model, by the Engine; metrics are taken from raw scores and maps.

    A model that learns from normal images gets exactly the references that a few-shot model would draw. Model and data
    are made when the job runs: what they cannot do is then the reason of this cell alone.

    Args:
        task: What is common to all jobs.
        cells: Which; one.
        entry: The model.
        data: Its data.
    """

    task: Task
    cells: tuple[Cell]
    entry: ModelEntry
    data: DataEntry

    def split(self) -> list[CellJob]:
        """Jobs of one cell each: this one."""
        return [self]

    @hide_output
    def run(self, workplace: Workplace, device: int | None = None) -> list[CellResult]:
        """Build, fit and test."""
        started = time.perf_counter()
        (cell,) = self.cells
        datamodule = set_up(self.data.build())
        truth = workplace.truth_of(self.data, datamodule, self.task.evaluation_size)
        seed_everything(cell.seed, verbose=False)
        model = self.entry.build(cell, self.data)
        learns = model.learning_type == LearningType.ONE_CLASS
        if model.learning_type == LearningType.ZERO_SHOT and cell.k_shot != 0:
            msg = f"{type(model).__name__} takes no reference images: set `k_shot: 0` for it."
            raise ValueError(msg)
        keep = KeepReferences(cell.k_shot, cell.seed) if cell.k_shot > 0 else None
        cost = InferenceCost()
        with temporary_folder(self.task.scratch) as folder, self.task.collection(truth, 1) as collection:
            evaluator = CollectingEvaluator(collection)
            _show_raw_scores(model, evaluator)
            callbacks = [*([keep] if keep else []), cost]
            engine = self.task.engine(folder, device, *callbacks, **self.entry.trainer)
            if learns:
                engine.fit(model=model, datamodule=datamodule)
            engine.test(model=model, datamodule=datamodule, verbose=False)
            measured = collection.measure(evaluator.scores(), self.task.resamples)
        (result,) = self.task.results(self.cells, self.data, collection, measured, model, started)
        details = result.details | {"references": keep.files if keep else []}
        return [replace(result, seconds_per_image=cost.seconds, peak_memory_mb=cost.memory_mb, details=details)]


@dataclass(frozen=True)
class SharedPassJob:
    """All settings of APRIL-GAN on one category, from one pass over its test images.

    Args:
        task: What is common to all jobs.
        cells: Which, all of one model and category.
        entry: The model.
        data: Its data.
    """

    task: Task
    cells: tuple[Cell, ...]
    entry: ModelEntry
    data: DataEntry

    def split(self) -> list[SharedPassJob]:
        """Jobs of one cell each."""
        return [replace(self, cells=(cell,)) for cell in self.cells]

    @hide_output
    def run(self, workplace: Workplace, device: int | None = None) -> list[CellResult]:
        """Test all settings."""
        started = time.perf_counter()
        datamodule = set_up(self.data.build())
        truth = workplace.truth_of(self.data, datamodule, self.task.evaluation_size)
        seed_everything(self.cells[0].seed, verbose=False)
        shots = [Setting(cell.k_shot, cell.seed) for cell in self.cells]
        shown, name = truth.first_defects(self.task.shown), self.entry.name
        with (
            temporary_folder(self.task.scratch) as folder,
            self.task.collection(truth, len(shots), shown) as collection,
        ):
            model = SharedPass(shots, **self.entry.arguments_for(self.data))
            if name in workplace.clips:
                model.model.attach_backbone(workplace.clips[name])
            model.collection = collection
            engine = self.task.engine(folder, device, limit_val_batches=0, **self.entry.trainer)
            engine.test(model=model, datamodule=datamodule, verbose=False)
            workplace.clips[name] = model.model.backbone
            measured = collection.measure(model.scores(), self.task.resamples)
        found = self.task.results(self.cells, self.data, collection, measured, model, started)
        details = {"clip_digest": model.model.backbone.digest, "adapters": model.made.provenance.to_dict()}
        results = []
        for result, files in zip(found, model.files_of_banks, strict=True):
            seconds, memory = model.costs[result.cell.k_shot]
            kept = result.details | details | {"references": files}
            results.append(replace(result, seconds_per_image=seconds, peak_memory_mb=memory, details=kept))
        self._keep_maps(collection, model)
        return results

    def _keep_maps(self, collection: Collection, model: SharedPass) -> None:
        """The maps of the shown images, on the scale from 0 to what a map of these stages reaches."""
        stages, limit = len(model.model.stages), model.model.map_limit
        masks = collection.truth.masks or []
        for number, (index, maps) in enumerate(collection.shown.items()):
            arrays: dict[str, Any] = {
                f"{setting.k_shot}-shot": (of_setting / (limit if setting.k_shot else stages)).half().numpy()
                for setting, of_setting in zip(model.shots, maps, strict=True)
                if setting.seed == model.shots[0].seed or not setting.k_shot
            }
            cell = self.cells[0]
            arrays |= {"image": np.array(collection.truth.paths[index]), "mask": masks[index]}
            file = self.task.maps / f"{file_stem(cell.model, cell.dataset, cell.category)}-{number}.npz"
            if file.exists():  # of the settings that were done before
                with np.load(file) as kept:
                    arrays = dict(kept) | arrays
            write_atomically(file, partial(np.savez, **arrays))


def set_up(datamodule: AnomalibDataModule) -> AnomalibDataModule:
    """The same, its files fetched and its images split, once: the Engine would split them again."""
    seed_everything(SPLIT_SEED, verbose=False)  # anomalib draws some splits without asking for a seed
    datamodule.prepare_data()
    datamodule.setup(cast("Any", TrainerFn.TESTING))
    return datamodule


def _show_raw_scores(model: AnomalibModule, evaluator: CollectingEvaluator) -> None:
    """No scale that ties scores, no thresholds, no drawings; fused scores stay fused."""
    post_processor: Any = model.post_processor  # anomalib allows none
    if post_processor is not None:
        post_processor.enable_normalization = False
        post_processor.enable_thresholding = False
    model.evaluator = evaluator
    model.visualizer = None
