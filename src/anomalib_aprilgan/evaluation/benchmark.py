"""Any anomalib model x data x category x number of references x seed, from one YAML: tables, plots and pictures.

An anomalib pipeline: ``anomalib-aprilgan-benchmark --config configs/benchmark.yaml``, or :class:`Comparison` from
Python. It takes the files of ``anomalib benchmark`` and some keys more (:func:`read_config`).
"""

from __future__ import annotations

import errno
import logging
import re
import shlex
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.models.components import AnomalibModule
from anomalib.pipelines.benchmark import Benchmark
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
from anomalib.pipelines.components import Runner
from jsonargparse import ArgumentParser, Namespace
from omegaconf import OmegaConf
from rich.console import Console
from rich.markdown import Markdown
from tqdm import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own

from ..clip.backbone import ClipBackbone
from ..files import write_atomically
from ..lightning_model import AprilGAN
from . import plots, tables
from .cells import FAILED, Cell, CellResult, Results, file_stem
from .figures import heatmap_figure
from .jobs import CellJob, SharedPassJob, Task
from .plan import ModelEntry, Plan, check_keys, read_config
from .provenance import hardware, now, versions

logger = logging.getLogger(__name__)

_TOP = {"accelerator", "results", "tolerance", "benchmark"}
_BARS = ("image_auroc", "pixel_auroc", "aupro")
_CURVES = ("image_auroc", "pixel_auroc", "pixel_f1_max", "aupro")
# The disk, or the user's share of it, is full: no later cell would fare better.
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class ComparisonGenerator(BenchmarkJobGenerator):
    """anomalib's generator, for the cells that are still to be done.

    Args:
        task: What is common to all jobs.
        plan: The config.
        results: Tells what is done.
    """

    def __init__(self, task: Task, plan: Plan, results: Results) -> None:
        super().__init__(task.accelerator)
        self.task, self.plan, self.results = task, plan, results
        self._clips: dict[str, ClipBackbone] = {}

    def generate_jobs(
        self,
        args: dict[str, Any] | None = None,  # noqa: ARG002  # anomalib's signature
        previous_stage_result: Any = None,  # noqa: ANN401, ARG002
    ) -> Generator[CellJob | SharedPassJob, None, None]:
        """Jobs, made when they are asked for."""
        for entry, data, cells in self.plan.groups():
            missing = [cell for cell in cells if not self.results.is_done(cell)]
            if not missing:
                continue
            if entry.is_shared and self.plan.shared_pass:
                yield SharedPassJob(self.task, missing, entry.arguments, _maker_of(data), self._clips)
                continue
            for cell in missing:
                yield CellJob(self.task, cell, _builder_of(entry, cell), _maker_of(data))


def _builder_of(entry: ModelEntry, cell: Cell) -> Callable[[], AnomalibModule]:
    def build() -> AnomalibModule:
        if issubclass(entry.model, AprilGAN):
            return replace(entry, arguments=entry.arguments | {"seed": cell.seed}).build(cell.k_shot)
        return entry.build(cell.k_shot)

    return build


def _maker_of(data: dict[str, Any]) -> Callable[[], AnomalibDataModule]:
    return lambda: get_datamodule(OmegaConf.create(data))


class ResumingRunner(Runner):
    """Runs jobs one after the other; keeps every cell as soon as it is there, and goes on after one that fails.

    Args:
        generator: The jobs.
    """

    generator: ComparisonGenerator

    def run(
        self,
        args: dict[str, Any] | None = None,
        prev_stage_results: Any = None,  # noqa: ANN401  # anomalib's signature
    ) -> list[CellResult]:
        """Run what is still to be done.

        Returns:
            The cells that failed.

        Raises:
            OSError: The disk is full; what was done is kept.
        """
        results, cells = self.generator.results, self.generator.plan.cells()
        done = sum(results.is_done(cell) for cell in cells)
        failed: list[CellResult] = []
        # The time left is estimated from this run's cells.
        with tqdm(total=len(cells), initial=done, desc="cells", unit="cell", file=sys.stderr) as progress:
            for job in self.generator.generate_jobs(args, prev_stage_results):
                progress.set_postfix_str(str(job.cells[0]))
                found = self._run(job)
                for result in found:
                    results.save(result)
                failed += [result for result in found if result.status == FAILED]
                progress.update(len(job.cells))
        return failed

    def _run(self, job: CellJob | SharedPassJob) -> list[CellResult]:
        try:
            return cast("list[CellResult]", job.run()["results"])
        except Exception as error:  # whatever a model raises, the rest is done
            cause: BaseException = error
            while cause.__cause__ is not None:  # anomalib's own wrapper says nothing
                cause = cause.__cause__
            if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
                raise cause from None
            if len(job.cells) > 1:  # one setting must not take the others with it
                return [result for part in job.split() for result in self._run(part)]
            logger.exception("%s failed.", job.cells[0])
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())
            return [CellResult(cell, FAILED, reason) for cell in job.cells]


