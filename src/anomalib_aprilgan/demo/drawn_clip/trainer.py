"""One training step of the small CLIP after another.

A batch is good and bad twins, several of each of many products. Four losses: every picture against the
two states of its name, exactly as zero-shot scores are computed; the same scores of the bad pictures of
a product against those of its good ones; every patch against the two states by the mask of the defect;
and, now and then, pictures against captions (those that fit as well are left out).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.v2.functional import normalize

from ...clip import library
from ...clip.architecture import ClipArchitecture
from ...clip.backbone import ClipBackbone, VisionOutput
from ...data.pre_processing import CLIP_MEAN, CLIP_STD
from ...network.scoring import TEMPERATURE, text_logits
from ..drawing import INVENTIONS
from .captions import draw_caption, draw_noun, draw_state_sentences
from .muon import Muon
from .objectives import also_fits, contrastive_loss, patch_loss, ranking_loss
from .pictures import Pictures, crop, vary

Choice = NDArray[np.int64]
# Of normalised pixels: what sensor noise makes of it.
_NOISE_VARIANCE = 0.01


@dataclass(frozen=True)
class Recipe:
    """What the training depends on.

    Attributes:
        steps: Optimiser steps.
        seed: Seed of pictures, captions, order and initial weights.
        products: Products drawn before the training.
        per_product: Twins of each; they are looked at together.
        phases: Up to which share of the steps, side in pixels of the windows that are looked at, and products
            a step. Small windows first: for the same work many more defects are seen.
        inventions: How many products are goods that do not exist, for each that is of a category.
        inventions_from: Share of the steps before which only categories are shown: of fewer looks,
            what a defect is is learned sooner.
        sentences: Sentences a state for the ensembles of a step.
        learning_rate: Peak learning rate of the blocks' matrices, under Muon.
        table_learning_rate: Peak learning rate of all else, under AdamW.
        image_weight: Weight of the loss of pictures against the states of their names.
        ranking_weight: Weight of the loss of bad against good pictures of a product.
        patch_weight: Weight of the patches' loss, at the start and at the end.
        contrast_weight: Weight of the loss of pictures against captions.
        contrast_every: Steps from one to the next that has it.
        cooling: Power of the remaining share of the steps by which the learning rates fall to zero.
        decay: Of the running mean of the weights, per step.
    """

    steps: int = 21_000
    seed: int = 0
    products: int = 24_000
    per_product: int = 4
    phases: tuple[tuple[float, int, int], ...] = ((0.72, 32, 32), (1.0, 96, 6))
    inventions: int = 2
    inventions_from: float = 0.12
    sentences: int = 2
    learning_rate: float = 4e-3
    table_learning_rate: float = 3e-3
    image_weight: float = 0.3
    ranking_weight: float = 1.0
    patch_weight: tuple[float, float] = (1.0, 0.4)
    contrast_weight: float = 0.2
    contrast_every: int = 4
    cooling: float = 2.0
    decay: float = 0.9975


class Trainer:
    """The small CLIP in training.

    Args:
        architecture: What to train.
        recipe: How.
        pictures: What on, ``recipe.per_product`` twins of every product.
        device: Where.

    Attributes:
        clip: With the weights of the last step.
        mean: The running mean of the weights.
    """

    def __init__(
        self, architecture: ClipArchitecture, recipe: Recipe, pictures: Pictures, device: torch.device
    ) -> None:
        self.clip = _fresh(architecture, recipe.seed).to(device)
        _initialise(self.clip, pictures)
        averaging = get_ema_multi_avg_fn(recipe.decay)  # type: ignore[no-untyped-call]
        self.mean = AveragedModel(self.clip, multi_avg_fn=averaging)
        # Of the same shape for windows of pictures; they run with the weights of the one above.
        self.windowed = {
            side: _fresh(ClipArchitecture.load(architecture.name, (side, side), None), recipe.seed).to(device)
            for _, side, _ in recipe.phases
        }
        self.recipe, self.pictures, self.device = recipe, pictures, device
        self.choices = np.random.default_rng([recipe.seed, 1])
        self.generator = torch.Generator().manual_seed(recipe.seed)
        categories = pictures.categories[:: recipe.per_product]
        self.everything = np.arange(len(categories))
        self.known = self.everything[[category not in INVENTIONS for category in categories]]
        self.order = self.everything[:0]
        self.optimizers = _optimizers(self.clip, recipe.learning_rate, recipe.table_learning_rate)

    @property
    def kept(self) -> ClipBackbone:
        """What to keep: with the running mean of the weights, as single steps are noisy."""
        clip: ClipBackbone = self.mean.module  # type: ignore[assignment]
        return clip

    def step(self, number: int) -> dict[str, float]:
        """One step; returns its losses."""
        recipe, progress = self.recipe, number / self.recipe.steps
        factor = min(1.0, (number + 1) / 100) * (1.0 - progress) ** recipe.cooling
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        side, products = next((side, products) for until, side, products in recipe.phases if progress < until)
        shown = self.known if progress < recipe.inventions_from else self.everything
        twins = crop(self.pictures, self._next_twins(shown, products), side, self.choices)
        losses = self.losses(twins, contrast=number % recipe.contrast_every == 0)
        start, end = recipe.patch_weight
        weights = {
            "image": recipe.image_weight,
            "ranking": recipe.ranking_weight,
            "patch": start + (end - start) * progress,
            "contrast": recipe.contrast_weight,
        }
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.clip.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.mean.update_parameters(self.clip)
        return {name: loss.item() for name, loss in losses.items()}

    def losses(self, twins: Pictures, *, contrast: bool = True) -> dict[str, Tensor]:
        """The losses of a batch of twins, those of a product one after the other.

        Args:
            twins: What is looked at.
            contrast: Whether also the one of pictures against captions.
        """
        per_product = self.recipe.per_product
        good, bad = (as_planes(array, self.device) for array in (twins.good, twins.bad))
        mask = torch.from_numpy(twins.mask).to(self.device).float()
        good, bad, mask = vary(good, bad, mask, self.generator)
        images = normalize(torch.cat([good, bad]), list(CLIP_MEAN), list(CLIP_STD))
        with _half_precision(self.device):
            output = self._look(images)
            states = self._state_features(twins.categories[::per_product])
        states = states.repeat_interleave(per_product, dim=0).repeat(2, 1, 1)
        image_feature = output.image_feature.float()
        anomalous = torch.arange(len(images), device=self.device) >= len(twins)
        visual = self.clip.visual
        patch = [
            patch_loss(text_logits(visual.ln_post(tokens.float()) @ visual.proj, states), mask)
            for tokens in output.patch_tokens
        ]
        image_logits = text_logits(image_feature.unsqueeze(1), states).squeeze(1)
        margins = (image_logits[:, 1] - image_logits[:, 0]).view(2, -1, per_product)
        losses = {
            "image": F.cross_entropy(image_logits, anomalous.long()),
            "ranking": ranking_loss(margins),
            "patch": torch.stack(patch).mean(),
        }
        return losses | ({"contrast": self._contrast(image_feature, twins)} if contrast else {})

    def _look(self, images: Tensor) -> VisionOutput:
        """A pass over whole pictures, or over windows with the positions of a window anywhere in the picture."""
        patch = self.clip.architecture.config["vision_cfg"]["patch_size"]
        (rows, columns), shown = self.clip.architecture.shapes[0].grid, images.shape[-1] // patch
        table = self.clip.visual.positional_embedding
        top, left = int(self.choices.integers(rows - shown + 1)), int(self.choices.integers(columns - shown + 1))
        window = table[1:].unflatten(0, (rows, columns))[top : top + shown, left : left + shown].flatten(0, 1)
        weights = dict(self.clip.named_parameters()) | {"visual.positional_embedding": torch.cat([table[:1], window])}
        # The class token of the last block looks at what the block before it says, hence both.
        depth = len(self.clip.architecture.shapes)
        output: VisionOutput = functional_call(self.windowed[images.shape[-1]], weights, (images, [depth - 1, depth]))
        return output

    def _contrast(self, image_features: Tensor, twins: Pictures) -> Tensor:
        """CLIP's loss of up to 64 pictures and their captions."""
        number = min(len(twins), 32)
        image_features = torch.cat([image_features[:number], image_features[len(twins) :][:number]])
        shown: list[tuple[str, str | None]] = [(category, None) for category in twins.categories[:number]]
        shown += zip(twins.categories[:number], twins.kinds[:number], strict=True)
        captions = [draw_caption(category, kind, self.choices) for category, kind in shown]
        with _half_precision(self.device):
            text_features = self.clip.encode_text([caption.text for caption in captions])
        scale = self.clip.text.logit_scale.exp().clamp(max=TEMPERATURE)  # type: ignore[union-attr]
        logits = scale * F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T
        return contrastive_loss(logits, also_fits(captions, shown).to(self.device))

    def _state_features(self, categories: Sequence[str]) -> Tensor:
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
        features = F.normalize(self.clip.encode_text(sentences), dim=-1).view(len(unique), 2, number, -1).mean(dim=2)
        rows = torch.tensor([unique.index(noun) for noun in nouns], device=self.device)
        return F.normalize(features, dim=-1).transpose(1, 2)[rows]

    def _next_twins(self, shown: Choice, products: int) -> Choice:
        """All twins of the next products, of an order that visits all that are shown before any comes again."""
        while len(self.order) < products:
            self.order = np.concatenate([self.order, self.choices.permutation(shown)])
        chosen, self.order = self.order[:products], self.order[products:]
        per_product = self.recipe.per_product
        twins: Choice = (chosen[:, None] * per_product + np.arange(per_product)).ravel()
        return twins


