"""A small CLIP of every family that open_clip has, as files: configuration, weights, tokenizer, text configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, RobertaConfig

from anomalib_aprilgan.clip import library
from anomalib_aprilgan.clip.architecture import ClipArchitecture
from anomalib_aprilgan.demo.drawn_clip.trainer import random_weights

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 64, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8}
DECODER = {"context_length": 76, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
# Of a tokenizer in a folder, whose place is filled in by `write`.
WORDS = {"hf_tokenizer_name": "", "vocab_size": 64}
NOT_CAUSAL = {"no_causal_mask": True}


def timm_tower(name: str, image_size: int, pool: str, proj: str | None) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": image_size}


# By family: an image size that is not its own, height and width, and the configuration.
FAMILIES: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "vit": ((64, 96), {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT}),
    "coca": (
        (96, 64),
        {
            "embed_dim": 32,
            "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            "text_cfg": TEXT | {"context_length": 76, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": DECODER,
            "custom_text": True,
        },
    ),
    "clipa": (
        (96, 96),
        {
            "embed_dim": 24,
            "vision_cfg": VIT | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
            "text_cfg": TEXT | WORDS | NOT_CAUSAL | {"pool_type": "last", "context_length": 32},
        },
    ),
    "resnet": (
        (96, 128),
        {
            "embed_dim": 24,
            "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None, "head_width": 64},
            "text_cfg": TEXT,
        },
    ),
    "siglip": (
        (96, 64),
        {
            "embed_dim": 192,
            "vision_cfg": timm_tower("vit_tiny_patch16_224", 224, "map", "none"),
            "text_cfg": TEXT | WORDS | NOT_CAUSAL | {"pool_type": "last", "proj_bias": True, "context_length": 64},
            "init_logit_bias": -10,
            "custom_text": True,
        },
    ),
    "eva02": (
        (84, 112),
        {
            "embed_dim": 24,
            "vision_cfg": timm_tower("eva02_tiny_patch14_224", 224, "token", None),
            "text_cfg": TEXT,
            "custom_text": True,
        },
    ),
    "pe": (
        (96, 96),
        {
            "embed_dim": 24,
            "vision_cfg": timm_tower("vit_pe_core_tiny_patch16_384", 384, "map", None),
            "text_cfg": TEXT | {"context_length": 32},
            "custom_text": True,
        },
    ),
    "mobileclip": (
        (128, 64),
        {
            "embed_dim": 24,
            "vision_cfg": timm_tower("fastvit_mci0", 256, "avg", None),
            "text_cfg": TEXT | NOT_CAUSAL,
            "custom_text": True,
        },
    ),
    "vitamin": (
        (64, 96),
        {
            "embed_dim": 24,
            "vision_cfg": timm_tower("vitamin_small_224", 224, "", "linear"),
            "text_cfg": TEXT,
            "custom_text": True,
        },
    ),
    "convnext": (
        (96, 64),
        {"embed_dim": 24, "vision_cfg": timm_tower("convnext_atto", 224, "", "mlp"), "text_cfg": TEXT},
    ),
    "worldwide": (
        (64, 64),
        {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT | WORDS | {"pool_type": "eos", "eos_id": 2}},
    ),
    "roberta": (
        (64, 64),
        {
            "embed_dim": 24,
            "vision_cfg": VIT,
            "text_cfg": {"hf_model_name": "", "hf_tokenizer_name": "", "hf_pooler_type": "mean_pooler"},
        },
    ),
}


@dataclass(frozen=True)
class Files:
    """The files of a CLIP, the image size to run it at, and open_clip's own configuration of it."""

    backbone: Path
    weights: Path
    image_size: tuple[int, int]
    config: dict[str, Any]


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of a few words, as transformers reads it from a folder."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = ["a", "photo", "of", "the", "object", "bottle", "damaged", "flawless", "with", "defect", "in", "this"]
    model = Tokenizer(WordLevel({word: place for place, word in enumerate([*special, *words])}, "<unk>"))
    model.pre_tokenizer = Whitespace()
    model.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=model, **names).save_pretrained(folder)
    return folder


def write(family: str, folder: Path) -> Files:
    """Files with random weights: BatchNorm's statistics, too, and no layer that starts at zero."""
    image_size, config = FAMILIES[family]
    config = json.loads(json.dumps(config))
    text = config["text_cfg"]
    if "hf_tokenizer_name" in text:
        text["hf_tokenizer_name"] = str(write_tokenizer(folder / "tokenizer"))
    if "hf_model_name" in text:
        options = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        RobertaConfig(**options, intermediate_size=64, max_position_embeddings=90, pad_token_id=0).save_pretrained(
            folder / "text"
        )
        text["hf_model_name"] = str(folder / "text")
    path = folder / f"{family}.json"
    path.write_text(json.dumps(config))
    side = config["vision_cfg"]["image_size"]
    weights = random_weights(ClipArchitecture.load(str(path), (side, side), None), 0)
    generator = torch.Generator().manual_seed(1)
    for name, value in weights.items():
        if value.is_floating_point() and ("running_var" in name or name.endswith("bn3.weight")):
            value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.75)
        elif value.is_floating_point() and not value.any():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
    save_file({name: value.clone().contiguous() for name, value in weights.items()}, folder / "clip.safetensors")
    return Files(path, folder / "clip.safetensors", image_size, config)


def open_clips_own(files: Files) -> Any:
    """open_clip's model with these weights, at the image size of its configuration."""
    clip = library.build_clip(str(files.backbone), files.config)
    clip.load_state_dict(load_file(files.weights))
    return clip.eval()