class Comparison(Benchmark):
    """anomalib's benchmark, resumable, with the paper's metrics, tables and pictures."""

    def run(self, args: Namespace | None = None) -> None:
        """Run a config; ``args.config`` is its path, ``args.overrides`` are entries ``key=value`` for it.

        Raises:
            SystemExit: Cells failed; all else was done.
        """
        args = args or self.get_parser().parse_args()
        config = _load(args)
        plan = read_config(config.get("benchmark") or {})
        tolerance = float(config.get("tolerance", 0.01))
        results = Results(Path(config.get("results", "results/benchmark")), config["benchmark"])
        (runner,) = self._setup_runners(config | {"plan": plan, "folder": results})
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its greetings, for every cell
        started = now()
        failed: list[CellResult] = []
        try:
            failed = cast("ResumingRunner", runner).run()
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            msg = (
                f"{error.strerror}: no room in {results.folder}. The cells that were done are kept; make room, or set "
                "`benchmark.metrics: streaming`, and run the same command again."
            )
            raise SystemExit(msg) from None
        provenance: dict[str, Any] = {"versions": versions(), "hardware": hardware(), "started": started}
        provenance |= {
            "finished": now(),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "config": config,
        }
        report(results, plan, provenance, tolerance)
        if failed:
            msg = f"{len(failed)} of {len(plan.cells())} cells failed; the same command tries them again."
            raise SystemExit(msg)

    def _setup_runners(self, args: dict[str, Any]) -> list[Runner]:  # type: ignore[override]  # a static method of anomalib's
        accelerator = args.get("accelerator", "auto")
        if accelerator not in {"auto", "cpu", "cuda"}:
            msg = f"`accelerator` must be auto, cpu or cuda, got {accelerator!r}."
            raise ValueError(msg)
        plan, results = args["plan"], args["folder"]
        task = Task(accelerator, plan.streaming, results.folder / "scratch", results.heatmaps, plan.shown)
        return [ResumingRunner(ComparisonGenerator(task, plan, results))]

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """The parser of the command line."""
        parser = parser or ArgumentParser(
            prog="anomalib-aprilgan-benchmark", description="Compare anomalib models: tables, plots and pictures."
        )
        parser.add_argument("--config", type=str, required=True, help="YAML file")
        parser.add_argument("overrides", nargs="*", help="entries for it: benchmark.data.init_args.root=/data/MVTecAD")
        return parser


def _load(args: Namespace) -> dict[str, Any]:
    path = Path(args.config)
    if not path.is_file():
        msg = f"`--config`: there is no file {path}."
        raise FileNotFoundError(msg)
    overrides = list(getattr(args, "overrides", None) or [])
    merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
    config = cast("dict[str, Any]", OmegaConf.to_container(merged, resolve=True))
    check_keys("config", config, _TOP)
    return config


def report(results: Results, plan: Plan, provenance: dict[str, Any], tolerance: float) -> None:
    """Write tables, plots and pictures of all results there are, and print the summary.

    Args:
        results: Where they are and go.
        plan: Tells the order of the cells.
        provenance: What they rest on.
        tolerance: Difference to published figures from which on they are flagged.
    """
    cells = plan.cells()
    results.write_tables(cells, provenance)
    frame = results.frame(cells)
    parts = {
        "Summary": "\n\n".join([*_notes(plan), tables.summary(frame)]),
        "Beside the published figures": tables.comparison(frame, tolerance),
        "Other metrics": tables.exact_metrics(frame),
        "Every category": tables.per_category(frame),
        "Failed": tables.failures(frame),
    }
    text = "\n\n".join(f"# {title}\n\n{part.strip()}" for title, part in parts.items() if part.strip()) + "\n"
    write_atomically(results.folder / "tables.md", lambda file: file.write(text.encode()))
    if (frame.status != FAILED).any():
        for metric in _BARS:
            if frame[metric].notna().any():
                plots.category_bars(frame, metric, results.folder / f"bars_{metric}.png")
        plots.shots_curve(frame, [name for name in _CURVES if frame[name].notna().any()], results.folder / "shots.png")
    _draw_heatmaps(results, plan)
    console = Console()
    console.print(Markdown(parts["Summary"]) if console.is_terminal else parts["Summary"], soft_wrap=True)
    console.print(f"All tables, plots and pictures: {results.folder}", soft_wrap=True)


def _notes(plan: Plan) -> list[str]:
    """What a reader of the summary must know first."""
    random = ", ".join(entry.name for entry in plan.models if entry.generated)
    notes = [f"{random}: the figures mean nothing."] if random else []
    for entry in plan.models:
        if any(0 < k_shot < entry.fewest_images for k_shot in plan.shots):
            notes.append(f"{entry.name} is not defined for fewer than {entry.fewest_images} images.")
    return notes


def _draw_heatmaps(results: Results, plan: Plan) -> None:
    """The paper's figure 2 for every model and data set."""
    groups: dict[str, list[Path]] = {}
    for _, _, cells in plan.groups():
        if cells:
            first = cells[0]
            stem = file_stem(first.model, first.dataset, first.category)
            groups.setdefault(f"{first.model}-{first.dataset}", []).extend(
                sorted(results.heatmaps.glob(f"{stem}-*.npz"))
            )
    for name, stored in groups.items():
        shown = [np.load(file) for file in stored]
        kept = {key for one in shown[:1] for key in one.files} - {"image", "mask"}
        settings = sorted(kept, key=lambda title: int(title.partition("-")[0]))
        rows = [one for one in shown if all(setting in one.files for setting in settings)]
        rows = [one for one in rows if Path(str(one["image"])).exists() and Path(str(one["mask"])).exists()]
        if rows:
            maps = {setting: [torch.from_numpy(one[setting]).float() for one in rows] for setting in settings}
            heatmap_figure(
                [Path(str(one["image"])) for one in rows],
                [Path(str(one["mask"])) for one in rows],
                maps,
                results.folder / f"heatmaps_{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.png",
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``anomalib-aprilgan-benchmark``."""
    Comparison().run(Comparison.get_parser().parse_args(arguments))


if __name__ == "__main__":
    main()
