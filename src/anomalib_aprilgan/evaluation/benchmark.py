"""Any anomalib model x data x category x number of references x seed, from one YAML: tables, plots and pictures.

An anomalib pipeline: ``anomalib-aprilgan-benchmark --config configs/benchmark.yaml``, or :class:`Comparison` from
Python. It takes the files of ``anomalib benchmark`` and some keys more (:func:`read_config`).
"""

from __future__ import annotations

import errno
import inspect
import logging
import re
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.resources import as_file, files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.models import Padim
from anomalib.models.components import AnomalibModule
from anomalib.models.image.winclip import torch_model as winclip
from anomalib.pipelines.benchmark import Benchmark
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
from anomalib.pipelines.components import Runner
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from jsonargparse import ArgumentParser, Namespace
from omegaconf import OmegaConf
from rich.console import Console
from rich.markdown import Markdown
from tqdm import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own

from ..lightning_model import AprilGAN
from ..plugin import register
from ..weights import write_atomically
from . import plots, tables
from .cells import FAILED, FULL, Cell, CellResult, Results, file_stem
from .figures import heatmap_figure
from .jobs import CellJob, SharedPassJob, Task
from .provenance import hardware, now, versions

logger = logging.getLogger(__name__)

_TOP = {"accelerator", "results", "tolerance", "benchmark"}
_BENCHMARK = {"seed", "k_shot", "model", "data", "metrics", "shown", "shared_pass"}
_MODEL = {"class_path", "init_args", "name", "weights"}
_DATA = {"class_path", "init_args"}
_GENERATED = "generated"
_GENERATED_CLIP = "ViT-generated-240"
_BARS = ("image_auroc", "pixel_auroc", "aupro")
_CURVES = ("image_auroc", "pixel_auroc", "pixel_f1_max", "aupro")
# The disk, or the user's share of it, is full: no later cell would fare better.
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class ModelEntry:
    """One model of the config.

    Args:
        name: In the tables.
        model: Its class.
        arguments: For its constructor.
        generated: Whether its weights are random instead of downloaded; its figures then mean nothing.
    """

    name: str
    model: type[AnomalibModule]
    arguments: dict[str, Any]
    generated: bool

    @property
    def is_few_shot(self) -> bool:
        """Whether it takes reference images by itself."""
        return "k_shot" in inspect.signature(self.model).parameters

    @property
    def is_zero_shot_only(self) -> bool:
        """Whether it learns nothing and takes no references."""
        ask = getattr(self.model.learning_type, "fget", None)
        try:
            return not self.is_few_shot and ask is not None and ask(SimpleNamespace()) == LearningType.ZERO_SHOT
        except AttributeError:  # it depends on the instance
            return False

    def takes(self, k_shot: int) -> bool:
        """Whether a cell of so many shots makes sense."""
        if 0 < k_shot < self.fewest_images:
            return False
        if self.is_few_shot:
            return k_shot != FULL
        return k_shot == 0 if self.is_zero_shot_only else k_shot != 0

    @property
    def fewest_images(self) -> int:
        """Number of images below which the model is not defined: PaDiM's covariance needs two."""
        return 2 if issubclass(self.model, Padim) else 1

    @property
    def is_shared(self) -> bool:
        """Whether one pass serves all settings: ours, but for tiles."""
        return issubclass(self.model, AprilGAN) and self.arguments.get("tile_size") is None

    def build(self, k_shot: int) -> AnomalibModule:
        """The model of a setting."""
        arguments = dict(self.arguments)
        if self.is_few_shot:
            arguments["k_shot"] = k_shot
        if self.generated and "pre_trained" in inspect.signature(self.model).parameters:
            arguments["pre_trained"] = False
        with _without_downloads() if self.generated else nullcontext():
            return self.model(**arguments)


@contextmanager
def _without_downloads() -> Iterator[None]:
    """WinCLIP names its CLIP in two constants; a small random one for as long as it is built."""
    module: Any = winclip
    before = module.BACKBONE, module.PRETRAINED
    with as_file(files(__package__) / f"{_GENERATED_CLIP}.json") as path:
        module.open_clip.add_model_config(path)
    module.BACKBONE, module.PRETRAINED = _GENERATED_CLIP, None
    try:
        yield
    finally:
        module.BACKBONE, module.PRETRAINED = before


@dataclass(frozen=True)
class Plan:
    """A config, read and checked.

    Args:
        models: The models.
        data: One config per datamodule and category.
        shots: Numbers of references.
        seeds: Seeds.
        streaming: Whether metrics are taken in bounded memory.
        shown: Number of images per category in the pictures.
        shared_pass: Whether all settings of ours are taken from one pass.
    """

    models: tuple[ModelEntry, ...]
    data: tuple[dict[str, Any], ...]
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    streaming: bool
    shown: int
    shared_pass: bool

    def groups(self) -> Iterator[tuple[ModelEntry, dict[str, Any], list[Cell]]]:
        """Cells that one model and one category have, in the order of the config."""
        for data in self.data:
            dataset, category = data["class_path"].rpartition(".")[2], str(data["init_args"].get("category", ""))
            for entry in self.models:
                cells = [
                    Cell(entry.name, dataset, category, k_shot, seed)
                    for k_shot in self.shots
                    if entry.takes(k_shot)
                    for seed in (self.seeds if k_shot else self.seeds[:1])
                ]
                yield entry, data, cells

    def cells(self) -> list[Cell]:
        """All of them."""
        return [cell for _, _, cells in self.groups() for cell in cells]


