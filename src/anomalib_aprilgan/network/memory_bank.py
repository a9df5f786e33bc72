"""What normal looks like: the patch tokens of the reference images, stage by stage (arXiv:2305.17382, sec. 2.2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip.architecture import ClipArchitecture
from ..clip.backbone import VisionOutput
from ..clip.vision_tower import TowerArchitecture, VisionTower
from ..data.pre_processing import resize_image
from .few_shot import FewShotScorer, rows_in
from .scoring import distance_map, nearest_normal_distance, neighbourhood_mean


class MemoryBank(FewShotScorer):
    """Patch tokens of the references, and distances to the nearest of them.

    For each class ``(K, N)``: of each image the tokens ``(L, C)`` of every stage, one after the other. They are stored
    with unit length: only their directions count. They are averaged over a square neighbourhood, of an odd side in
    patches, before they are remembered or compared; 1 leaves them as they are.
    """

    def __init__(
        self, architecture: ClipArchitecture | TowerArchitecture, stages: Sequence[int], neighbourhood: int = 1
    ) -> None:
        super().__init__()
        self.stages, self.neighbourhood = tuple(stages), neighbourhood
        self.shapes = tuple(architecture.shapes[stage - 1] for stage in stages)
        # A cosine distance of one half counts as certain; 2 is the opposite direction.
        self.map_limit, self.map_ceiling = 0.5 * len(self.stages), 2.0 * len(self.stages)

    def tokens_of(self, images: Tensor, output: VisionOutput) -> list[Tensor]:
        """Per stage of the bank ``(B, L, C)`` tokens, averaged over their neighbourhoods."""
        return [
            neighbourhood_mean(tokens, shape.grid, self.neighbourhood)
            for tokens, shape in zip(self._raw_tokens(images, output), self.shapes, strict=True)
        ]

    def _raw_tokens(self, images: Tensor, output: VisionOutput) -> list[Tensor]:
        del images  # CLIP has seen them
        return [output.tokens_of(stage) for stage in self.stages]

    def fill(self, row: int, images: Tensor, output: VisionOutput) -> None:
        """Forget the references of a class and remember these; see the base class."""
        tokens = [F.normalize(tokens.detach().float(), dim=-1) for tokens in self.tokens_of(images, output)]
        self.set_features(row, torch.cat([stage.flatten(1) for stage in tokens], dim=1))

    def banks_of(self, features: Tensor) -> list[Tensor]:
        """What is remembered of a class as tokens ``(K, L, C)`` of every stage."""
        grids = [(math.prod(shape.grid), shape.width) for shape in self.shapes]
        parts = torch.split(features, [patches * width for patches, width in grids], dim=1)
        return [part.view(-1, *grid) for part, grid in zip(parts, grids, strict=True)]

    def check_features(self, features: Tensor) -> None:
        """Raise a ValueError unless they are tokens of these stages, or none; see the base class."""
        expected = sum(math.prod(shape.grid) * shape.width for shape in self.shapes)
        if features.numel() and (features.ndim != 2 or features.shape[1] != expected):
            msg = f"`ckpt_path`: a memory bank must be (K, {expected}) for this tower, got {tuple(features.shape)}."
            raise ValueError(msg)

    def distance_maps(
        self, images: Tensor, output: VisionOutput, rows: Tensor | None, without: Collection[int] = ()
    ) -> Tensor:
        """Distance of each patch to the nearest remembered one, summed over the stages; see the base class."""
        size, tokens = (images.shape[-2], images.shape[-1]), self.tokens_of(images, output)
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
        kept = [shot for shot in range(len(features)) if shot not in without]
        maps = []
        for stage, bank, shape in zip(tokens, self.banks_of(features), self.shapes, strict=True):
            distance = nearest_normal_distance(stage.float(), [bank[shot].float() for shot in kept])
            maps.append(distance_map(distance, shape.grid, size))
        return torch.stack(maps).sum(dim=0)


class VisionMemoryBank(MemoryBank):
    """A memory bank in the features of a vision tower of its own (AnomalyDINO, arXiv:2405.14529).

    Images come as CLIP takes them. They are brought to the tower's size and statistics. The frozen tower is attached
    later, as the network's CLIP is, and is no part of a checkpoint.

    Args:
        architecture: The tower and its image size.
        stages: Tapped stages of the tower, counted from 1, after its last normalisation.
        statistics: Channel means and standard deviations that images come normalised with.
        neighbourhood: See ``MemoryBank``.
    """

    def __init__(
        self,
        architecture: TowerArchitecture,
        stages: Sequence[int],
        statistics: tuple[Sequence[float], Sequence[float]],
        neighbourhood: int = 1,
    ) -> None:
        super().__init__(architecture, stages, neighbourhood)
        self.taps, self.stages = self.stages, ()  # none of CLIP's
        self.architecture, self.tower, self._statistics = architecture, None, statistics

    tower: VisionTower | None

    def attach_tower(self, tower: VisionTower) -> None:
        """Give the bank its frozen tower."""
        self.tower = tower

    def _raw_tokens(self, images: Tensor, output: VisionOutput) -> list[Tensor]:
        del output
        if self.tower is None:
            msg = "The memory bank has no vision tower yet: call `AprilGAN.setup('predict')` first."
            raise RuntimeError(msg)
        # In fp32 also where a model is converted, hence no buffers.
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(values, device=images.device).view(3, 1, 1) for values in statistics]
            for statistics in (self._statistics, self.architecture.statistics)
        )
        pixels = images.float() * std + mean
        if tuple(images.shape[-2:]) != self.architecture.image_size:
            pixels = resize_image(pixels, self.architecture.image_size)
        tokens: list[Tensor] = self.tower((pixels - own_mean) / own_std, self.taps)
        return tokens
