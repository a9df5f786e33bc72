"""Which CLIPs of open_clip can be used, and what each of them costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub import try_to_load_from_cache

from . import library
from .architecture import ClipArchitecture


@dataclass(frozen=True)
class Backbone:
    """A CLIP that open_clip lists.

    Attributes:
        name: What ``backbone`` takes.
        weights: What ``pretrained`` takes, and where each lies: a repository of the Hugging Face hub or an address.
        licences: By weights, where open_clip tells it.
        tower: Kind of the vision tower: ViT, ResNet, or timm's name.
        text: Kind of the text tower: CLIP's, with a tokenizer of the hub, or a model of the hub.
        image_size: Side or sides in pixels that the other figures are of.
        patch: Pixels between two cells of the coarsest grid.
        stages: Number of stages that can be tapped.
        embed_dim: Width of the joint space.
        parameters: In millions, of both towers; ``None`` where the text tower's configuration is not on this machine.
        gflops: Of one image through the vision tower, a multiplication with an addition counted as two.
        refused: Why it cannot be used here; empty where it can.
    """

    name: str
    weights: dict[str, str]
    licences: dict[str, str]
    tower: str
    text: str
    image_size: list[int] | None = None
    patch: int | None = None
    stages: int | None = None
    embed_dim: int | None = None
    parameters: float | None = None
    gflops: float | None = None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def backbones(image_size: int | None = None, names: Sequence[str] | None = None) -> Iterator[Backbone]:
    """Every CLIP that open_clip lists, or those of ``names``, at a side in pixels or at its own.

    Nothing is downloaded and no weights are made: towers are built and run without numbers.
    """
    for name in library.model_names() if names is None else names:
        yield _described(name, image_size)


def _described(name: str, image_size: int | None) -> Backbone:
    config = library.model_config(name) or {}
    vision, text = config["vision_cfg"], config["text_cfg"]
    tags = {tag: library.pretrained_config(name, tag) for tag in library.pretrained_tags(name)}
    size = None if image_size is None else (image_size, image_size)
    about: dict[str, Any] = {
        "name": name,
        "weights": {tag: found.get("hf_hub", "").rstrip("/") or found.get("url", "") for tag, found in tags.items()},
        "licences": {tag: str(found["license"]) for tag, found in tags.items() if "license" in found},
        "tower": vision.get("timm_model_name") or ("ViT" if isinstance(vision.get("layers"), int) else "ResNet"),
        "text": _text_of(text),
    }
    try:
        architecture = ClipArchitecture.load(name, size, None)
        about |= {
            "image_size": list(architecture.image_size),
            "patch": architecture.stride,
            "stages": len(architecture.shapes),
            "embed_dim": architecture.embed_dim,
            "gflops": round(library.vision_flops(name, architecture.config, architecture.image_size) / 1e9, 1),
        }
        if not _is_here(text):
            about["refused"] = (
                f"needs the configuration of {text['hf_model_name']}, which is not in this machine's Hugging Face cache"
            )
            return Backbone(**about)
        about["parameters"] = round(library.count_parameters(name, architecture.config) / 1e6, 1)
    except (ValueError, FileNotFoundError, ImportError) as error:
        about["refused"] = str(error)
    return Backbone(**about)


def _is_here(text: dict[str, Any]) -> bool:
    """Whether a text tower can be built without a download."""
    name = text.get("hf_model_name")
    return name is None or isinstance(try_to_load_from_cache(name, "config.json"), str)


def _text_of(text: dict[str, Any]) -> str:
    if "hf_model_name" in text:
        return f"{text['hf_model_name']} of the hub"
    return f"CLIP's, tokenizer {text['hf_tokenizer_name']}" if "hf_tokenizer_name" in text else "CLIP's"