def read_config(config: dict[str, Any]) -> Plan:
    """Read and check the part ``benchmark`` of a config.

    Args:
        config: ``seed``, ``model`` and ``data`` as in ``anomalib benchmark``, each one or a ``grid``; ``k_shot``,
            numbers of references or ``full``. Models may also be a mapping from their names in the tables, and have
            ``weights: generated`` (random ones, offline). ``metrics`` is ``exact`` or ``streaming``; ``shown`` the
            number of images per category in the pictures; ``shared_pass: false`` tests the settings of ours one by
            one.

    Raises:
        ValueError: A key or model is unknown, or a value is none of those that can be.
    """
    register()
    _check_keys("benchmark", config, _BENCHMARK)
    for key in ("model", "data"):
        if key not in config:
            msg = f"`benchmark.{key}` is missing: name at least one, `{key}: {{class_path: ...}}`."
            raise ValueError(msg)
    entries = _models(config["model"])
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        msg = f"`benchmark.model` has {names.count(twice[0])} models named {twice[0]!r}. Give each a `name`."
        raise ValueError(msg)
    metrics = config.get("metrics", "exact")
    if metrics not in {"exact", "streaming"}:
        msg = f"`benchmark.metrics` must be exact or streaming, got {metrics!r}."
        raise ValueError(msg)
    return Plan(
        models=tuple(entries),
        data=tuple(_data(config["data"])),
        shots=tuple(FULL if value == "full" else _count("k_shot", value) for value in _listed(config.get("k_shot", 0))),
        seeds=tuple(_count("seed", value) for value in _listed(config.get("seed", 0))),
        streaming=metrics == "streaming",
        shown=_count("shown", config.get("shown", 1)),
        shared_pass=bool(config.get("shared_pass", True)),
    )


def _models(given: Any) -> list[ModelEntry]:  # noqa: ANN401  # YAML
    entries = []
    for expanded in _expanded("model", given):
        _check_keys("benchmark.model", expanded, _MODEL)
        path = expanded.get("class_path", "")
        model = _class_of(path, "anomalib.models", AnomalibModule, "benchmark.model.class_path")
        arguments = dict(expanded.get("init_args") or {})
        _check_arguments(model, arguments, f"benchmark.model ({path})")
        weights = expanded.get("weights")
        if weights not in {None, _GENERATED}:
            msg = (
                f"`benchmark.model.weights` must be {_GENERATED!r} or left out, got {weights!r}. Files of weights are "
                "named by the arguments of the model."
            )
            raise ValueError(msg)
        name = expanded.get("name") or model.__name__
        entries.append(ModelEntry(f"{name} (random weights)" if weights else name, model, arguments, bool(weights)))
    return entries


def _data(given: Any) -> list[dict[str, Any]]:  # noqa: ANN401  # YAML
    entries = []
    for expanded in _expanded("data", given):
        _check_keys("benchmark.data", expanded, _DATA)
        path = expanded.get("class_path", "")
        datamodule = _class_of(path, "anomalib.data", AnomalibDataModule, "benchmark.data.class_path")
        arguments = dict(expanded.get("init_args") or {})
        _check_arguments(datamodule, arguments, f"benchmark.data ({path})")
        entries.append({"class_path": path, "init_args": arguments})
    return entries


def _expanded(key: str, given: Any) -> list[dict[str, Any]]:  # noqa: ANN401  # YAML
    """Every combination of the grids of an entry, of a list of entries, or of models by their names."""
    entries = given["grid"] if isinstance(given, dict) and set(given) == {"grid"} else given
    if isinstance(entries, dict):
        named = (
            key == "model"
            and "class_path" not in entries
            and all(isinstance(one, dict | None) for one in entries.values())
        )
        entries = [{"name": name} | one for name, one in entries.items() if one] if named else [entries]
    if not isinstance(entries, list) or not entries or not all("class_path" in entry for entry in entries):
        msg = f"`benchmark.{key}` must be a mapping with `class_path`, or a list or `grid` of such, got {given!r}."
        raise ValueError(msg)
    return [expanded for entry in entries for expanded in get_iterator_from_grid_dict(entry)]


def _listed(given: Any) -> list[Any]:  # noqa: ANN401  # YAML
    """One value, a list, or anomalib's ``grid``."""
    values = given["grid"] if isinstance(given, dict) and set(given) == {"grid"} else given
    return list(values) if isinstance(values, list) else [values]


def _count(key: str, value: Any) -> int:  # noqa: ANN401  # YAML
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        extra = ", or full" if key == "k_shot" else ""
        msg = f"`benchmark.{key}` must be a whole number from 0 on{extra}, got {value!r}."
        raise ValueError(msg)
    return value


def _check_keys(where: str, given: Any, known: set[str]) -> None:  # noqa: ANN401  # YAML
    unknown = sorted(set(given) - known)
    if unknown:
        msg = f"`{where}` has the unknown key {unknown[0]!r}; it knows {', '.join(sorted(known))}."
        raise ValueError(msg)


def _class_of(path: str, home: str, kind: type, argument: str) -> type[Any]:
    """The class of a name in anomalib, or of a full path.

    Raises:
        ValueError: There is none, or it is of another kind.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module or home), name, None)
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, kind)):
        msg = f"`{argument}`: {path!r} is no {kind.__name__} of {module or home}. Check the name, or give a full path."
        raise ValueError(msg)
    return found


def _check_arguments(called: type, arguments: dict[str, Any], where: str) -> None:
    parameters = inspect.signature(called).parameters
    if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = sorted(set(arguments) - set(parameters))
    if unknown:
        msg = f"`{where}` has no argument {unknown[0]!r}; it takes {', '.join(parameters)}."
        raise ValueError(msg)


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
                yield SharedPassJob(self.task, missing, entry.arguments, _maker_of(data))
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
    _check_keys("config", config, _TOP)
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
        settings = [key for key in shown[0].files if key not in {"image", "mask"}] if shown else []
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
