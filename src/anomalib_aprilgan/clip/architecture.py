"""The architecture of a CLIP: an open_clip configuration at one image size and with one activation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import shown
from ..files import is_file
from . import library


@dataclass(frozen=True)
class BuiltInClip:
    """A CLIP whose configuration, weights and adapters are files of a package; ``hint`` offers it in errors."""

    architecture: str  # `backbone` for it
    pretrained: str  # `pretrained` for it
    config: Path
    weights: Path
    adapters: Path  # `adapters="auto"` for it
    hint: str = ""


# What sizes in a configuration may be at most; the largest published CLIPs have less than a quarter of it.
_MOST = {
    "embed_dim": 8192, "width": 16384, "layers": 256, "heads": 256, "head_width": 1024, "patch_size": 1024,
    "context_length": 8192, "vocab_size": 2_000_000,
}  # fmt: skip
# Where a configuration does not say it (open_clip's CLIPVisionCfg).
_USUAL = {"width": 768, "patch_size": 16}
# By name of the architecture; filled when the package is imported.
BUILT_IN_CLIPS: dict[str, BuiltInClip] = {}


@dataclass(frozen=True)
class ClipArchitecture:
    """An open_clip architecture with a plain ViT, at one image size (height, width in pixels) and with one activation.

    ``name`` is the name or file it came from, ``config`` open_clip's model configuration.
    """

    name: str
    config: dict[str, Any]
    image_size: tuple[int, int]

    @classmethod
    def load(cls, backbone: str, image_size: tuple[int, int], quick_gelu: bool | None) -> ClipArchitecture:
        """Architecture of an open_clip name or a model-config JSON, whose patches must tile the image.

        The activation is decided here: open_clip picks QuickGELU or GELU differently by version and by tag. ``None``
        takes what the configuration says, with which the published adapters were trained (the authors' factory: GELU
        for ViT-L-14-336).
        """
        config = _read_config(backbone)
        vision, text = (_part(config, name, backbone) for name in ("vision_cfg", "text_cfg"))
        config["vision_cfg"] = vision = _USUAL | vision
        foreign = {"timm_model_name", "multimodal_cfg", "hf_model_name"} & {
            *vision,
            *config,
            *text,
        }
        is_plain = isinstance(vision.get("layers"), int) and not vision.get("attentional_pool")
        if foreign or not is_plain or config.get("custom_text"):
            msg = f"`backbone` must be a CLIP with open_clip's plain ViT and text transformer, got {backbone!r}."
            raise ValueError(msg)
        _check_sizes(config, backbone)
        patch = vision["patch_size"]
        if any(side <= 0 or side % patch for side in image_size):
            nearest = " x ".join(str(max(patch, round(side / patch) * patch)) for side in image_size)
            msg = (
                f"`image_size` must be a multiple of {backbone}'s patch of {patch} pixels, "
                f"got {image_size[0]} x {image_size[1]}. The nearest that fits is {nearest}."
            )
            raise ValueError(msg)
        vision["image_size"] = list(image_size)
        config["quick_gelu"] = config.get("quick_gelu", False) if quick_gelu is None else quick_gelu
        if not isinstance(config["quick_gelu"], bool):
            msg = f"`backbone`: quick_gelu of {backbone} must be true or false, got {shown(config['quick_gelu'])}."
            raise ValueError(msg)
        return cls(backbone, config, image_size)

    @property
    def width(self) -> int:
        """Width ``C`` of the vision tower."""
        return int(self.config["vision_cfg"]["width"])

    @property
    def embed_dim(self) -> int:
        """Width ``D`` of the joint space."""
        return int(self.config["embed_dim"])

    @property
    def depth(self) -> int:
        """Number of blocks of the vision tower: the last stage that can be tapped."""
        return int(self.config["vision_cfg"]["layers"])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = self.config["vision_cfg"]["patch_size"]
        return self.image_size[0] // patch, self.image_size[1] // patch

    @property
    def quick_gelu(self) -> bool:
        """Whether both towers run QuickGELU rather than GELU."""
        return bool(self.config["quick_gelu"])

    def check_stages(self, stages: Sequence[int], argument: str = "stages") -> tuple[int, ...]:
        """The stages in ascending order; a ValueError for none, out of range, or one given twice."""
        if not stages:
            msg = f"`{argument}` must name at least one block of {self.name}, got none."
            raise ValueError(msg)
        for stage in stages:
            if isinstance(stage, bool) or not isinstance(stage, int) or not 1 <= stage <= self.depth:
                msg = f"`{argument}` must lie in [1, {self.depth}] for {self.name}, got {stage!r}."
                raise ValueError(msg)
        if len(set(stages)) != len(stages):  # the authors drop those silently
            msg = f"`{argument}` must be different blocks, got {tuple(stages)}."
            raise ValueError(msg)
        return tuple(sorted(stages))


def _read_config(backbone: str) -> dict[str, Any]:
    path = BUILT_IN_CLIPS[backbone].config if backbone in BUILT_IN_CLIPS else Path(backbone).expanduser()
    if path.suffix != ".json":
        config = library.model_config(backbone)
        if config is None:
            known = ", ".join(name for name in (*BUILT_IN_CLIPS, *library.model_names()) if name.startswith("ViT-"))
            msg = (
                f"`backbone` must be an open_clip architecture or the path of a .json config, got {backbone!r}. "
                f"Known: {known}."
            )
            raise ValueError(msg)
        return config
    if not is_file(path):
        msg = f"`backbone`: no model-config file {path}."
        raise FileNotFoundError(msg)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        msg = f"`backbone`: {path} is not JSON: {error}"
        raise ValueError(msg) from error
    # Files on model hubs wrap the configuration.
    content = content.get("model_cfg", content) if isinstance(content, dict) else {}
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(content):
        msg = f"`backbone`: {path} must be an open_clip model config with embed_dim, vision_cfg and text_cfg."
        raise ValueError(msg)
    return dict(content)


def _part(config: dict[str, Any], name: str, backbone: str) -> dict[str, Any]:
    part = config.get(name)
    if not isinstance(part, dict):
        msg = f"`backbone`: {name} of {backbone} must be a mapping, got {shown(part)}."
        raise ValueError(msg)
    return part


def _check_sizes(config: dict[str, Any], backbone: str) -> None:
    """Raise a ValueError for sizes that no CLIP has, before a network of that size is built."""
    for name, part in ((None, config), ("vision_cfg", config["vision_cfg"]), ("text_cfg", config["text_cfg"])):
        for key, most in _MOST.items():
            value = part.get(key, 1)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                where = key if name is None else f"{name}.{key}"
                msg = f"`backbone`: {where} of {backbone} must be an int from 1 to {most}, got {shown(value)}."
                raise ValueError(msg)
        if part.get("width", 0) % part.get("heads", part.get("head_width", 1)):
            msg = f"`backbone`: {name}.width of {backbone} must be a multiple of the heads, got {part['width']}."
            raise ValueError(msg)
