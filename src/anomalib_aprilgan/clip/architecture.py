"""The architecture of a CLIP: an open_clip configuration at one image size and with one activation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import library
from .registry import BUILT_IN_CLIPS


@dataclass(frozen=True)
class ClipArchitecture:
    """An open_clip architecture with a plain ViT, at one image size and with one activation.

    Attributes:
        name: Name or file it came from.
        config: open_clip's model configuration, image size and activation set.
        image_size: Height and width in pixels.
    """

    name: str
    config: dict[str, Any]
    image_size: tuple[int, int]

    @classmethod
    def load(cls, backbone: str, image_size: tuple[int, int], quick_gelu: bool | None) -> ClipArchitecture:
        """Architecture of an open_clip name or a model-config JSON.

        The activation is decided here: open_clip picks QuickGELU or GELU differently by version and by tag. The
        published adapters were trained with what the configuration says (the authors' factory: GELU for
        ViT-L-14-336).

        Args:
            backbone: Architecture name, or path of a JSON file.
            image_size: Height and width in pixels.
            quick_gelu: Activation of both towers; ``None`` takes the configuration's.

        Raises:
            ValueError: The architecture is unknown or unsuitable, or the patches do not tile the size.
            FileNotFoundError: The JSON file is missing.
        """
        config = _read_config(backbone)
        vision = config.get("vision_cfg", {})
        unsuitable = (
            "timm_model_name" in vision
            or not isinstance(vision.get("layers"), int)
            or vision.get("attentional_pool")
            or "multimodal_cfg" in config
            or config.get("custom_text")
            or "hf_model_name" in config.get("text_cfg", {})
        )
        if unsuitable:
            msg = f"`backbone` must be a CLIP with open_clip's plain ViT and text transformer, got {backbone!r}."
            raise ValueError(msg)
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
        """The stages in ascending order.

        Raises:
            ValueError: None given, out of range, or one given twice (the authors drop those silently).
        """
        if not stages:
            msg = f"`{argument}` must name at least one block of {self.name}, got none."
            raise ValueError(msg)
        for stage in stages:
            if isinstance(stage, bool) or not isinstance(stage, int) or not 1 <= stage <= self.depth:
                msg = f"`{argument}` must lie in [1, {self.depth}] for {self.name}, got {stage!r}."
                raise ValueError(msg)
        if len(set(stages)) != len(stages):
            msg = f"`{argument}` must be different blocks, got {tuple(stages)}."
            raise ValueError(msg)
        return tuple(sorted(stages))


def _read_config(backbone: str) -> dict[str, Any]:
    path = BUILT_IN_CLIPS[backbone].config if backbone in BUILT_IN_CLIPS else Path(backbone).expanduser()
    if path.suffix == ".json":
        return _read_config_file(path)
    config = library.model_config(backbone)
    if config is None:
        known = ", ".join(name for name in (*BUILT_IN_CLIPS, *library.model_names()) if name.startswith("ViT-"))
        msg = (
            f"`backbone` must be an open_clip architecture or the path of a .json config, got {backbone!r}. "
            f"Known: {known}."
        )
        raise ValueError(msg)
    return config


def _read_config_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        msg = f"`backbone`: no model-config file {path}."
        raise FileNotFoundError(msg)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"`backbone`: {path} is not JSON: {error}"
        raise ValueError(msg) from error
    # Files on model hubs wrap the configuration.
    config = config.get("model_cfg", config) if isinstance(config, dict) else {}
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        msg = f"`backbone`: {path} must be an open_clip model config with embed_dim, vision_cfg and text_cfg."
        raise ValueError(msg)
    return dict(config)
