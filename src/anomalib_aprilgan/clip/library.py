"""What this package needs of open_clip's models (2.24 to 3.x), as plain functions; text is in ``library_text``."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import _build_vision_tower, convert_to_custom_text_state_dict, resize_pos_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

try:
    from open_clip.convert import convert_state_dict
except ImportError:  # open_clip 2 knows no foreign files
    convert_state_dict = None


class StageShape(NamedTuple):
    """What a tapped stage gives: tokens of this width ``C``, one for each cell of a grid (rows, columns)."""

    width: int
    grid: tuple[int, int]


def model_names() -> list[str]:
    """Names of all architectures."""
    return list(open_clip.list_models())


def model_config(name: str) -> dict[str, Any] | None:
    """A copy of an architecture's configuration; ``None`` for an unknown name."""
    config: dict[str, Any] | None = open_clip.get_model_config(name)
    return config


def pretrained_tags(name: str) -> list[str]:
    """Tags of published weights of an architecture."""
    return list(open_clip.list_pretrained_tags_by_model(name))


def pretrained_config(name: str, tag: str) -> dict[str, Any]:
    """Where the weights of a tag lie and which image statistics they want; empty for an unknown tag."""
    return dict(open_clip.get_pretrained_cfg(name, tag))


def build_clip(name: str, config: dict[str, Any]) -> nn.Module:
    """The model of a configuration, with random weights; a ValueError names an entry that is unknown here.

    It is a CLIP, CoCa, or CLIP with a text tower of its own, as open_clip's factory decides it.
    """
    config = copy.deepcopy(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False  # its weights are among those of the CLIP
    plain = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    build = open_clip.CoCa if "multimodal_cfg" in config else plain
    what = f"the configuration {config['text_cfg'].get('hf_model_name')!r}"
    with _told(name), fetched(what, "hf_model_name"):
        if "hf_model_name" in config["text_cfg"]:
            _check_text_config(config["text_cfg"]["hf_model_name"])
        clip: nn.Module = build(**config)
    return clip


def _check_text_config(name: str) -> None:
    """Raise for a text tower that wants code of a folder or of the hub to be run; open_clip would ask the user."""
    from transformers import AutoConfig  # an extra

    AutoConfig.from_pretrained(name, trust_remote_code=False)


class _SizeError(ValueError):
    """A tower cannot take images of a size."""


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn whatever building a model raises into a ValueError: open_clip checks little of a configuration itself."""
    try:
        yield
    except (FileNotFoundError, ImportError, _SizeError):
        raise  # told already
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        msg = f"`backbone`: open_clip {version('open_clip_torch')} cannot build {name}: {reason[:400]}"
        raise ValueError(msg) from error


@contextmanager
def fetched(what: str, key: str) -> Iterator[None]:
    """Say what to do where transformers cannot have something of a text tower, or is missing itself."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        if find_spec("transformers") is not None:
            raise
        msg = f"`backbone`: {what} needs the package transformers: pip install 'anomalib-aprilgan[huggingface]'."
        raise ImportError(msg) from error
    except OSError as error:
        msg = (
            f"`backbone`: {what} of this CLIP's text tower could not be had ({type(error).__name__}). It is neither a "
            "folder nor in the Hugging Face cache of this machine, and was not fetched. Fetch it elsewhere with `hf "
            f"download`, or name its folder as text_cfg.{key} in a model-config .json file that `backbone` names."
        )
        raise FileNotFoundError(msg) from error


@lru_cache(maxsize=32)
def tap_shapes(name: str, config: str, image_size: tuple[int, int] | None) -> tuple[StageShape, ...]:
    """What every stage of a vision tower gives, found by running it without numbers; none without a grid.

    ``config`` is the configuration as JSON, ``image_size`` height and width in pixels, ``None`` for the tower's own.
    """
    content = json.loads(config)
    with _told(name), torch.device("meta"), torch.no_grad():
        visual = _build_vision_tower(content["embed_dim"], content["vision_cfg"], content.get("quick_gelu", False))
        if not hasattr(visual, "forward_intermediates"):
            msg = "this vision tower needs open_clip_torch 3"
            raise TypeError(msg)
        if not hasattr(getattr(visual, "trunk", visual), "forward_intermediates"):
            return ()
        side = content["vision_cfg"]["image_size"]
        native = (side, side) if isinstance(side, int) else tuple(side)
        try:
            if image_size is not None:
                resize_tower(visual, image_size)
            planes = _run_stages(visual.eval(), torch.empty(1, 3, *(image_size or native)), None)[0]
        except Exception as error:
            if image_size is None:
                raise
            msg = f"`image_size`: {name} cannot take images of {image_size[0]} x {image_size[1]} pixels ({error})."
            raise _SizeError(msg) from error
    planes = planes[1:] if isinstance(visual, open_clip.model.ModifiedResNet) else planes  # its stem is no stage
    if any(plane.ndim != 4 for plane in planes):
        return ()
    return tuple(StageShape(plane.shape[1], (plane.shape[2], plane.shape[3])) for plane in planes)


def vision_flops(name: str, config: dict[str, Any], image_size: tuple[int, int]) -> int:
    """Floating-point operations of one image through the vision tower, found by running it without numbers."""
    with _told(name), torch.device("meta"), torch.no_grad():
        visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
        if not isinstance(visual, open_clip.transformer.VisionTransformer):
            resize_tower(visual, image_size)
        visual.requires_grad_(requires_grad=False)
        counter = FlopCounterMode(display=False)
        with counter:
            visual.eval()(torch.empty(1, 3, *image_size))
    return int(counter.get_total_flops())


def count_parameters(name: str, config: dict[str, Any]) -> int:
    """Number of parameters of both towers, without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_clip(name, config).parameters())


def set_input_size(tower: nn.Module, image_size: tuple[int, int]) -> None:
    """Let a tower of timm, or open_clip's wrapper of one, take images of another size; a ConvNet takes any.

    anomalib's AnomalyDINO replaces timm's resampling of positions by one without antialiasing, for the whole process.
    Numbers must not hang on what ran before, so timm's own is put back for the while.
    """
    resize: Any = getattr(tower, "set_input_size", None)
    if resize is None:
        return
    module: Any = vision_transformer
    replaced, module.resample_abs_pos_embed = module.resample_abs_pos_embed, resample_abs_pos_embed
    try:
        resize(image_size)
    finally:
        module.resample_abs_pos_embed = replaced


def resize_tower(visual: nn.Module, image_size: tuple[int, int]) -> None:
    """Let a vision tower take images of another height and width in pixels; a plain ViT is built at its size.

    Positions are resized as open_clip and timm do it: bicubic, antialiased, class token untouched.
    """
    if isinstance(visual, open_clip.model.ModifiedResNet):
        grid, pool = (image_size[0] // 32, image_size[1] // 32), visual.attnpool
        first, cells = pool.positional_embedding[:1], pool.positional_embedding[1:]
        side = round(len(cells) ** 0.5)
        if (side, side) != grid:
            planes = cells.T.reshape(1, -1, side, side)
            planes = F.interpolate(planes, grid, mode="bicubic", antialias=True, align_corners=False)
            pool.positional_embedding = nn.Parameter(torch.cat([first, planes.flatten(2)[0].T]))
    elif isinstance(visual, open_clip.timm_model.TimmModel):
        set_input_size(visual, image_size)


def load_weights(clip: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load weights in fp32 into a model; a RuntimeError or KeyError says what does not fit.

    The positional embedding of a plain ViT, built at any image size, is resized as the authors do it: bicubic,
    antialiased, class token untouched. Files of other projects and of earlier versions are read as open_clip does.
    """
    resized = dict(state_dict)
    if convert_state_dict is not None:
        resized = convert_state_dict(clip, resized)
    if "positional_embedding" in resized and not hasattr(clip, "positional_embedding"):
        resized = convert_to_custom_text_state_dict(resized)
    for name in ("logit_scale", "logit_bias"):
        ours = getattr(clip, name, None)
        if ours is not None:
            resized[name] = resized[name].reshape(ours.shape) if name in resized else torch.zeros_like(ours)
    resized.pop("text.transformer.embeddings.position_ids", None)  # written by earlier versions of transformers
    resize_pos_embed(resized, clip)
    clip.load_state_dict(resized)


def run_vision(visual: nn.Module, images: Tensor, stages: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Patch tokens ``(B, L, C)`` after every tapped stage, counted from 1, and the image feature ``(B, D)``."""
    if not torch.compiler.is_compiling() and not len(images):  # open_clip cannot reshape nothing
        tokens, feature = run_vision(visual, images.new_zeros(1, *images.shape[1:]), stages)
        return [stage[:0] for stage in tokens], feature[:0]
    if not stages:
        feature = visual(images)
        return [], feature[0] if isinstance(feature, tuple) else feature  # CoCa's tower gives its tokens, too
    if not hasattr(visual, "forward_intermediates"):  # open_clip 2
        return _run_plain(visual, images, stages)
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        indices = [stage - 1 for stage in stages]
        output = visual.forward_intermediates(images, indices, output_fmt="NLC", normalize_intermediates=False)
        return output["image_intermediates"], output["image_features"]
    planes, feature = _run_stages(visual, images, stages)
    return [plane.flatten(2).transpose(1, 2) for plane in planes], feature


def _run_stages(visual: nn.Module, images: Tensor, stages: Sequence[int] | None) -> tuple[list[Tensor], Tensor]:
    """Planes ``(B, C, h, w)`` of stages, ``None`` for all that there are, and the image feature ``(B, D)``."""
    is_resnet = isinstance(visual, open_clip.model.ModifiedResNet)
    indices = None if stages is None else [stage - 1 for stage in stages]
    if is_resnet and stages is not None:  # its stem has the index 0, and it pools whatever stage it is asked for last
        indices = [*stages, 4]
    run: Any = visual
    output = run.forward_intermediates(images, indices, output_fmt="NCHW", normalize_intermediates=False)
    planes: list[Tensor] = output["image_intermediates"]
    return planes if stages is None else planes[: len(stages)], output["image_features"]


def _run_plain(tower: nn.Module, images: Tensor, stages: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    visual: Any = tower
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    class_token = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
    stream = torch.cat([class_token, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
    stream = visual.ln_pre(visual.patch_dropout(stream))
    batch_first = getattr(visual.transformer, "batch_first", False)  # 2.24 has no such choice: (L, B, C)
    stream = stream if batch_first else stream.transpose(0, 1)
    tokens = []
    for stage, block in enumerate(visual.transformer.resblocks, start=1):
        stream = block(stream)
        if stage in stages:
            tokens.append((stream if batch_first else stream.transpose(0, 1))[:, 1:])
    stream = stream if batch_first else stream.transpose(0, 1)
    pool = visual._global_pool  # noqa: SLF001  # what its own forward calls
    pooled = visual.ln_post(pool(stream)[0]) if visual.final_ln_after_pool else pool(visual.ln_post(stream))[0]
    return tokens, pooled @ visual.proj
