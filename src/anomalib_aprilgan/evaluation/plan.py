"""What a benchmark's config asks for: models, data, numbers of references and seeds, read and checked."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import as_file, files
from types import SimpleNamespace
from typing import Any

from anomalib import LearningType
from anomalib.data import AnomalibDataModule
from anomalib.models import Padim
from anomalib.models.components import AnomalibModule
from anomalib.models.image.winclip import torch_model as winclip
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict

from ..lightning_model import AprilGAN
from ..plugin import register
from .cells import FULL, Cell

_BENCHMARK = {"seed", "k_shot", "model", "data", "metrics", "shown", "shared_pass"}
_MODEL = {"class_path", "init_args", "name", "weights"}
_DATA = {"class_path", "init_args"}
_GENERATED = "generated"
_GENERATED_CLIP = "ViT-generated-240"


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
        """Whether one pass serves all settings: ours with memory banks, but for tiles."""
        whole, few_shot = self.arguments.get("tile_size") is None, self.arguments.get("few_shot", "memory_bank")
        return issubclass(self.model, AprilGAN) and whole and few_shot == "memory_bank"

    def build(self, k_shot: int) -> AnomalibModule:
        """The model of a setting."""
        arguments = dict(self.arguments)
        if self.is_few_shot:
            arguments["k_shot"] = k_shot
            if not k_shot:
                arguments.pop("references", None)  # those of the other settings
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
        shown: Number of images per category in the drawings.
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
            number of images per category in the drawings; ``shared_pass: false`` tests the settings of ours one by
            one.

    Raises:
        ValueError: A key or model is unknown, or a value is none of those that can be.
    """
    register()
    check_keys("benchmark", config, _BENCHMARK)
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
        check_keys("benchmark.model", expanded, _MODEL)
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
        check_keys("benchmark.data", expanded, _DATA)
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


def check_keys(where: str, given: Any, known: set[str]) -> None:  # noqa: ANN401  # YAML
    """Refuse what would be ignored.

    Raises:
        ValueError: ``given`` has a key that is not ``known``; ``where`` names it in the config.
    """
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
