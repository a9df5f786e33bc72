"""What normal looks like: the patch tokens of the reference images, stage by stage."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MemoryBank(nn.Module):
    """Patch tokens of ``K`` normal images per stage, as one buffer ``tokens`` ``(S, K, L, C)``.

    The rows are stored with unit length: only their directions are ever asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.empty(0))
        self.tokens: Tensor

    @property
    def k_shot(self) -> int:
        """Number of remembered images; 0 for an empty bank."""
        return self.tokens.shape[1] if self.tokens.ndim == 4 else 0

    def fill(self, patch_tokens: Sequence[Tensor]) -> None:
        """Forget what was there and remember these images.

        Args:
            patch_tokens: Per stage ``(K, L, C)`` raw tokens, in ascending order of stages.
        """
        self.tokens = F.normalize(torch.stack([tokens.detach().float() for tokens in patch_tokens]), dim=-1)

    def stages(self, *, without: Collection[int] = ()) -> list[list[Tensor]]:
        """The remembered patches of every stage, image by image.

        Args:
            without: Indices of remembered images to hold out.

        Returns:
            Per stage a list of ``(L, C)`` tensors in fp32, unit rows.

        Raises:
            RuntimeError: The bank is empty.
        """
        if self.k_shot == 0:
            msg = "The memory bank is empty: call `AprilGAN.setup` with `references` or a datamodule first."
            raise RuntimeError(msg)
        kept = [shot for shot in range(self.k_shot) if shot not in without]
        return [[stage[shot].float() for shot in kept] for stage in self.tokens]

    @contextmanager
    def without(self, shots: Collection[int]) -> Iterator[None]:
        """Some remembered images held out for as long as the context lasts.

        Args:
            shots: Their indices.
        """
        everything = self.tokens
        if shots:
            kept = [shot for shot in range(self.k_shot) if shot not in shots]
            self.tokens = everything[:, kept]
        try:
            yield
        finally:
            self.tokens = everything
