"""Parts of a memory bank: how they are stored, and which of them count."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Number types that patch tokens can be stored in, by the name that `memory_dtype` takes.
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class BankOptions:
    """How much is remembered, and how it is compared; by default everything, as published.

    Attributes:
        size: Patches of every stage that are kept of the references of a class; ``None`` for all.
        dtype: Name of the number type that they are stored in, one of ``DTYPES``. They are compared in fp32.
        lowest_share: Share of the references, those most like a patch, whose mean distance counts, in ``(0, 1]``. For
            references that may be defective; ``None``, as published, for the distance to the nearest patch of them all.
        seed: Seed of the choice of patches.
    """

    size: int | None = None
    dtype: str = "float32"
    lowest_share: float | None = None
    seed: int = 0


class Part(NamedTuple):
    """Patches ``(N, C)`` of one stage, and the references that they are of: one number, or ``(N,)``."""

    tokens: Tensor
    images: int | Tensor


def kept_patches(parts: Sequence[Part], without: Collection[int] = ()) -> list[Tensor]:
    """The patches ``(N, C)`` of every part, unit rows in fp32, without those of references that are held out."""
    kept = []
    for tokens, images in parts:
        if isinstance(images, int):
            kept += [] if images in without else [tokens]
        elif without:
            held_out = torch.tensor(list(without), device=images.device, dtype=images.dtype)
            kept.append(tokens[~torch.isin(images, held_out)])
        else:
            kept.append(tokens)
    # Rounding to fewer bits has changed their lengths.
    return [
        tokens if tokens.dtype == torch.float32 else F.normalize(tokens.float(), dim=-1)
        for tokens in kept
        if len(tokens)
    ]
