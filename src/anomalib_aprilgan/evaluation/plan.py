"""The cells of a benchmark: which models on which data, with how many references and which seeds."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from anomalib import LearningType
from anomalib.data import AnomalibDataModule
from anomalib.models import Padim
from anomalib.models.components import AnomalibModule
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict

from ..checks import shown
from ..data.datamodules import GatheredData
from ..lightning_model import AprilGAN
from .cells import FULL, Cell
from .config import BenchmarkConfig, EntryOptions, class_of, made, options_of

SPLIT_SEED = 0
"""Seed of the split of a datamodule that was given none: one for all models and seeds."""

_LONGEST_VALUE = 24
# Arguments of AprilGAN that are about references, and what they usually are.
_OF_REFERENCES = {"memory_size": None, "memory_dtype": "float32", "references_unlabelled": False}


@dataclass(frozen=True)
class ModelEntry:
    """One model of the config.

    Args:
        name: In the tables.
        model: Its class.
        config: ``class_path`` and ``init_args``.
        trainer: Arguments of Lightning's trainer.
    """

    name: str
    model: type[AnomalibModule]
    config: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """For its constructor, as the config has them."""
        return dict(self.config.get("init_args") or {})

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

    def shots(self, asked: Sequence[int] | None) -> list[int]:
        """Those of the numbers of references that make sense for it; its own where none are asked for."""
        if asked is None:
            own = inspect.signature(self.model).parameters.get("k_shot")
            k_shot = self.arguments.get("k_shot", 0 if own is None else own.default)
            return [k_shot if self.is_few_shot else 0 if self.is_zero_shot_only else FULL]
        return [k_shot for k_shot in asked if self._takes(k_shot)]

    def _takes(self, k_shot: int) -> bool:
        if 0 < k_shot < self.fewest_images:
            return False
        if self.is_few_shot:
            return k_shot != FULL
        return k_shot == 0 if self.is_zero_shot_only else k_shot != 0

    @property
    def fewest_images(self) -> int:
        """Number of images below which the model is not defined: PaDiM's covariance needs two."""
        return 2 if issubclass(self.model, Padim) else 1

    def is_shared(self, data: DataEntry) -> bool:
        """Whether one pass serves all settings: ours with whole memory banks and of one class, but for tiles."""
        given = self.arguments
        whole, few_shot = given.get("tile_size") is None, given.get("few_shot", "memory_bank") == "memory_bank"
        plain = not any(isinstance(value, dict) and "class_path" in value for value in given.values())
        plain = plain and not any(given.get(name, usual) != usual for name, usual in _OF_REFERENCES.items())
        plain = plain and not any(given.get(name) for name in ("batch_zero_shot", "roi", "outputs"))
        return issubclass(self.model, AprilGAN) and whole and few_shot and plain and not data.is_of_many_classes

    def build(self, cell: Cell, data: DataEntry) -> AnomalibModule:
        """The model of a cell."""
        arguments = self.arguments_for(data)
        if self.is_few_shot:
            arguments["k_shot"] = cell.k_shot
            if not cell.k_shot:
                for name in ("references", *_OF_REFERENCES):  # those of the other settings
                    arguments.pop(name, None)
        if issubclass(self.model, AprilGAN):
            arguments["seed"] = cell.seed
        return made(AnomalibModule, self.config | {"init_args": arguments}, f"benchmark.model ({self.name})")

    def arguments_for(self, data: DataEntry) -> dict[str, Any]:
        """Its arguments, with the words for the classes of the data where it takes such."""
        is_ours, words = issubclass(self.model, AprilGAN), data.class_words
        if not words or "class_name" not in inspect.signature(self.model).parameters:
            return self.arguments
        if is_ours and (data.is_of_many_classes or data.category):
            return {"class_name": words} | self.arguments
        return {"class_name": next(iter(words.values()))} | self.arguments


