"""The frozen CLIP: patch tokens of the tapped stages, image feature, text features.

The only module that imports open_clip, and only when a backbone is asked for: importing
open_clip takes seconds. Supports 2.24 (blocks run ``(L, B, C)``) and 3.x (``(B, L, C)``).
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pretrained import find_pretrained
from .registry import BUILT_IN_CLIPS
from .weights import read_state_dict

if TYPE_CHECKING:
    import open_clip

logger = logging.getLogger(__name__)


class VisionOutput(NamedTuple):
    """What one pass of the vision tower gives.

    Attributes:
        patch_tokens: Per tapped stage ``(B, L, C)``, ascending: the residual stream after the
            block, class token removed, before the last normalisation and projection.
        image_feature: ``(B, D)``, not normalised.
    """

    patch_tokens: list[Tensor]
    image_feature: Tensor


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
        """Architecture of an open_clip name or a model-config JSON, its activation decided here.

        open_clip picks QuickGELU or GELU differently by version and by tag; the published adapters
        were trained with whatever the configuration of the architecture says (the authors' factory:
        GELU for ViT-L-14-336).

        Args:
            backbone: Architecture name, or path of a JSON file.
            image_size: Height and width in pixels.
            quick_gelu: Activation of both towers; ``None`` takes the configuration's.

        Raises:
            ValueError: Unknown or unsuitable architecture, or a size that the patches do not tile.
            FileNotFoundError: The JSON file is missing.
        """
        config = copy.deepcopy(_read_config(backbone))
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


class ClipBackbone(nn.Module):
    """A frozen CLIP with tapped vision stages.

    Parameters never require gradients and the module stays in eval mode through ``train()``.

    Args:
        architecture: What to build.
        state_dict: Weights in open_clip's layout, positional embedding at any size.
        source: Where the weights came from, for the error.

    Raises:
        ValueError: The weights are not those of this architecture.
    """

    def __init__(self, architecture: ClipArchitecture, state_dict: dict[str, Tensor], source: str) -> None:
        super().__init__()
        self.architecture = architecture
        clip = build_clip(architecture)
        _load_weights(clip, architecture, state_dict, source)
        self.visual = clip.visual
        clip.visual = None  # the rest of it is the text tower
        self.text: open_clip.CLIP | None = clip
        self.requires_grad_(requires_grad=False)
        self.train(mode=False)

    def train(self, mode: bool = True) -> ClipBackbone:
        """Stay in eval mode: CLIP is frozen."""
        del mode
        return super().train(mode=False)

    @property
    def fingerprint(self) -> str:
        """Short name of these weights: a hash of the image projection, the same for every file format."""
        projection = self.visual.proj.detach().float().cpu().contiguous().numpy().tobytes()
        return hashlib.sha256(projection).hexdigest()[:16]

    def forward(self, images: Tensor, stages: Iterable[int]) -> VisionOutput:
        """One pass of the vision tower.

        Args:
            images: ``(B, 3, H, W)``, resized and normalised.
            stages: Blocks to tap, counted from 1, in ascending order.

        Returns:
            Patch tokens and image feature.

        Raises:
            ValueError: The images have another size than the architecture.
        """
        if tuple(images.shape[-2:]) != self.architecture.image_size:
            msg = f"`images` must be {self.architecture.image_size} pixels for this model, got {tuple(images.shape)}."
            raise ValueError(msg)
        visual = self.visual
        patches = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        class_token = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        stream = torch.cat([class_token, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
        stream = visual.ln_pre(visual.patch_dropout(stream))
        tapped = set(stages)
        patch_tokens = []
        for stage, stream in enumerate(_run_blocks(visual.transformer, stream), start=1):  # noqa: B020  # the stream is what changes
            if stage in tapped:
                patch_tokens.append(stream[:, 1:])
        if visual.final_ln_after_pool:
            pooled = visual.ln_post(visual._global_pool(stream)[0])  # noqa: SLF001  # the same in 2.24 and 3.x
        else:
            pooled = visual._global_pool(visual.ln_post(stream))[0]  # noqa: SLF001
        return VisionOutput(patch_tokens, pooled @ visual.proj)

    @torch.no_grad()
    def encode_states(self, normal: list[str], anomalous: list[str]) -> Tensor:
        """Text features of a class: every sentence normalised, averaged, normalised (authors' prompt_ensemble.py).

        Args:
            normal: Sentences about a good part.
            anomalous: Sentences about a bad part.

        Returns:
            ``(D, 2)``, unit columns: normal, anomalous.

        Raises:
            RuntimeError: The text tower was left out.
        """
        features = [
            F.normalize(F.normalize(self.encode_text(sentences), dim=-1).mean(dim=0), dim=-1)
            for sentences in (normal, anomalous)
        ]
        return torch.stack(features, dim=1)

    def encode_text(self, sentences: list[str], *, cut_context: bool = True) -> Tensor:
        """Text features of sentences, in fp32.

        A causal tower that pools at the end token never looks behind it, so the context is cut to
        the longest sentence: the same features for a third of the work or less.

        Args:
            sentences: What to encode.
            cut_context: Whether to cut; off only to measure what it saves.

        Returns:
            ``(len(sentences), D)``, not normalised.

        Raises:
            RuntimeError: The text tower was left out.
        """
        text = self.text
        if text is None:
            msg = "This backbone carries no text tower (an exported model): class names cannot be encoded any more."
            raise RuntimeError(msg)
        config = self.architecture.config["text_cfg"]
        options = json.dumps(config.get("tokenizer_kwargs") or {})
        tokenizer = _tokenizer(config.get("hf_tokenizer_name"), config.get("context_length", 77), options)
        tokens = tokenizer(sentences).to(text.positional_embedding.device)
        ends = _end_positions(text, tokens)
        length = tokens.shape[1]
        if cut_context and text.attn_mask is not None and ends is not None:
            length = int(ends.max()) + 1
        tokens = tokens[:, :length]
        embedded = text.token_embedding(tokens) + text.positional_embedding[:length]
        mask = None if text.attn_mask is None else text.attn_mask[:length, :length]
        *_, stream = _run_blocks(text.transformer, embedded, mask)
        stream = text.ln_final(stream)
        if ends is None:
            pooled = stream[:, 0 if text.text_pool_type == "first" else -1]
        else:
            pooled = stream[torch.arange(len(stream), device=stream.device), ends]
        projection: Tensor | nn.Linear | None = text.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return cast("Tensor", pooled).float()


def build_clip(architecture: ClipArchitecture) -> open_clip.CLIP:
    """open_clip's model of an architecture, with random weights.

    Raises:
        ValueError: The installed open_clip does not know an entry of the configuration.
    """
    import open_clip

    try:
        return open_clip.CLIP(**copy.deepcopy(architecture.config))
    except TypeError as error:
        msg = f"`backbone`: open_clip {version('open_clip_torch')} cannot build {architecture.name}: {error}"
        raise ValueError(msg) from error


def load_clip(architecture: ClipArchitecture, pretrained: str) -> ClipBackbone:
    """The frozen CLIP with the weights of a file or an open_clip tag.

    Args:
        architecture: What to build.
        pretrained: Path of a weight file, or a tag of open_clip ("openai").

    Raises:
        FileNotFoundError: The file is missing, or the tag's weights cannot be had.
        ValueError: Unknown tag, or a file that is damaged or fits another architecture.
    """
    path = Path(pretrained).expanduser()
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            msg = f"`pretrained`: no weight file {path}. Pass an existing file or an open_clip tag such as 'openai'."
            raise FileNotFoundError(msg)
        path = _find_pretrained(architecture.name, pretrained)
    return ClipBackbone(architecture, read_state_dict(path, "pretrained"), str(path))


def random_weights(architecture: ClipArchitecture, seed: int) -> dict[str, Tensor]:
    """Weights of a CLIP that has learned nothing: open_clip's initialisation, repeatable."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(build_clip(architecture).state_dict())


def image_statistics(backbone: str, pretrained: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Channel means and standard deviations a tag's weights were trained with; ``None`` for files and unknown tags."""
    import open_clip

    config = open_clip.get_pretrained_cfg(backbone, pretrained)
    return (tuple(config["mean"]), tuple(config["std"])) if config.get("mean") and config.get("std") else None


def _read_config(backbone: str) -> dict[str, Any]:
    path = BUILT_IN_CLIPS[backbone].config if backbone in BUILT_IN_CLIPS else Path(backbone).expanduser()
    if path.suffix == ".json":
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
    import open_clip

    config = open_clip.get_model_config(backbone)
    if config is None:
        known = ", ".join(name for name in (*BUILT_IN_CLIPS, *open_clip.list_models()) if name.startswith("ViT-"))
        msg = (
            f"`backbone` must be an open_clip architecture or the path of a .json config, got {backbone!r}. "
            f"Known: {known}."
        )
        raise ValueError(msg)
    return dict(config)


def _load_weights(
    clip: open_clip.CLIP,
    architecture: ClipArchitecture,
    state_dict: dict[str, Tensor],
    source: str,
) -> None:
    from open_clip.model import resize_pos_embed

    # Files are often in half precision, in which positions cannot be resized on a CPU.
    state_dict = {name: value.float() if value.is_floating_point() else value for name, value in state_dict.items()}
    if "logit_scale" in state_dict:
        state_dict["logit_scale"] = state_dict["logit_scale"].reshape(clip.logit_scale.shape)
    try:
        # Bicubic, antialiased, class row untouched (open_clip's own, as in the authors' copy).
        resize_pos_embed(state_dict, clip)
        clip.load_state_dict(state_dict)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        msg = f"`pretrained`: the weights of {source} are not those of {architecture.name}: {reason[:400]}"
        raise ValueError(msg) from error


def _run_blocks(transformer: nn.Module, stream: Tensor, mask: Tensor | None = None) -> Iterable[Tensor]:
    """The residual stream ``(B, L, C)`` after every block, whichever layout open_clip's blocks want."""
    batch_first = getattr(transformer, "batch_first", False)  # 2.24 has no such choice: (L, B, C)
    stream = stream if batch_first else stream.transpose(0, 1)
    blocks: nn.ModuleList = transformer.get_submodule("resblocks")  # type: ignore[assignment]
    for block in blocks:
        stream = block(stream, attn_mask=mask)
        yield stream if batch_first else stream.transpose(0, 1)


@lru_cache
def _tokenizer(
    hub_name: str | None, context_length: int, options: str
) -> open_clip.SimpleTokenizer | open_clip.HFTokenizer:
    import open_clip

    if hub_name:
        return open_clip.HFTokenizer(hub_name, context_length=context_length, **json.loads(options))
    return open_clip.SimpleTokenizer(context_length=context_length, **json.loads(options))


def _end_positions(text: open_clip.CLIP, tokens: Tensor) -> Tensor | None:
    """Index of every sentence's end token; ``None`` for a tower that pools elsewhere."""
    if text.text_pool_type == "argmax":
        return tokens.argmax(dim=-1)
    if text.text_pool_type == "eos":
        is_end: Tensor = tokens == text.text_eos_id
        return is_end.int().argmax(dim=-1)
    return None


def _find_pretrained(backbone: str, tag: str) -> Path:
    """File with the weights of an open_clip tag."""
    import open_clip

    built_in = BUILT_IN_CLIPS.get(backbone)
    if built_in is not None and tag == built_in.pretrained:
        return built_in.weights
    config = open_clip.get_pretrained_cfg(backbone, tag)
    if not config:
        known = [built_in.pretrained] if built_in else open_clip.list_pretrained_tags_by_model(backbone)
        tags = ", ".join(known) or "none: pass a file"
        msg = f"`pretrained` must be a weight file or a tag of {backbone} ({tags}), got {tag!r}."
        raise ValueError(msg)
    return find_pretrained(config.get("url", ""), config.get("hf_hub", ""), f"`pretrained={tag!r}`", backbone)
