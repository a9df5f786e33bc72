"""What this package needs of open_clip (2.24 to 3.x), as plain functions; no other module imports it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from torch import Tensor


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


def build_clip(name: str, config: dict[str, Any]) -> open_clip.CLIP:
    """The model of a configuration, with random weights; a ValueError names an entry that is unknown here."""
    try:
        return open_clip.CLIP(**copy.deepcopy(config))
    except Exception as error:  # open_clip checks little of a configuration itself
        reason = f"{type(error).__name__}: {error}"
        msg = f"`backbone`: open_clip {version('open_clip_torch')} cannot build {name}: {reason[:400]}"
        raise ValueError(msg) from error


def load_weights(clip: open_clip.CLIP, state_dict: dict[str, Tensor]) -> None:
    """Load weights in fp32 into a model of any image size; a RuntimeError or KeyError says what does not fit.

    The positional embedding is resized as the authors do it: bicubic, antialiased, class token untouched.
    """
    resized = dict(state_dict)
    resize_pos_embed(resized, clip)
    clip.load_state_dict(resized)


@lru_cache
def tokenizer(
    hub_name: str | None, context_length: int, options: str
) -> open_clip.SimpleTokenizer | open_clip.HFTokenizer:
    """CLIP's own tokenizer, or one from the Hugging Face hub; its further options come as JSON."""
    if hub_name:
        return open_clip.HFTokenizer(hub_name, context_length=context_length, **json.loads(options))
    return open_clip.SimpleTokenizer(context_length=context_length, **json.loads(options))


@lru_cache(maxsize=32)  # the sentences of a class, of every model of it
def tokens_of(hub_name: str | None, context_length: int, options: str, sentences: tuple[str, ...]) -> Tensor:
    """Tokens ``(len(sentences), context_length)`` of ``tokenizer``, not to be changed."""
    tokens: Tensor = tokenizer(hub_name, context_length, options)(list(sentences))
    return tokens


def cut_words(
    tokenize: open_clip.SimpleTokenizer | open_clip.HFTokenizer, sentences: Sequence[str], context_length: int
) -> dict[str, str]:
    """Of sentences that are longer than the context, by sentence, the words that are cut off."""
    if not sentences:
        return {}
    decode = getattr(tokenize, "tokenizer", tokenize).decode
    cut = {}
    for sentence, row in zip(sentences, tokenize(list(sentences), context_length=16 * context_length), strict=True):
        tokens = row[: int(row.nonzero().max()) + 1].tolist()
        if len(tokens) > context_length:  # whose last place is the end token's
            cut[sentence] = decode(tokens[context_length - 1 : -1]).strip()
    return cut


def run_vision(
    visual: open_clip.transformer.VisionTransformer, images: Tensor, stages: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Patch tokens ``(B, L, C)`` after every tapped block, counted from 1, and the image feature ``(B, D)``.

    open_clip 3 has ``forward_intermediates`` for this; version 2 has not, and no image or no stage is too few for it.
    """
    if stages and hasattr(visual, "forward_intermediates") and (torch.compiler.is_compiling() or len(images)):
        indices = [stage - 1 for stage in stages]
        output = visual.forward_intermediates(images, indices=indices, output_fmt="NLC", normalize_intermediates=False)
        return output["image_intermediates"], output["image_features"]
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


def run_text_blocks(text: open_clip.CLIP, embedded: Tensor, mask: Tensor | None) -> Tensor:
    """Embedded tokens ``(B, L, C)`` after all blocks of the text tower."""
    is_flipped = not hasattr(text.transformer, "batch_first")  # 2.24 wants (L, B, C)
    stream: Tensor = text.transformer(embedded.transpose(0, 1) if is_flipped else embedded, attn_mask=mask)
    return stream.transpose(0, 1) if is_flipped else stream
