"""Trains the small CLIP of this package on captioned drawings: seeded, on a CPU in half an hour.

    python -m anomalib_aprilgan.drawn_clip.pretrain --steps 6000 --seed 0 --out ViT-drawn-96.safetensors

A batch is good and bad twins of many products. Three losses: pictures against captions (those that
fit as well are left out), every picture against the two states of its name, exactly as zero-shot
scores are computed, and every patch against the same two by the mask of the defect.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import normalize
from tqdm import tqdm

from ..backbone import ClipArchitecture, ClipBackbone, build_clip
from ..data.drawing import CATEGORIES, DEFECTS
from ..pre_processing import CLIP_MEAN, CLIP_STD
from ..prompts import PromptEnsemble
from ..scoring import TEMPERATURE, text_logits, text_probability
from ..weights import write_atomically
from .captions import Caption, draw_caption, draw_noun, draw_state_sentences
from .muon import Muon
from .pictures import Pictures, draw_pictures, vary

ARCHITECTURE = Path(__file__).with_name("ViT-drawn-96.json")
# Neither captioned nor drawn in training, so that they can show what the model makes of the unknown.
UNSEEN_CATEGORIES = ("capsule", "leather", "nut", "tile")
UNSEEN_DEFECTS = ("dent", "fibre", "rotated_patch")
CAPTIONED_CATEGORIES = tuple(name for name in CATEGORIES if name not in UNSEEN_CATEGORIES)
DRAWN_DEFECTS = tuple(name for name in DEFECTS if name not in UNSEEN_DEFECTS)
# Seeds of products: training far away from the small numbers that anyone would test on.
TRAINING_SEED = 1_000_000_000
PROBE_SEED = 1_100_000_000


@dataclass(frozen=True)
class Recipe:
    """What the training depends on.

    Attributes:
        steps: Optimiser steps.
        seed: Seed of pictures, captions, order and initial weights.
        twins: Good and bad pairs a step.
        pool: Pairs drawn before the training.
        learning_rate: Peak learning rate.
        patch_weight: Weight of the patches' loss, at the start and at the end.
        contrast_weight: Weight of the loss of pictures against captions.
    """

    steps: int
    seed: int = 0
    twins: int = 32
    pool: int = 40_000
    learning_rate: float = 3e-3
    patch_weight: tuple[float, float] = (1.0, 0.3)
    contrast_weight: float = 0.2
    sentences: int = 4


class Trainer:
    """The small CLIP in training.

    Args:
        architecture: What to train.
        recipe: How.
        pictures: What on.
        device: Where.
    """

    def __init__(self, architecture: ClipArchitecture, recipe: Recipe, pictures: Pictures, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        state_dict = build_clip(architecture).state_dict()
        self.clip = ClipBackbone(architecture, state_dict, "initial weights").requires_grad_(requires_grad=True)
        self.clip.to(device)
        _initialise(self.clip)
        self.recipe, self.pictures, self.device = recipe, pictures, device
        self.choices = np.random.default_rng([recipe.seed, 1])
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.order = np.empty(0, dtype=np.int64)
        self.optimizers = _optimizers(self.clip, recipe.learning_rate)
        self.tokenise = cache(self._tokenise)

    def step(self, number: int) -> dict[str, float]:
        """One step; returns its losses."""
        progress = number / self.recipe.steps
        factor = min(1.0, (number + 1) / 100) * min(1.0, (1.0 - progress) / 0.6)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        losses = self.losses(self._next_twins())
        start, end = self.recipe.patch_weight
        weights = {"image": 1.0, "patch": start + (end - start) * progress, "contrast": self.recipe.contrast_weight}
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.clip.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return {"total": float(total), **{name: float(loss) for name, loss in losses.items()}}

    def losses(self, chosen: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, Tensor]:
        """The three losses of a batch of twins."""
        pictures = self.pictures
        good, bad = (_planes(array[chosen], self.device) for array in (pictures.good, pictures.bad))
        mask = torch.from_numpy(pictures.mask[chosen]).to(self.device).float()
        good, bad, mask = vary(good, bad, mask, self.generator)
        images = normalize(torch.cat([good, bad]), list(CLIP_MEAN), list(CLIP_STD))
        stages = range(2, self.clip.architecture.depth + 1)
        output = self.clip(images, stages)
        states = self._state_features([pictures.categories[twin] for twin in chosen])
        states = torch.cat([states, states])
        anomalous = torch.arange(len(images), device=self.device) >= len(chosen)
        visual = self.clip.visual
        patch = torch.stack(
            [
                patch_loss(text_logits(visual.ln_post(tokens) @ visual.proj, states), mask, self.clip.architecture.grid)
                for tokens in output.patch_tokens[-1:]
            ]
        ).mean()
        logits = text_logits(output.image_feature.unsqueeze(1), states).squeeze(1)
        return {
            "image": F.cross_entropy(logits, anomalous.long()),
            "patch": patch,
            "contrast": self._contrast(output.image_feature, chosen),
        }

    def _contrast(self, image_features: Tensor, chosen: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        shown: list[tuple[str, str | None]] = [(self.pictures.categories[twin], None) for twin in chosen]
        shown += [(self.pictures.categories[twin], self.pictures.kinds[twin]) for twin in chosen]
        captions = [draw_caption(category, kind, self.choices) for category, kind in shown]
        text_features = F.normalize(self._encode([caption.text for caption in captions]), dim=-1)
        scale = self.clip.text.logit_scale.exp().clamp(max=TEMPERATURE)  # type: ignore[union-attr]
        logits = scale * F.normalize(image_features, dim=-1) @ text_features.T
        return contrastive_loss(logits, also_fits(captions, shown).to(self.device))

    def _state_features(self, categories: list[str]) -> Tensor:
        """``(len(categories), D, 2)`` unit columns of a few sentences each, about the category or another noun."""
        nouns = [draw_noun(category, self.choices)[0] for category in categories]
        unique = sorted(set(nouns))
        number = self.recipe.sentences
        sentences = [
            sentence
            for noun in unique
            for state in draw_state_sentences(noun, number, self.choices)
            for sentence in state
        ]
        features = F.normalize(self._encode(sentences), dim=-1).view(len(unique), 2, number, -1).mean(dim=2)
        rows = torch.tensor([unique.index(noun) for noun in nouns], device=self.device)
        return F.normalize(features, dim=-1).transpose(1, 2)[rows]

    def _encode(self, sentences: list[str]) -> Tensor:
        """Features of sentences whose tokens are remembered, the context cut to the longest."""
        tokens = torch.stack([self.tokenise(sentence) for sentence in sentences])
        return encode_tokens(self.clip, tokens.to(self.device))

    def _tokenise(self, sentence: str) -> Tensor:
        if not hasattr(self, "_tokenizer"):
            self._tokenizer = self.clip._tokenizer()  # noqa: SLF001  # reads its vocabulary from disk: once
        return self._tokenizer(sentence)[0]

    def _next_twins(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The next twins of an order that visits all before any comes again."""
        if len(self.order) < self.recipe.twins:
            self.order = np.concatenate([self.order, self.choices.permutation(len(self.pictures))])
        chosen, self.order = self.order[: self.recipe.twins], self.order[self.recipe.twins :]
        return chosen


