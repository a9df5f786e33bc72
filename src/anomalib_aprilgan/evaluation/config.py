"""The config of a benchmark: its entries, read from YAML and the command line by jsonargparse."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from omegaconf import OmegaConf

from ..config_files import names, path_of

T = TypeVar("T")


@dataclass
class ModelTrainer:
    """How a model that trains is trained, where it is not as anomalib trains it.

    Args:
        max_epochs: Number of epochs.
        max_steps: Number of training steps.
        precision: Precision of training and test, as Lightning names it.
    """

    max_epochs: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    precision: str | PositiveInt | None = None


@dataclass
class TrainerConfig(ModelTrainer):
    """How all models are trained, and how many at once.

    Args:
        devices: How many cells are done at once, each on a device or in a process of its own; all GPUs otherwise, one
            process on a CPU.
    """

    devices: PositiveInt | None = None


@dataclass
class EntryOptions:
    """What an entry of a model or of data has beside `class_path` and `init_args`.

    Args:
        name: In the tables.
        trainer: Of a model: how it is trained, where it is not as `benchmark.trainer` says.
        class_words: Of data: by category, the words that prompts have for it.
    """

    name: str | None = None
    trainer: ModelTrainer = field(default_factory=ModelTrainer)
    class_words: dict[str, str] = field(default_factory=dict)


@dataclass
class BenchmarkConfig:
    """What is compared. As in `anomalib benchmark`, `seed`, `model`, `data` and all within can be one or a `grid`.

    Args:
        model: Models, each with `class_path` and `init_args`, and optionally `name` in the tables and `trainer`; one of
            them, a list, a `grid`, or a mapping from names. A name that stands for nothing (`null`) is left out.
        data: Datamodules, each with `class_path` and `init_args`, and optionally `name` in the tables and
            `class_words`, from a category to the words that prompts have for it; as many as models may be.
        seed: Seeds of the draw of references and of everything else that is random, but for the split of the data.
        k_shot: Numbers of reference images, or `full` for all training images; as every model has it otherwise.
        evaluation_size: Height and width, or side, in pixels to which maps and masks are brought for the metrics of
            pixels; that of each ground truth otherwise. The paper measures at the size of its images, 518.
        metrics: All scores at once, or in bounded memory.
        resamples: Number of bootstrap samples of the test images, for intervals and comparisons; 0 for none.
        shown: Number of images per category in the drawings.
        shared_pass: Whether all settings of AprilGAN are taken from one pass over the images.
        trainer: How models are trained.
    """

    model: dict[str, Any] | list[dict[str, Any]]
    data: dict[str, Any] | list[dict[str, Any]]
    seed: list[NonNegativeInt] = field(default_factory=lambda: [0])
    k_shot: list[NonNegativeInt | Literal["full"]] | None = None
    evaluation_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    metrics: Literal["exact", "streaming"] = "exact"
    resamples: NonNegativeInt = 1000
    shown: NonNegativeInt = 1
    shared_pass: bool = True
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


Accelerator = Literal["auto", "cpu", "cuda", "mps", "xpu"]


@dataclass
class Config:
    """A benchmark and where it goes.

    Args:
        benchmark: What is compared.
        accelerator: Where models run; of several, everything is done on each.
        results: Folder for tables and pictures; the same command goes on where it was interrupted.
        tolerance: Difference to published figures, as a fraction, from which on they are flagged.
    """

    benchmark: BenchmarkConfig
    accelerator: list[Accelerator] = field(default_factory=lambda: ["auto"])
    results: str = "results/benchmark"
    tolerance: NonNegativeFloat = 0.01


def parser() -> ArgumentParser:
    """The parser of the command line, for its help and the checks of its values."""
    parsing = ArgumentParser(
        prog="anomalib-aprilgan benchmark",
        description="Compare anomalib models: tables, plots and pictures. Every entry of the config can be given as an "
        "argument as well, those of models and data too: --benchmark.data.init_args.root=/data/MVTecAD.",
        exit_on_error=False,
    )
    parsing.add_argument(
        "--config",
        type=str,
        help="YAML file, or the name of one that comes with the package, such as benchmark/built_in; other arguments "
        "replace its entries",
    )
    parsing.add_class_arguments(Config)
    return parsing


def read_arguments(given: Sequence[str]) -> dict[str, Any]:
    """The config that a command line names, its other arguments put in, not checked yet.

    Raises:
        FileNotFoundError: There is no such file.
        SystemExit: Help was asked for, and printed.
        ValueError: An argument is not ``--name value`` or ``--name=value``.
    """
    if {"-h", "--help"} & set(given):
        parser().print_help()
        sys.exit()
    entries, rest = [], list(given)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (has_value or rest):
            msg = f"{name!r} must be `--name value` or `--name=value`, as in --benchmark.seed=7; see --help."
            raise ValueError(msg)
        entries.append(f"{name[2:]}={value if has_value else rest.pop(0)}")
    named = [entry.partition("=")[2] for entry in entries if entry.startswith("config=")]
    if not named:
        msg = (
            "`--config` is missing: name a YAML file, or one that comes with the package: --config benchmark/built_in."
        )
        raise ValueError(msg)
    path = path_of(named[-1]) if named[-1] in names() else Path(named[-1])
    if not path.is_file():
        msg = f"`--config`: there is no file {path}, and none of {', '.join(names())} that come with the package."
        raise FileNotFoundError(msg)
    others = [entry for entry in entries if not entry.startswith("config=")]
    merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(others))
    return cast("dict[str, Any]", OmegaConf.to_container(merged, resolve=True))


def checked(config: dict[str, Any]) -> Config:
    """A config with all its defaults.

    Raises:
        ValueError: A key is unknown or missing, or a value is none that it can have.
    """
    benchmark = config.get("benchmark")
    if isinstance(benchmark, dict):
        listed = {key: _listed(benchmark[key]) for key in ("seed", "k_shot") if benchmark.get(key) is not None}
        config = config | {"benchmark": benchmark | listed}
    if "accelerator" in config:
        config = config | {"accelerator": _listed(config["accelerator"])}
    try:
        found = parser().instantiate_classes(parser().parse_object(config))
    except ArgumentError as error:
        raise ValueError(_in_words("config", error)) from None
    return Config(found.benchmark, found.accelerator, found.results, found.tolerance)


def _listed(given: Any) -> list[Any]:  # noqa: ANN401  # YAML
    """One value, a list, or anomalib's ``grid``."""
    values = given["grid"] if isinstance(given, dict) and set(given) == {"grid"} else given
    return list(values) if isinstance(values, list) else [values]