@dataclass(frozen=True)
class DataEntry:
    """One datamodule of the config.

    Args:
        name: In the tables, where rows of one name are means over categories.
        datamodule: Name of its class.
        category: Its category; empty for data without.
        config: ``class_path`` and ``init_args``.
        is_of_many_classes: Whether its images are of several classes, each told by the batch.
        class_words: What prompts call the category, or each of the classes; by its name.
    """

    name: str
    datamodule: str
    category: str
    config: dict[str, Any]
    is_of_many_classes: bool = False
    class_words: dict[str, str] = field(default_factory=dict)

    def build(self) -> AnomalibDataModule:
        """The datamodule, which splits its images alike for everyone."""
        datamodule = made(AnomalibDataModule, self.config, f"benchmark.data ({self.name})")
        if getattr(datamodule, "seed", None) is None:
            datamodule.seed = SPLIT_SEED
        return datamodule


@dataclass(frozen=True)
class Plan:
    """A config, read and checked.

    Args:
        models: The models.
        data: The datamodules, one for each category.
        shots: Numbers of references; none if every model has its own.
        seeds: Seeds.
        accelerators: Where models run.
        options: The other entries.
    """

    models: tuple[ModelEntry, ...]
    data: tuple[DataEntry, ...]
    shots: tuple[int, ...] | None
    seeds: tuple[int, ...]
    accelerators: tuple[str, ...]
    options: BenchmarkConfig

    def groups(self, accelerator: str) -> Iterator[tuple[ModelEntry, DataEntry, list[Cell]]]:
        """Cells that one model and one category have, in the order of the config."""
        for data in self.data:
            for entry in self.models:
                cells = [
                    Cell(entry.name, data.name, data.category, k_shot, seed, accelerator)
                    for k_shot in entry.shots(self.shots)
                    for seed in (self.seeds if k_shot else self.seeds[:1])
                ]
                yield entry, data, cells

    def cells(self) -> list[Cell]:
        """All of them."""
        return [cell for accelerator in self.accelerators for *_, cells in self.groups(accelerator) for cell in cells]


def read_plan(config: BenchmarkConfig, accelerators: Sequence[str] = ("auto",)) -> Plan:
    """What a config asks for.

    Raises:
        ValueError: A class or argument is unknown, two entries have the same name, or there is nothing to do.
    """
    shots = None if config.k_shot is None else tuple(FULL if given == "full" else given for given in config.k_shot)
    plan = Plan(_models(config), _data(config), shots, tuple(config.seed), tuple(accelerators), config)
    lists = {"seed": plan.seeds, "k_shot": plan.shots or (), "accelerator": plan.accelerators}
    for key, values in lists.items():
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            msg = f"`{key}` names {'full' if twice[0] == FULL else twice[0]} more than once, got {[*values]}."
            raise ValueError(msg)
    if not plan.cells():
        words = ", ".join("full" if k_shot == FULL else str(k_shot) for k_shot in plan.shots or ())
        names = ", ".join(entry.name for entry in plan.models)
        msg = (
            f"`benchmark` asks for nothing: none of {names} can be tested with `k_shot` {words}. Zero-shot models take "
            "0, those that only learn from normal images others and `full`; leave `k_shot` out for what each takes."
        )
        raise ValueError(msg)
    return plan


def _models(config: BenchmarkConfig) -> tuple[ModelEntry, ...]:
    entries = _expanded("model", config.model, {"name", "trainer"})
    found = []
    for name, entry in zip(_names(entries, [None] * len(entries), "model"), entries, strict=True):
        own = {key: value for key, value in vars(entry.options.trainer).items() if value is not None}
        trainer = {key: value for key, value in (vars(config.trainer) | own).items() if value is not None}
        trainer.pop("devices", None)
        model = class_of(AnomalibModule, entry.config, f"benchmark.model ({name})")
        found.append(ModelEntry(name, model, entry.config, trainer))
    return tuple(found)


