"""The architecture of a CLIP: an open_clip configuration at one image size and with one activation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..checks import is_like, shown
from ..files import is_file
from . import library
from .library import StageShape


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
    "context_length": 8192, "vocab_size": 2_000_000, "n_queries": 8192, "attn_pooler_queries": 8192,
    "attn_pooler_heads": 256, "dim_head": 1024,
}  # fmt: skip
# Where a configuration does not say it (open_clip's CLIPVisionCfg).
_USUAL = {"layers": 12, "width": 768, "patch_size": 16, "image_size": 224}
# Pixels between the cells of a ResNet's last stage; its stages.
_RESNET_STRIDE, _RESNET_LAYERS = 32, (1, 2, 3, 4)
_TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language"}
# Where files on model hubs say how images are prepared.
_PREPROCESSING = "preprocess_cfg"
# By name of the architecture; filled when the package is imported.
BUILT_IN_CLIPS: dict[str, BuiltInClip] = {}


@dataclass(frozen=True)
class ClipArchitecture:
    """An open_clip architecture at one image size (height, width in pixels) and with one activation.

    ``name`` is the name or file it came from, ``config`` open_clip's model configuration. ``statistics`` are channel
    means and standard deviations, where its file names them.
    """

    name: str
    config: dict[str, Any]
    image_size: tuple[int, int]
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @classmethod
    def load(cls, backbone: str, image_size: tuple[int, int] | None, quick_gelu: bool | None) -> ClipArchitecture:
        """Architecture of an open_clip name or a model-config JSON, whose patches must tile the image.

        Without an image size it is the one that the weights were trained at, or the largest below it that patches tile.

        The activation is decided here: open_clip picks QuickGELU or GELU differently by version and by tag. ``None``
        takes what the configuration says, with which the published adapters were trained (the authors' factory: GELU
        for ViT-L-14-336). A ValueError names what no CLIP has, a tower without a grid, or a size that does not fit.
        """
        config = _read_config(backbone)
        statistics = _read_statistics(config.pop(_PREPROCESSING, None))
        vision, text = (_part(config, name, backbone) for name in ("vision_cfg", "text_cfg"))
        given = {key: value for key, value in vision.items() if value is not None or key not in _USUAL}
        config["vision_cfg"], config["text_cfg"] = _USUAL | given, dict(text)
        config["vision_cfg"].pop("timm_model_pretrained", None)  # weights are those of `pretrained`
        if ":" in str(given.get("timm_model_name", "")):
            msg = f"`backbone`: timm_model_name of {backbone} must be a model of timm, got {given['timm_model_name']}."
            raise ValueError(msg)
        _check_tokenizer(config["text_cfg"], backbone)
        _check_sizes(config, backbone)
        config["quick_gelu"] = config.get("quick_gelu", False) if quick_gelu is None else quick_gelu
        if not isinstance(config["quick_gelu"], bool):
            msg = f"`backbone`: quick_gelu of {backbone} must be true or false, got {shown(config['quick_gelu'])}."
            raise ValueError(msg)
        native = config["vision_cfg"]["image_size"]
        sides = (native, native) if isinstance(native, int) else (native[0], native[1])
        found = cls(backbone, config, image_size or sides, statistics)
        if image_size is None:
            height, width = (side // found.stride * found.stride for side in sides)
            found = cls(backbone, config, (height, width), statistics)
        found._check_image_size()
        if found.is_plain_vit:
            config["vision_cfg"]["image_size"] = list(found.image_size)
        if not found.shapes:
            msg = f"`backbone`: the vision tower of {backbone} gives no grid of features to make a map of."
            raise ValueError(msg)
        return found

    def _check_image_size(self) -> None:
        stride = self.stride
        if any(side <= 0 or side % stride for side in self.image_size):
            nearest = " x ".join(str(max(stride, round(side / stride) * stride)) for side in self.image_size)
            msg = (
                f"`image_size` must be a multiple of {self.name}'s patch of {stride} pixels, "
                f"got {self.image_size[0]} x {self.image_size[1]}. The nearest that fits is {nearest}."
            )
            raise ValueError(msg)

    @property
    def is_plain_vit(self) -> bool:
        """Whether the vision tower is open_clip's own ViT, which is built at any image size."""
        vision = self.config["vision_cfg"]
        return "timm_model_name" not in vision and isinstance(vision.get("layers"), int)

    @cached_property
    def stride(self) -> int:
        """Pixels between two cells of the coarsest grid: the patch of a ViT."""
        vision = self.config["vision_cfg"]
        if self.is_plain_vit:
            return int(vision["patch_size"])
        if "timm_model_name" not in vision:
            return _RESNET_STRIDE
        shapes, native = library.tap_shapes(self.name, json.dumps(self.config), None), vision["image_size"]
        side = native if isinstance(native, int) else native[0]
        return side // min((shape.grid[0] for shape in shapes), default=side)

    @cached_property
    def shapes(self) -> tuple[StageShape, ...]:
        """Width and grid of every stage that can be tapped, the first one first: of blocks, or of a ConvNet's stages.

        A ResNet's are its layers 1 to 4, ``width * 2 ** (stage + 1)`` wide (authors' model.py). None without a grid.
        """
        vision = self.config["vision_cfg"]
        if not self.is_plain_vit:
            return library.tap_shapes(self.name, json.dumps(self.config), self.image_size)
        grid = (self.image_size[0] // self.stride, self.image_size[1] // self.stride)
        return (StageShape(int(vision["width"]), grid),) * int(vision["layers"])

    def shapes_of(self, stages: Sequence[int]) -> tuple[StageShape, ...]:
        """Width and grid of some stages, counted from 1."""
        return tuple(self.shapes[stage - 1] for stage in stages)

    @property
    def embed_dim(self) -> int:
        """Width ``D`` of the joint space."""
        return int(self.config["embed_dim"])

    @property
    def quick_gelu(self) -> bool:
        """Whether open_clip's own towers run QuickGELU rather than GELU; timm's have an activation of their own."""
        return bool(self.config["quick_gelu"])

    def check_stages(self, stages: Sequence[int] | Literal["auto"], argument: str = "stages") -> tuple[int, ...]:
        """The stages in ascending order, ``"auto"`` for quarters; a ValueError for none, out of range, or twice."""
        return check_stages(stages, len(self.shapes), self.name, argument)


def check_stages(
    stages: Sequence[int] | Literal["auto"], depth: int, name: str, argument: str = "stages"
) -> tuple[int, ...]:
    """The stages of a tower of ``depth`` in ascending order; a ValueError for none, out of range, or one given twice.

    ``"auto"`` stands for evenly spaced quarters, the last stage among them: 6, 12, 18, 24 of 24.
    """
    if stages == "auto":
        return tuple(sorted({-(-depth * quarter // 4) for quarter in (1, 2, 3, 4)}))
    if not stages:
        msg = f"`{argument}` must name at least one block of {name}, got none."
        raise ValueError(msg)
    for stage in stages:
        if isinstance(stage, bool) or not isinstance(stage, int) or not 1 <= stage <= depth:
            msg = f"`{argument}` must lie in [1, {depth}] for {name}, got {stage!r}."
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
            known = ", ".join((*BUILT_IN_CLIPS, *library.model_names()))
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
    wrapped = content if isinstance(content, dict) else {}
    content = wrapped.get("model_cfg", wrapped)
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(content):
        msg = f"`backbone`: {path} must be an open_clip model config with embed_dim, vision_cfg and text_cfg."
        raise ValueError(msg)
    return {**content, _PREPROCESSING: wrapped.get(_PREPROCESSING, {})}


def _read_statistics(content: object) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if not isinstance(content, dict) or not {"mean", "std"} <= set(content):
        return None
    mean, std = content["mean"], content["std"]
    if not is_like(mean, [(float, int)]) or not is_like(std, [(float, int)]):
        msg = f"`backbone`: mean and std of {_PREPROCESSING} must be lists of numbers, got {shown(mean)}, {shown(std)}."
        raise ValueError(msg)
    return tuple(mean), tuple(std)


def _part(config: dict[str, Any], name: str, backbone: str) -> dict[str, Any]:
    part = config.get(name)
    if not isinstance(part, dict):
        msg = f"`backbone`: {name} of {backbone} must be a mapping, got {shown(part)}."
        raise ValueError(msg)
    return part


def _check_tokenizer(text: dict[str, Any], backbone: str) -> None:
    """Raise a ValueError for options of a tokenizer that open_clip's configurations have not, such as code to run."""
    options = text.get("tokenizer_kwargs") or {}
    if not isinstance(options, dict) or not set(options) <= _TOKENIZER_OPTIONS:
        known = ", ".join(sorted(_TOKENIZER_OPTIONS))
        msg = f"`backbone`: tokenizer_kwargs of {backbone} must have keys out of {known}, got {shown(options)}."
        raise ValueError(msg)


def _check_sizes(config: dict[str, Any], backbone: str) -> None:
    """Raise a ValueError for sizes that no CLIP has, before a network of that size is built."""
    parts = [name for name in ("vision_cfg", "text_cfg", "multimodal_cfg") if name in config]
    for name, part in ((None, config), *((name, _part(config, name, backbone)) for name in parts)):
        for key, most in _MOST.items():
            value = part.get(key, 1)
            where = key if name is None else f"{name}.{key}"
            if key == "layers" and name == "vision_cfg" and isinstance(value, (list, tuple)):  # of a ResNet
                numbers, of = list(value), f"{len(_RESNET_LAYERS)} ints"
                fits = len(numbers) == len(_RESNET_LAYERS) and all(_is_size(number, most) for number in numbers)
            else:
                fits, of = _is_size(value, most), "an int"
            if not fits:
                msg = f"`backbone`: {where} of {backbone} must be {of} from 1 to {most}, got {shown(value)}."
                raise ValueError(msg)
        pooled = 32 if isinstance(part.get("layers"), (list, tuple)) else 1  # a ResNet's width times 32 is pooled
        if pooled * part.get("width", 0) % part.get("heads", part.get("head_width", 1)):
            msg = f"`backbone`: {name}.width of {backbone} must be a multiple of the heads, got {part['width']}."
            raise ValueError(msg)
    _check_native_size(config["vision_cfg"]["image_size"], backbone)


def _check_native_size(given: object, backbone: str) -> None:
    sides = given if isinstance(given, (list, tuple)) else [given, given]
    if len(sides) != 2 or not all(_is_size(side, _MOST["width"]) for side in sides):
        msg = f"`backbone`: vision_cfg.image_size of {backbone} must be one or two sides in pixels, got {shown(given)}."
        raise ValueError(msg)


def _is_size(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