def options_of(given: dict[str, Any], where: str) -> EntryOptions:
    """The options of an entry.

    Raises:
        ValueError: A value is none that an option can have; ``where`` names it in the config.
    """
    parsing = ArgumentParser(exit_on_error=False)
    parsing.add_class_arguments(EntryOptions)
    try:
        found = parsing.instantiate_classes(parsing.parse_object(given))
    except ArgumentError as error:
        raise ValueError(_in_words(where, error)) from None
    return EntryOptions(found.name, found.trainer, found.class_words)


def made(kind: Callable[..., T], entry: dict[str, Any], where: str) -> T:
    """An object of a class below ``kind`` from its ``class_path`` and ``init_args``.

    Raises:
        ValueError: There is no such class, or it does not take these arguments; ``where`` names it in the config.
    """
    parsing, parsed = _parsed(kind, entry, where)
    return cast("T", parsing.instantiate_classes(parsed).entry)


def class_of(kind: Callable[..., T], entry: dict[str, Any], where: str) -> type[T]:
    """The class that an entry names, its arguments checked; errors as ``made``."""
    module, _, name = _parsed(kind, entry, where)[1].entry.class_path.rpartition(".")
    return cast("type[T]", getattr(import_module(module), name))


def _parsed(kind: Callable[..., object], entry: dict[str, Any], where: str) -> tuple[ArgumentParser, Namespace]:
    import_module("..plugin", __package__).register()  # not at the top: help is printed without any model
    parsing = ArgumentParser(exit_on_error=False)
    parsing.add_argument("--entry", type=kind, required=True)
    try:
        return parsing, parsing.parse_object({"entry": entry})
    except ArgumentError as error:
        raise ValueError(_in_words(where, error)) from None


_REMEDIES = {
    "Expected a <class 'str'>": "Put a name that reads as a number into quotation marks: '01'.",
    "Expected a dot import path string": "There is no such class; check the name, or give a full path.",
}


def _in_words(where: str, error: ArgumentError) -> str:
    text = " ".join(str(error).replace('Parser key "entry": ', "").split()).rstrip(".")
    return " ".join([f"`{where}`: {text}.", *(remedy for sign, remedy in _REMEDIES.items() if sign in text)])
