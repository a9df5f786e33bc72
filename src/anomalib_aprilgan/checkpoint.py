"""Adapter files: our safetensors with provenance, and the authors' ``.pth`` without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .backbone import ClipArchitecture
from .weights import read_state_dict, write_atomically

# The mapping in the authors' files (train.py).
AUTHORS_KEY = "trainable_linearlayer"
METADATA_KEY = "anomalib_aprilgan"


@dataclass(frozen=True)
class Provenance:
    """What adapters were trained on and for; ``None`` or empty where that is not known.

    Attributes:
        trained_on: anomalib's data set names and the categories used; an empty list stands for all.
        backbone: Architecture name.
        fingerprint: Short hash of CLIP's weights (:attr:`ClipBackbone.fingerprint`).
        stages: Tapped blocks, counted from 1.
        quick_gelu: Activation CLIP ran with.
        image_size: Height and width in pixels.
        versions: Packages and their versions.
    """

    trained_on: dict[str, list[str]] = field(default_factory=dict)
    backbone: str | None = None
    fingerprint: str | None = None
    stages: list[int] | None = None
    quick_gelu: bool | None = None
    image_size: list[int] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Provenance:
        """From what :meth:`to_dict` returned; keys of later versions are left out."""
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in content.items() if key in known})

    def was_trained_on(self, dataset: str, categories: list[str]) -> list[str]:
        """The categories among these that the adapters have seen; all of them where only the data set is known."""
        if dataset not in self.trained_on:
            return []
        seen = self.trained_on[dataset]
        return [category for category in categories if category in seen] if seen else categories

    def check(self, architecture: ClipArchitecture, fingerprint: str, stages: tuple[int, ...], source: str) -> None:
        """Refuse adapters that were trained for another CLIP or other stages.

        Raises:
            ValueError: They were; both sides are named.
        """
        if self.stages is not None and tuple(self.stages) != stages:
            msg = f"`adapters`: {source} was trained for stages {tuple(self.stages)}, the model taps {stages}."
            raise ValueError(msg)
        if self.fingerprint is not None and self.fingerprint != fingerprint:
            msg = (
                f"`adapters`: {source} was trained for the CLIP {self.backbone} with weights {self.fingerprint}, "
                f"the model has {architecture.name} with weights {fingerprint}."
            )
            raise ValueError(msg)


def load_adapters(path: Path) -> tuple[dict[str, Tensor], Provenance]:
    """Weights and provenance of an adapter file.

    Args:
        path: Our ``.safetensors`` or the authors' ``.pth``.

    Returns:
        ``fc.<i>.weight`` ``(D, C)`` and ``fc.<i>.bias`` ``(D,)``, and where they come from.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or holds no adapters.
    """
    state_dict = read_state_dict(path, "adapters", nested_under=AUTHORS_KEY)
    if not all(name.startswith("fc.") for name in state_dict):
        msg = f"`adapters`: {path} holds no adapters: expected names fc.<i>.weight and fc.<i>.bias, got {_some(state_dict)}."
        raise ValueError(msg)
    return state_dict, _read_provenance(path)


def save_adapters(path: Path, state_dict: Mapping[str, Tensor], provenance: Provenance) -> None:
    """Write adapters and their provenance as safetensors, under a temporary name first."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    content = save(tensors, metadata={METADATA_KEY: json.dumps(provenance.to_dict())})
    write_atomically(path, lambda file: file.write(content))


def check_shapes(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Refuse adapters of another width or for another number of stages.

    Raises:
        ValueError: Both sides are named.
    """
    found_stages, stages = len(state_dict) // 2, len(expected) // 2
    if set(state_dict) != set(expected):
        msg = f"`adapters`: {source} is for {found_stages} stages, the model taps {stages}."
        raise ValueError(msg)
    for name, value in state_dict.items():
        if value.shape != expected[name].shape:
            msg = (
                f"`adapters`: {source} is for another CLIP: {name} is {tuple(value.shape)} (joint width, vision width), "
                f"the model needs {tuple(expected[name].shape)}."
            )
            raise ValueError(msg)


def _read_provenance(path: Path) -> Provenance:
    if path.suffix != ".safetensors":
        return Provenance()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return Provenance.from_dict(json.loads(metadata[METADATA_KEY])) if METADATA_KEY in metadata else Provenance()


def _some(names: Mapping[str, Tensor]) -> str:
    return ", ".join(list(names)[:3])
