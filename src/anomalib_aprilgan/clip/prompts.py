"""The sentences that describe a normal and an anomalous object of a class. Strings only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from ..checks import check_text, shown
from ..files import is_file

LONGEST = 1000  # characters of a class name or an entry, far more than any context holds
_MOST_SENTENCES, _LARGEST_FILE = 100_000, 2**20
_LISTS = ("normal", "anomalous", "templates")
# The authors' lists, in the order of their code.
_PUBLISHED = yaml.safe_load(Path(__file__).with_name("published_prompts.yaml").read_text(encoding="utf-8"))
NORMAL_STATES, ANOMALOUS_STATES, TEMPLATES = (tuple[str, ...](_PUBLISHED[name]) for name in _LISTS)
# Words for the categories of MVTec AD and VisA whose names are not words.
ALIASES: dict[str, str] = yaml.safe_load(Path(__file__).with_name("class_aliases.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class PromptEnsemble:
    """States and templates, and the sentences they make for a class name; by default the published ones.

    A state is a phrase for a good or a bad part with one ``{}`` for the class name; a template is a sentence with one
    ``{}`` for a state. The published 7 normal states, 5 anomalous ones and 35 templates (arXiv:2305.17382, sec. 2.1)
    make 245 and 175 sentences. ``classes`` have lists of their own.
    """

    normal: tuple[str, ...] = NORMAL_STATES
    anomalous: tuple[str, ...] = ANOMALOUS_STATES
    templates: tuple[str, ...] = TEMPLATES
    classes: Mapping[str, PromptEnsemble] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every list and entry."""
        for name in _LISTS:
            entries = getattr(self, name)
            if not entries:
                msg = f"`prompts.{name}` must hold at least one entry, got none."
                raise ValueError(msg)
            for entry in entries:
                if isinstance(entry, str) and len(entry) > LONGEST:
                    msg = f"`prompts.{name}` entries must have at most {LONGEST} characters, got {len(entry)}."
                    raise ValueError(msg)
                if not isinstance(entry, str) or not _has_one_slot(entry):
                    msg = f"`prompts.{name}` entries need exactly one '{{}}', got {shown(entry)}."
                    raise ValueError(msg)
        number = max(len(self.normal), len(self.anomalous)) * len(self.templates)
        if number > _MOST_SENTENCES:
            msg = f"`prompts` must make at most {_MOST_SENTENCES} sentences of a kind, got {number}: leave some out."
            raise ValueError(msg)

    @classmethod
    def of(cls, prompts: str | Path | Mapping[str, Any] | None) -> PromptEnsemble:
        """The lists of a YAML file, or of its content; the published ones for ``None``."""
        if prompts is None:
            return cls()
        if isinstance(prompts, Mapping):
            return cls._from_content(prompts, "the mapping")
        return cls.from_file(check_text("prompts", prompts, "a YAML file, or a mapping of lists"))

    @classmethod
    def from_file(cls, path: str | Path) -> PromptEnsemble:
        """Lists of a YAML file with the keys ``normal``, ``anomalous``, ``templates``, and under ``classes`` by class.

        A class without one of the lists has the common one, and a file without one has the published one.
        """
        path = Path(path)
        if not is_file(path):
            msg = f"`prompts`: no file {path}. Pass a YAML file with the keys normal, anomalous, templates."
            raise FileNotFoundError(msg)
        try:
            if path.stat().st_size > _LARGEST_FILE:
                msg = f"it has {path.stat().st_size} bytes, more than {_LARGEST_FILE}"
                raise ValueError(msg)
            content = yaml.safe_load(path.read_text(encoding="utf-8"))  # repeats anchors without copying them
        except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
            msg = f"`prompts`: {path} is not readable YAML: {error}"
            raise ValueError(msg) from error
        return cls._from_content(content, str(path))

    @classmethod
    def _from_content(cls, content: object, where: str) -> PromptEnsemble:
        lists = _read_lists(content, where, "classes")
        of_classes = _read_mapping(lists.pop("classes", {}), f"classes in {where}", None)
        common = cls(**lists)
        classes = {
            name: replace(common, **_read_lists(own, f"classes.{name} in {where}")) for name, own in of_classes.items()
        }
        return replace(common, classes=classes)

    def of_class(self, name: str) -> PromptEnsemble:
        """The lists of a class: its own, else the common ones."""
        return self.classes.get(name, self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, from which ``of`` makes the same again."""
        lists: dict[str, Any] = {name: list(getattr(self, name)) for name in _LISTS}
        classes = {name: own.to_dict() for name, own in self.classes.items()}
        return lists | ({"classes": classes} if classes else {})

    def sentences(self, class_name: str) -> tuple[list[str], list[str]]:
        """The normal and the anomalous sentences of a class name as it is ("metal_nut"), state by state."""
        if not class_name.strip():
            msg = f"`class_name` must name an object, got {class_name!r}. Try 'object' if nothing better is known."
            raise ValueError(msg)
        if len(class_name) > LONGEST:
            msg = f"`class_name` must have at most {LONGEST} characters, got {len(class_name)}."
            raise ValueError(msg)
        return self._expand(self.normal, class_name), self._expand(self.anomalous, class_name)

    def _expand(self, states: tuple[str, ...], class_name: str) -> list[str]:
        # str.replace and not str.format: a class name may itself hold braces.
        phrases = [state.replace("{}", class_name) for state in states]
        return [template.replace("{}", phrase) for phrase in phrases for template in self.templates]


def _read_mapping(content: object, where: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    if not isinstance(content, Mapping) or not (known is None or set(content) <= set(known)):
        found = shown(sorted(map(str, content))) if isinstance(content, Mapping) else type(content).__name__
        msg = f"`prompts`: {where} must be a mapping with keys out of {known or 'the class names'}, got {found}."
        raise ValueError(msg)
    return {str(key): value for key, value in content.items()}


def _read_lists(content: object, where: str, *further: str) -> dict[str, Any]:
    lists = _read_mapping(content, where, (*_LISTS, *further))
    for key in [key for key in _LISTS if key in lists]:
        if isinstance(lists[key], str) or not isinstance(lists[key], Sequence):
            msg = f"`prompts`: {key!r} in {where} must be a list of strings, got {type(lists[key]).__name__}."
            raise ValueError(msg)
        lists[key] = tuple(lists[key])
    return lists


def _has_one_slot(entry: str) -> bool:
    try:
        slots = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(entry) if name is not None]
    except ValueError:  # an odd brace
        return False
    return slots == [("", "", None)]
