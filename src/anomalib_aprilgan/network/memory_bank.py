"""What normal looks like: the patch tokens of the reference images, stage by stage (arXiv:2305.17382, sec. 2.2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip.architecture import ClipArchitecture
from ..clip.backbone import VisionOutput
from .few_shot import FewShotScorer, rows_in
from .scoring import distance_map, nearest_normal_distance, neighbourhood_mean


class MemoryBank(FewShotScorer):
    """Patch tokens of the references, ``(S, K, L, C)`` for each class, and distances to the nearest of them.

    The tokens are stored with unit length: only their directions count. They are averaged over a square neighbourhood,
    of an odd side in patches, before they are remembered or compared; 1 leaves them as they are.
    """

    def __init__(self, architecture: ClipArchitecture, stages: Sequence[int], neighbourhood: int = 1) -> None:
        super().__init__()
        self.grid, self.stages, self.neighbourhood = architecture.grid, tuple(stages), neighbourhood
        self._architecture = architecture
        # A cosine distance of one half counts as certain; 2 is the opposite direction.
        self.map_limit, self.map_ceiling = 0.5 * len(self.stages), 2.0 * len(self.stages)

    def tokens_of(self, output: VisionOutput) -> list[Tensor]:
        """Per stage of the bank ``(B, L, C)`` tokens, averaged over their neighbourhoods."""
        return [neighbourhood_mean(output.tokens_of(stage), self.grid, self.neighbourhood) for stage in self.stages]

    def fill(self, row: int, images: Tensor, output: VisionOutput) -> None:
        """Forget the references of a class and remember these; see the base class."""
        del images  # CLIP has seen them
        tokens = torch.stack([tokens.detach().float() for tokens in self.tokens_of(output)])
        self.set_features(row, F.normalize(tokens, dim=-1))

    def check_features(self, features: Tensor) -> None:
        """Raise a ValueError unless they are tokens of these stages, or none; see the base class."""
        expected = (len(self.stages), *features.shape[1:2], math.prod(self.grid), self._architecture.width)
        if features.numel() and tuple(features.shape) != expected:
            msg = f"`ckpt_path`: a memory bank must be {expected} for this CLIP, got {tuple(features.shape)}."
            raise ValueError(msg)

    def distance_maps(
        self, images: Tensor, output: VisionOutput, rows: Tensor | None, without: Collection[int] = ()
    ) -> Tensor:
        """Distance of each patch to the nearest remembered one, summed over the stages; see the base class."""
        size, tokens = (images.shape[-2], images.shape[-1]), self.tokens_of(output)
        parts = list(rows_in(rows, len(self.remembered)))
        if len(parts) == 1:
            return self._map_of_row(parts[0][0], tokens, size, without)
        maps = tokens[0].new_zeros((len(images), *size), dtype=torch.float32)
        for row, chosen in parts:
            maps[chosen] = self._map_of_row(row, [stage[chosen] for stage in tokens], size, without)
        return maps

    def _map_of_row(
        self, row: int, tokens: Sequence[Tensor], size: tuple[int, int], without: Collection[int]
    ) -> Tensor:
        features = self.features(row)
        kept = [shot for shot in range(features.shape[1]) if shot not in without]
        maps = [
            distance_map(nearest_normal_distance(stage.float(), [bank[shot].float() for shot in kept]), self.grid, size)
            for stage, bank in zip(tokens, features, strict=True)
        ]
        return torch.stack(maps).sum(dim=0)