@contextmanager
def _half_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in bf16; on a CPU attention in them too: its fused kernel is far slower backwards in bf16."""
    kernels = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(kernels):
        yield


def as_planes(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """``(B, 3, H, W)`` in ``[0, 1]`` of 8-bit pictures ``(B, H, W, 3)``."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255.0


def _fresh(architecture: ClipArchitecture, seed: int) -> ClipBackbone:
    clip = ClipBackbone(architecture, random_weights(architecture, seed), "fresh weights")
    return clip.requires_grad_(requires_grad=True)


@torch.no_grad()
def _initialise(clip: ClipBackbone, pictures: Pictures) -> None:
    """A start from which patches are told apart sooner.

    The first layer whitens: raw patches are nearly all brightness, and a scratch is a thousandth
    of their variance. Positions are waves over rows and columns: neighbours know each other.
    """
    visual, width = clip.visual, clip.architecture.shapes[0].width
    size = visual.conv1.kernel_size[0]
    some = np.linspace(0, len(pictures) - 1, 500).astype(np.int64)
    images = normalize(as_planes(pictures.bad[some], visual.proj.device), list(CLIP_MEAN), list(CLIP_STD))
    patches = F.unfold(images, size, stride=size).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    filters = directions[:, -width:] / (variances[-width:] + _NOISE_VARIANCE).sqrt()
    visual.conv1.weight.zero_()
    visual.conv1.weight[: filters.shape[1]] = filters.T.unflatten(1, (3, size, size))
    rows, columns = clip.architecture.shapes[0].grid
    quarter = width // 4
    frequencies = torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    waves = [wave(place[:, axis : axis + 1] * frequencies) for axis in (0, 1) for wave in (torch.sin, torch.cos)]
    visual.positional_embedding[1:] = 0.3 * torch.cat(waves, dim=1).to(visual.proj.device)


def _optimizers(clip: ClipBackbone, learning_rate: float, table_learning_rate: float) -> list[torch.optim.Optimizer]:
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
            table_learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def random_weights(architecture: ClipArchitecture, seed: int) -> dict[str, Tensor]:
    """open_clip's initial weights, repeatable; no random generator of the caller moves, on no device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every accelerator, too
        return dict(library.build_clip(architecture.name, architecture.config).state_dict())
