"""What a learned thing was made from, and so whether it is still the right one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

_LONGEST = 200  # characters of an ingredient
# What may be held of a class while good parts join its memory bank: its values in a post-processor, or its bounds in a
# fusion; whether they are fixed; scores and appearances, the latter of so many numbers each, of the good parts that
# calibrated them.
HELD = (
    "image_min", "image_threshold", "image_max", "pixel_min", "pixel_threshold", "pixel_max",
    "map_maximum_min", "map_maximum_max", "low", "high", "fixed", "scores", "appearances", "width",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything that a learned thing's numbers depend on, as plain text by name.

    A thing is kept where its recipe equals the one that is wanted now, and made anew where it does not. Recipes hold
    digests of contents and settings that change numbers. They hold neither paths nor times.
    """

    ingredients: Mapping[str, str]

    @classmethod
    def of(cls, **ingredients: Any) -> Recipe:  # noqa: ANN401  # plain values and recipes
        """Recipe of these ingredients: plain values, or recipes of what the thing rests on."""
        return cls(
            {name: value.digest if isinstance(value, Recipe) else _text(value) for name, value in ingredients.items()}
        )

    @property
    def digest(self) -> str:
        """Short name of the whole recipe."""
        return digest(json.dumps(dict(self.ingredients), sort_keys=True).encode())

    def agrees(self, wanted: Recipe, *ignored: str) -> bool:
        """Whether all that is known of this recipe is as wanted; one of an earlier version may know less."""
        return all(
            wanted.ingredients.get(name) == text for name, text in self.ingredients.items() if name not in ignored
        )


@dataclass(frozen=True)
class Acceptance:
    """Good parts that joined the memory bank of a class at one time.

    Attributes:
        when: Date and time, ISO 8601, in UTC.
        files: Their paths, for the log.
        contents: Digests of their contents.
        parts: How many images, or tiles of them, the memory bank grew by.
        values: What has changed since of the class in the post-processor, by name, as it was before.
        recipes: The recipes of bounds and calibration before.
    """

    when: str
    files: list[str]
    contents: list[str]
    parts: int
    values: Mapping[str, list[float]]
    recipes: Mapping[str, Mapping[str, Mapping[str, str]] | None]


@dataclass
class RowRecipes:
    """The recipes of what one class has; ``None`` for what was not made yet.

    ``bounds`` are those of the score, with thresholds by default or by validation. ``asked`` says in words where the
    references were to be drawn from, ``references`` their paths, for the log, ``contents`` the digests of their
    contents. ``accepted`` are the good parts that joined them later, in this order. ``asked_roi`` is what the region of
    interest was to be.
    """

    text: Recipe | None = None
    bank: Recipe | None = None
    bounds: Recipe | None = None
    calibration: Recipe | None = None
    asked: str = ""
    references: list[str] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    accepted: list[Acceptance] = field(default_factory=list)
    roi: Recipe | None = None
    asked_roi: str = ""

    @property
    def accepted_contents(self) -> list[str]:
        """Digests of the contents of all accepted images."""
        return [content for acceptance in self.accepted for content in acceptance.contents]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RowRecipes:
        """From what ``to_dict`` returned."""
        parts: dict[str, Any] = {
            name: Recipe(**value) if isinstance(value, dict) else value for name, value in content.items()
        }
        parts["accepted"] = [Acceptance(**entry) for entry in content.get("accepted", [])]
        return cls(**parts)


def digest(content: bytes) -> str:
    """Sixteen bytes of BLAKE2b, as hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes and values: the same in every order and number type that holds the values exactly."""

    def digest_of_one(name: str) -> bytes:
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        content = hashlib.blake2b(f"{name} {tuple(value.shape)} ".encode())
        content.update(value.view(-1).numpy().data)
        return content.digest()

    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        return digest(b"".join(pool.map(digest_of_one, sorted(tensors))))


def _text(value: object) -> str:
    """Plain text of a value; its digest where that is shorter."""
    text = json.dumps(value, sort_keys=True, default=list)
    return text if len(text) <= _LONGEST else digest(text.encode())