def _data(config: BenchmarkConfig) -> tuple[DataEntry, ...]:
    entries = _expanded("data", config.data, {"name", "class_words"})
    modules = [made(AnomalibDataModule, entry.config, "benchmark.data") for entry in entries]
    own = [None if module.name == type(module).__name__ else module.name for module in modules]
    categories = [str(getattr(module, "category", None) or "") for module in modules]
    names = _names(entries, own, "data", categories)
    found = []
    for entry in entries:
        known = [name for other, name in zip(entries, categories, strict=True) if other.source == entry.source]
        words, is_of_many = entry.options.class_words, isinstance(modules[entries.index(entry)], GatheredData)
        if words and not is_of_many and not set(words) & set(known):
            msg = f"`benchmark.data.class_words` has words for {', '.join(words)}, and none for {', '.join(known)}."
            raise ValueError(msg)
    for name, entry, module, category in zip(names, entries, modules, categories, strict=True):
        words, is_of_many = entry.options.class_words, isinstance(module, GatheredData)
        chosen = words if is_of_many else {key: text for key, text in words.items() if key == category}
        found.append(DataEntry(name, type(module).__name__, category, entry.config, is_of_many, chosen))
    return tuple(found)


@dataclass(frozen=True)
class _Entry:
    """An entry of the config without a grid: ``source`` is its place before the grids were expanded."""

    config: dict[str, Any]
    options: EntryOptions
    source: int


def _expanded(key: str, given: Any, options: set[str]) -> list[_Entry]:  # noqa: ANN401  # YAML
    """Every combination of the grids of an entry, of a list of entries, or of entries by their names."""
    given = _with_grids(given)
    entries = given["grid"] if isinstance(given, dict) and set(given) == {"grid"} else given
    if isinstance(entries, dict):
        is_named = "class_path" not in entries and all(isinstance(one, dict | None) for one in entries.values())
        entries = [{"name": name} | one for name, one in entries.items() if one] if is_named else [entries]
    if not isinstance(entries, list) or not entries or not all("class_path" in entry for entry in entries):
        msg = f"`benchmark.{key}` must be a mapping with `class_path`, or a list or `grid` of such, got {shown(given)}."
        raise ValueError(msg)
    found = []
    for source, entry in enumerate(entries):
        kept = options_of({name: entry[name] for name in options & set(entry)}, f"benchmark.{key}")
        rest = {name: value for name, value in entry.items() if name not in options}
        found += [_Entry(config, kept, source) for config in get_iterator_from_grid_dict(rest)]
    return found


def _with_grids(given: Any) -> Any:  # noqa: ANN401  # YAML
    """``grid_search``, as anomalib's older documentation has it, as ``grid``."""
    if isinstance(given, list):
        return [_with_grids(one) for one in given]
    if not isinstance(given, dict):
        return given
    return {"grid" if key == "grid_search" else key: _with_grids(value) for key, value in given.items()}


def _names(
    entries: Sequence[_Entry], own: Sequence[str | None], key: str, categories: Sequence[str] | None = None
) -> list[str]:
    """Names in the tables: given, the datamodule's own, or the class; with what varies within a grid or a class.

    Raises:
        ValueError: Two entries have the same name and category.
    """
    bases = [entry.options.name or name for entry, name in zip(entries, own, strict=True)]
    classes = [entry.config["class_path"].rpartition(".")[2] for entry in entries]
    groups = [(base, entry.source) if base else cls for entry, base, cls in zip(entries, bases, classes, strict=True)]
    flat = [flatten_dict(entry.config) for entry in entries]
    apart = {"init_args.category"} if categories else set()  # the tables have a place of its own for it
    names = []
    for base, cls, group, values in zip(bases, classes, groups, flat, strict=True):
        like = [other for other, of in zip(flat, groups, strict=True) if of == group]
        varying = [name for name in values if any(other.get(name) != values[name] for other in like)]
        words = [f"{name.rpartition('.')[2]}={_short(values[name])}" for name in varying if name not in apart]
        names.append(" ".join([str(base or cls), *words]))
    labels = list(zip(names, categories or [""] * len(names), strict=True))
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        msg = (
            f"`benchmark.{key}` has {labels.count(twice)} entries named {' '.join(filter(None, twice))!r}. Give each a "
            "`name` of its own."
        )
        raise ValueError(msg)
    return names


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else hashlib.sha256(text.encode()).hexdigest()[:6]
