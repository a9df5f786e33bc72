"""Any anomalib model x data x category x number of references x seed, from one YAML: tables, plots and pictures.

``anomalib-aprilgan benchmark --config configs/benchmark/compare.yaml``, or ``run`` from Python. It takes the files of
``anomalib benchmark`` and some keys more (``config.BenchmarkConfig``).
"""

from __future__ import annotations

import errno
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..plugin import register
from .cells import FAILED, CellResult, Results
from .config import Config, checked, read_arguments
from .jobs import CellJob, SharedPassJob, Task, Workplace
from .plan import Plan, read_plan
from .provenance import hardware, now, versions
from .report import report
from .truth import Size

logger = logging.getLogger(__name__)

Job = CellJob | SharedPassJob
# The disk, or the user's share of it, is full: no later cell would fare better.
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def run(config: dict[str, Any]) -> Results:
    """Run what is still to be done of a config, and write all tables, plots and pictures.

    Args:
        config: See ``config.Config``; what anomalib's own benchmark takes will do.

    Returns:
        The folder of results.

    Raises:
        SystemExit: Cells failed, and all else was done; or the disk is full, or a process ended.
        ValueError: The config cannot be, or its folder holds other results.
    """
    options = checked(config)
    accelerators, missing = _at_hand(options)
    plan = read_plan(options.benchmark, accelerators)
    results = Results(Path(options.results), config["benchmark"])
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its greetings, for every cell
    started = now()
    try:
        failed = _run_all(plan, results)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        msg = (
            f"{error.strerror}: no room in {results.folder}. The cells that were done are kept; make room, or set "
            "`benchmark.metrics: streaming`, and run the same command again."
        )
        raise SystemExit(msg) from None
    except BrokenProcessPool:
        msg = (
            f"A process ended, perhaps for lack of memory. The cells that were done are kept in {results.folder}; "
            "run the same command again, with fewer `benchmark.trainer.devices`."
        )
        raise SystemExit(msg) from None
    provenance: dict[str, Any] = {"versions": versions(), "hardware": hardware(), "started": started}
    provenance |= {
        "finished": now(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": config,
    }
    report(results, plan, provenance, options.tolerance, missing)
    if failed:
        msg = f"{failed} of {len(plan.cells())} cells failed; the same command tries them again."
        raise SystemExit(msg)
    return results


def _at_hand(options: Config) -> tuple[list[str], list[str]]:
    """Accelerators that this machine has, and those that it has not; a ValueError where it has none."""
    asked: list[str] = list(options.accelerator)
    present = [name for name in asked if name == "auto" or AcceleratorRegistry[name]["accelerator"].is_available()]
    if not present:
        msg = f"`accelerator`: this machine has none of {', '.join(asked)}. Ask for cpu."
        raise ValueError(msg)
    return present, [name for name in asked if name not in present]


def _run_all(plan: Plan, results: Results) -> int:
    """Run what is still to be done, on one accelerator after the other; returns how many cells failed."""
    cells = plan.cells()
    done = sum(results.is_done(cell) for cell in cells)
    failed = 0
    # A line for every cell, also in a log file, and below them in a terminal how far the run is.
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("cells", total=len(cells), completed=done)
        for accelerator in plan.accelerators:
            jobs = _jobs(plan, results, accelerator)
            devices = plan.options.trainer.devices or (torch.cuda.device_count() if _is_cuda(accelerator) else 1)
            alone = partial(run_job, workplace=Workplace())
            for found in _in_parallel(jobs, devices, accelerator) if devices > 1 else map(alone, jobs):
                for result in found:
                    results.save(result)
                    progress.console.print(f"{result.cell}: {result.status} ({result.seconds:.1f} s)")
                failed += sum(result.status == FAILED for result in found)
                progress.advance(bar, len(found))
    return failed


def _is_cuda(accelerator: str) -> bool:
    return accelerator in {"cuda", "auto"} and torch.cuda.is_available()


def _jobs(plan: Plan, results: Results, accelerator: str) -> Iterator[Job]:
    """Jobs for the cells that are still to be done."""
    options, size = plan.options, plan.options.evaluation_size
    task = Task(
        accelerator,
        streaming=options.metrics == "streaming",
        scratch=results.folder / "scratch",
        maps=results.heatmaps,
        shown=options.shown,
        evaluation_size=_pair(size),
        resamples=options.resamples,
    )
    for entry, data, cells in plan.groups(accelerator):
        missing = [cell for cell in cells if not results.is_done(cell)]
        if missing and entry.is_shared(data) and options.shared_pass:
            yield SharedPassJob(task, tuple(missing), entry, data)
            continue
        for cell in missing:
            yield CellJob(task, (cell,), entry, data)


def _pair(size: int | tuple[int, int] | None) -> Size | None:
    return (size, size) if isinstance(size, int) else size


def _in_parallel(jobs: Iterator[Job], devices: int, accelerator: str) -> Iterator[list[CellResult]]:
    """Results as they come from as many processes as there are devices, each with a device of its own."""
    free: list[int] = list(range(devices))
    running: dict[Future[list[CellResult]], int] = {}
    with ProcessPoolExecutor(devices, mp_context=get_context("spawn")) as pool:
        for job in jobs:
            if not free:
                yield from _finished(running, free)
            device = free.pop()
            running[pool.submit(run_job, job, device if _is_cuda(accelerator) else None)] = device
        while running:
            yield from _finished(running, free)


def _finished(running: dict[Future[list[CellResult]], int], free: list[int]) -> Iterator[list[CellResult]]:
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        free.append(running.pop(future))
        yield future.result()


@cache
def _workplace() -> Workplace:
    """That of this process, one of a pool that lasts as long as a run."""
    register()
    return Workplace()


def run_job(job: Job, device: int | None = None, workplace: Workplace | None = None) -> list[CellResult]:
    """The results of a job; what fails is reported, and the rest of its cells is done.

    Args:
        job: The job.
        device: Number of its GPU; the first otherwise.
        workplace: What it shares with others; that of this process otherwise.

    Raises:
        OSError: The disk is full.
    """
    try:
        return cast("list[CellResult]", job.run(workplace or _workplace(), device))
    except Exception as error:  # whatever a model raises, the rest is done
        cause: BaseException = error
        while cause.__cause__ is not None:  # anomalib's own wrapper says nothing
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
            raise cause from None
        if len(job.cells) > 1:  # one setting must not take the others with it
            return [result for part in job.split() for result in run_job(part, device, workplace)]
        logger.exception("%s failed.", job.cells[0])
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        return [CellResult(cell, FAILED, reason, datamodule=job.data.datamodule) for cell in job.cells]


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark of a command line."""
    run(read_arguments(arguments))
