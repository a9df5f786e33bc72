"""The sentences that describe a normal and an anomalous object of a class. Strings only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

# The states and templates of the authors' code (prompt_ensemble.py), in its order. arXiv:2305.17382
# speaks of 85 templates, which is CLIP's list; the code, and with it the published tables, has these 35.
NORMAL_STATES = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ANOMALOUS_STATES = (
    "damaged {}",
    "broken {}",
    "{} with flaw",
    "{} with defect",
    "{} with damage",
)
TEMPLATES = (
    "a bad photo of a {}.",
    "a low resolution photo of the {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a bright photo of a {}.",
    "a dark photo of the {}.",
    "a photo of my {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a photo of one {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "a low resolution photo of a {}.",
    "a photo of a large {}.",
    "a blurry photo of a {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a photo of the small {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "a dark photo of a {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)
_LISTS = ("normal", "anomalous", "templates")
# Words for the categories of MVTec AD and VisA whose names are not words. The published results use the names.
ALIASES = {
    "metal_nut": "metal nut",
    "chewinggum": "chewing gum",
    "fryum": "fried snack",
    "macaroni1": "macaroni",
    "macaroni2": "macaroni",
    "pcb1": "printed circuit board",
    "pcb2": "printed circuit board",
    "pcb3": "printed circuit board",
    "pcb4": "printed circuit board",
    "pipe_fryum": "tubular fried snack",
}


@dataclass(frozen=True)
class PromptEnsemble:
    """States and templates, and the sentences they make for a class name.

    The defaults are the 7 normal states, 5 anomalous states and 35 templates of the published
    method (arXiv:2305.17382, sec. 2.1): 245 and 175 sentences a class.

    Args:
        normal: Phrases with one ``{}`` for the class name that describe a good part.
        anomalous: The same for a bad part.
        templates: Sentences with one ``{}`` for such a phrase.
        classes: Classes with lists of their own.

    Raises:
        ValueError: A list is empty, or an entry has not exactly one ``{}``.
    """

    normal: tuple[str, ...] = NORMAL_STATES
    anomalous: tuple[str, ...] = ANOMALOUS_STATES
    templates: tuple[str, ...] = TEMPLATES
    classes: Mapping[str, PromptEnsemble] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise if a list or an entry makes no sentence."""
        for name in _LISTS:
            entries = getattr(self, name)
            if not entries:
                msg = f"`prompts.{name}` must hold at least one entry, got none."
                raise ValueError(msg)
            for entry in entries:
                if not isinstance(entry, str) or _count_slots(entry) != 1:
                    msg = f"`prompts.{name}` entries need exactly one '{{}}', got {entry!r}."
                    raise ValueError(msg)

    @classmethod
    def from_file(cls, path: str | Path) -> PromptEnsemble:
        """States and templates from a YAML file with the keys ``normal``, ``anomalous``, ``templates``.

        Under ``classes`` classes can have lists of their own, with the same keys. Keys that are absent keep the
        lists above, in the end the published ones.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no YAML mapping, has other keys, or an entry is unusable.
        """
        path = Path(path)
        if not path.is_file():
            msg = f"`prompts`: no file {path}. Pass a YAML file with the keys normal, anomalous, templates."
            raise FileNotFoundError(msg)
        try:
            content = OmegaConf.to_container(OmegaConf.load(path))
        except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
            msg = f"`prompts`: {path} is not readable YAML: {error}"
            raise ValueError(msg) from error
        lists = _read_lists(content, str(path), "classes")
        of_classes = _read_mapping(lists.pop("classes", {}), f"classes in {path}", None)
        common = cls(**lists)
        classes = {
            name: replace(common, **_read_lists(own, f"classes.{name} in {path}")) for name, own in of_classes.items()
        }
        return replace(common, classes=classes)

    def of_class(self, name: str) -> PromptEnsemble:
        """The lists of a class: its own, else the common ones."""
        return self.classes.get(name, self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, to tell whether sentences are still the same."""
        lists: dict[str, Any] = {name: list(getattr(self, name)) for name in _LISTS}
        return lists | {"classes": {name: own.to_dict() for name, own in self.classes.items()}}

    def sentences(self, class_name: str) -> tuple[list[str], list[str]]:
        """The normal and the anomalous sentences of a class, state by state, each in every template.

        Args:
            class_name: The words that stand for the object, taken as they are ("metal_nut").

        Returns:
            Two lists of ``len(states) * len(templates)`` sentences.

        Raises:
            ValueError: The class name is empty.
        """
        if not class_name.strip():
            msg = f"`class_name` must name an object, got {class_name!r}. Try 'object' if nothing better is known."
            raise ValueError(msg)
        return self._expand(self.normal, class_name), self._expand(self.anomalous, class_name)

    def _expand(self, states: tuple[str, ...], class_name: str) -> list[str]:
        # str.replace and not str.format: a class name may itself hold braces.
        phrases = [state.replace("{}", class_name) for state in states]
        return [template.replace("{}", phrase) for phrase in phrases for template in self.templates]


def _read_mapping(content: object, where: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    """A mapping, with keys out of ``known``."""
    if not isinstance(content, dict) or not (known is None or set(content) <= set(known)):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        msg = f"`prompts`: {where} must be a mapping with keys out of {known or 'the class names'}, got {found}."
        raise ValueError(msg)
    return {str(key): value for key, value in content.items()}


def _read_lists(content: object, where: str, *further: str) -> dict[str, Any]:
    """The lists of a mapping as tuples, and its further keys as they are."""
    lists = _read_mapping(content, where, (*_LISTS, *further))
    for key in [key for key in _LISTS if key in lists]:
        if not isinstance(lists[key], list):
            msg = f"`prompts`: {key!r} in {where} must be a list of strings, got {type(lists[key]).__name__}."
            raise ValueError(msg)
        lists[key] = tuple(lists[key])
    return lists


def _count_slots(entry: str) -> int:
    """Number of ``{}`` in a format string; -1 where it has any other brace."""
    try:
        slots = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(entry) if name is not None]
    except ValueError:
        return -1
    return len(slots) if all(slot == ("", "", None) for slot in slots) else -1
