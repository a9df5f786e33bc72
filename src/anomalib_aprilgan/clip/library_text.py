"""What this package needs of open_clip's tokenizers and text towers (2.24 to 3.x), as plain functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from .library import fetched


@lru_cache
def tokenizer(source: str | None, context_length: int, options: str) -> open_clip.SimpleTokenizer | HFTokenizer:
    """CLIP's own tokenizer, or one of a folder or of the Hugging Face hub, whose code is never run.

    Its further options come as JSON. A FileNotFoundError says that it cannot be had, an ImportError that the package
    transformers is missing.
    """
    if source:
        with fetched(f"the tokenizer {source!r}", "hf_tokenizer_name"):
            return HFTokenizer(source, context_length=context_length, trust_remote_code=False, **json.loads(options))
    return open_clip.SimpleTokenizer(context_length=context_length, **json.loads(options))


@lru_cache(maxsize=32)  # the sentences of a class, of every model of it
def tokens_of(source: str | None, context_length: int, options: str, sentences: tuple[str, ...]) -> Tensor:
    """Tokens ``(len(sentences), context_length)`` of ``tokenizer``, not to be changed."""
    tokens: Tensor = tokenizer(source, context_length, options)(list(sentences))
    return tokens


def cut_words(
    tokenize: open_clip.SimpleTokenizer | HFTokenizer, sentences: Sequence[str], context_length: int
) -> dict[str, str]:
    """Of sentences that are longer than the context, by sentence, the words that are cut off."""
    if not sentences:
        return {}
    decode = getattr(tokenize, "tokenizer", tokenize).decode
    cut = {}
    for sentence, row in zip(sentences, tokenize(list(sentences), context_length=16 * context_length), strict=True):
        tokens = row[: int((row != row[-1]).nonzero().max()) + 1].tolist()  # it ends in padding
        if len(tokens) > context_length:  # whose last place is the end token's
            cut[sentence] = decode(tokens[context_length - 1 : -1]).strip()
    return cut


def text_tower(model: nn.Module) -> nn.Module:
    """What a model without its vision tower needs to encode text; its decoder is left out."""
    clip: Any = model
    clip.visual = None
    if hasattr(clip, "text_decoder"):
        clip.text_decoder = None
    return model


def encode_tokens(clip: nn.Module, tokens: Tensor) -> Tensor:
    """Features ``(B, D)`` of tokens ``(B, L)``, not normalised: open_clip's own ``encode_text``."""
    model: Any = clip
    features: Tensor = model.encode_text(tokens, normalize=False)
    return features


def encode_cut_tokens(clip: nn.Module, tokens: Tensor) -> Tensor | None:
    """The same of no more of the context than holds the end of every sentence, a third of the work or less.

    ``None`` for a text tower that may look behind the end: one without causal mask, with a token of its own at the end,
    or another than CLIP's. ``encode_tokens`` tells whether the features are the same.
    """
    text: Any = clip if isinstance(clip, open_clip.CLIP) else clip.text
    kind = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
    is_plain = isinstance(text, (open_clip.CLIP, open_clip.transformer.TextTransformer))
    if not is_plain or text.attn_mask is None or kind not in {"argmax", "eos"}:
        return None
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        return None
    end: Any = getattr(text, "text_eos_id", getattr(text, "eos_id", None))
    # CLIP's own end token is the highest of all.
    pooled_at = (tokens if kind == "argmax" else tokens.eq(end).int()).argmax(-1)
    tokens = tokens[:, : int(pooled_at.max()) + 1]
    length = tokens.shape[1]
    embedded = text.token_embedding(tokens) + text.positional_embedding[:length]
    stream = text.ln_final(_run_text_blocks(text, embedded, text.attn_mask[:length, :length]))
    pooled: Tensor = stream[torch.arange(len(stream), device=stream.device), pooled_at]
    projection: Tensor | nn.Linear | None = text.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


def _run_text_blocks(text: open_clip.CLIP, embedded: Tensor, mask: Tensor) -> Tensor:
    """Embedded tokens ``(B, L, C)`` after all blocks of the text tower."""
    is_flipped = not hasattr(text.transformer, "batch_first")  # 2.24 wants (L, B, C)
    stream: Tensor = text.transformer(embedded.transpose(0, 1) if is_flipped else embedded, attn_mask=mask)
    return stream.transpose(0, 1) if is_flipped else stream