def encode_tokens(clip: ClipBackbone, tokens: Tensor) -> Tensor:
    text = clip.text
    ends = tokens.argmax(dim=-1)
    length = int(ends.max()) + 1
    stream = text.token_embedding(tokens[:, :length]) + text.positional_embedding[:length]
    from ..backbone import _run_blocks

    *_, stream = _run_blocks(text.transformer, stream, text.attn_mask[:length, :length])
    stream = text.ln_final(stream)
    return stream[torch.arange(len(stream)), ends] @ text.text_projection


def patch_loss(logits: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cross entropy of patches, defect and sound ones with equal weight.

    Args:
        logits: ``(2 B, L, 2)``, good pictures first, then their bad twins.
        mask: ``(B, H, W)`` of the bad ones. A patch is defective from 6 % of its pixels on; with
            fewer it counts as neither.
        grid: Rows and columns of patches.
    """
    share = F.adaptive_avg_pool2d(mask.unsqueeze(1), grid).flatten(1)
    share = torch.cat([torch.zeros_like(share), share])
    defective = share > 0.06
    known = defective | (share == 0)
    loss = F.cross_entropy(logits.flatten(0, 1), defective.flatten().long(), reduction="none").view_as(share)
    weight = torch.where(defective, 4.0, 1.0) * known
    return (loss * weight).sum() / weight.sum()


def contrastive_loss(logits: Tensor, ignored: Tensor) -> Tensor:
    """CLIP's symmetric loss of ``(B, B)`` similarities, pairs that fit by chance left out."""
    logits = logits.masked_fill(ignored, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2.0


def also_fits(captions: list[Caption], shown: list[tuple[str, str | None]]) -> Tensor:
    """``(B, B)``: whether the caption of another picture (column) is true of this one (row) too."""
    fits = torch.tensor([[caption.fits(*picture) for caption in captions] for picture in shown])
    return fits & ~torch.eye(len(shown), dtype=torch.bool)


@torch.no_grad()
def zero_shot_auroc(clip: ClipBackbone, pictures: Pictures) -> dict[str, float]:
    """Zero-shot image AUROC of every category, with the paper's prompts."""
    device = clip.visual.proj.device
    figures = {}
    for category in sorted(set(pictures.categories)):
        chosen = np.array([name == category for name in pictures.categories])
        images = torch.cat([_planes(array[chosen], device) for array in (pictures.good, pictures.bad)])
        features = [
            clip(normalize(batch, list(CLIP_MEAN), list(CLIP_STD)), []).image_feature for batch in images.split(128)
        ]
        states = clip.encode_states(*PromptEnsemble().sentences(category))
        target = torch.arange(len(images), device=device) >= len(images) // 2
        figures[category] = float(binary_auroc(text_probability(torch.cat(features), states), target.long()))
    return figures


def state_dict_of(clip: ClipBackbone) -> dict[str, Tensor]:
    """Weights under open_clip's names, in fp16."""
    weights = {f"visual.{name}": value for name, value in clip.visual.state_dict().items()}
    weights |= clip.text.state_dict()  # type: ignore[union-attr]  # freshly built: it has one
    return {name: value.detach().half().cpu().contiguous() for name, value in sorted(weights.items())}


def _planes(pictures: np.ndarray[Any, np.dtype[np.uint8]], device: torch.device) -> Tensor:
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255.0


def _initialise(clip: ClipBackbone) -> None:
    """Positions of patches start as waves over rows and columns: neighbours know each other from the first step."""
    rows, columns = clip.architecture.grid
    quarter = clip.architecture.width // 4
    frequencies = torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    waves = [wave(place[:, axis : axis + 1] * frequencies) for axis in (0, 1) for wave in (torch.sin, torch.cos)]
    with torch.no_grad():
        clip.visual.positional_embedding[1:] = 0.1 * torch.cat(waves, dim=1)


def _optimizers(clip: ClipBackbone, learning_rate: float) -> list[torch.optim.Optimizer]:
    matrices, tables, vectors = [], [], []
    for name, parameter in clip.named_parameters():
        if "resblocks" in name and parameter.ndim == 2:
            matrices.append(parameter)
        elif parameter.ndim >= 2 and "positional" not in name and "token_embedding" not in name:
            tables.append(parameter)
        else:
            vectors.append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, learning_rate, weight_decay=0.05),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
