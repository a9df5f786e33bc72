"""What normal looks like: the patch tokens of the reference images, stage by stage (arXiv:2305.17382, sec. 2.2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip.architecture import ClipArchitecture
from ..clip.backbone import VisionOutput
from ..clip.vision_tower import TowerArchitecture, VisionTower
from ..data.pre_processing import resize_image
from .coreset import coreset_indices
from .few_shot import FewShotScorer, rows_in
from .scoring import distance_map, nearest_normal_distance, neighbourhood_mean, unlabelled_distance

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


class MemoryBank(FewShotScorer):
    """Patch tokens of the references, and distances to the nearest of them.

    For each class ``features`` ``(K, N)``: of each image the tokens ``(L, C)`` of every stage, one after the other.
    They are stored with unit length: only their directions count. They are averaged over a square neighbourhood, of an
    odd side in patches, before they are remembered or compared; 1 leaves them as they are.

    A bounded bank keeps a coreset of the references instead: ``coreset`` ``(M, C_1 + C_2 + …)``, of every stage ``M``
    patches side by side, and ``coreset_images`` ``(M, S)``, the reference that each is of. Images that are added later
    are kept whole.
    """

    def __init__(
        self,
        architecture: ClipArchitecture | TowerArchitecture,
        stages: Sequence[int],
        neighbourhood: int = 1,
        options: BankOptions | None = None,
    ) -> None:
        super().__init__()
        self.stages, self.neighbourhood, self.options = tuple(stages), neighbourhood, options or BankOptions()
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
        self._set_coreset(row, None)
        self.set_features(row, self._features_of(images, output))

    def add(self, row: int, images: Tensor, output: VisionOutput) -> None:
        """Remember these images of a class too, whole; see the base class."""
        self.extend(row, self._features_of(images, output))

    def extend(self, row: int, features: Tensor) -> None:
        """Append images that are kept whole; see the base class."""
        self.set_features(row, torch.cat([self._whole(row), features]))

    def _features_of(self, images: Tensor, output: VisionOutput) -> Tensor:
        tokens = [F.normalize(tokens.detach().float(), dim=-1) for tokens in self.tokens_of(images, output)]
        return torch.cat([stage.flatten(1) for stage in tokens], dim=1).to(DTYPES[self.options.dtype])

    def condense(self, row: int) -> None:
        """Replace the references of a class by a coreset of their patches, where the bank is bounded.

        Patches are chosen stage by stage (anomalib's k-center greedy). A ValueError where there are fewer of them.
        """
        if self.options.size is None:
            return
        chosen, images = [], []
        for stage, bank in enumerate(self.banks_of(self.features(row))):
            patches = bank.flatten(0, 1)
            indices = coreset_indices(patches, self.options.size, self.options.seed + stage)
            chosen.append(patches[indices])
            images.append(indices // bank.shape[1])
        self._set_coreset(row, (torch.cat(chosen, dim=1), torch.stack(images, dim=1).to(torch.int32)))
        self.set_features(row, chosen[0].new_empty(0))

    def number(self, row: int) -> int:
        """Number of images that are remembered of a class, whole or in part; see the base class."""
        images = dict(self.remembered[row].named_buffers()).get("coreset_images")
        return len(self._whole(row)) + (0 if images is None or not len(images) else int(images.max()) + 1)

    def _whole(self, row: int) -> Tensor:
        """``(K, N)`` of the images that are kept whole, perhaps none."""
        features = self.remembered[row].get_buffer("features")
        width = sum(math.prod(shape.grid) * shape.width for shape in self.shapes)
        return features if features.ndim == 2 else features.new_empty((0, width), dtype=DTYPES[self.options.dtype])

    def _set_coreset(self, row: int, coreset: tuple[Tensor, Tensor] | None) -> None:
        for name, value in zip(("coreset", "coreset_images"), coreset or (None, None), strict=True):
            vars(self.remembered[row])["_buffers"].pop(name, None)
            if value is not None:
                self.remembered[row].register_buffer(name, value)

    def banks_of(self, features: Tensor) -> list[Tensor]:
        """Images that are kept whole as tokens ``(K, L, C)`` of every stage."""
        grids = [(math.prod(shape.grid), shape.width) for shape in self.shapes]
        parts = torch.split(features, [patches * width for patches, width in grids], dim=1)
        return [part.view(-1, *grid) for part, grid in zip(parts, grids, strict=True)]

    def check_features(self, features: Tensor) -> None:
        """Raise a ValueError unless they are tokens of these stages, or none; see the base class."""
        expected = sum(math.prod(shape.grid) * shape.width for shape in self.shapes)
        if features.numel() and (features.ndim != 2 or features.shape[1] != expected):
            msg = f"`ckpt_path`: a memory bank must be (K, {expected}) for this tower, got {tuple(features.shape)}."
            raise ValueError(msg)

    def make_room(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        """Have buffers for the tensors of a class; see the base class."""
        super().make_room(row, tensors)
        coreset, images = tensors.get("coreset"), tensors.get("coreset_images")
        self._set_coreset(row, None)
        if coreset is None and images is None:
            return
        width, stages = sum(shape.width for shape in self.shapes), len(self.shapes)
        if coreset is None or images is None or coreset.shape != (len(images), width) or images.ndim != 2:
            msg = f"`ckpt_path`: a coreset must be (M, {width}), with the image of every patch, for this tower."
            raise ValueError(msg)
        if images.shape[1] != stages or images.is_floating_point() or (images < 0).any():
            msg = f"`ckpt_path`: the images of a coreset must be (M, {stages}) numbers from 0 up."
            raise ValueError(msg)
        self._set_coreset(row, (torch.empty_like(coreset), torch.empty_like(images)))

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
        banks = [self._kept(stage, without) for stage in self.parts_of(row)]
        floats = [stage.float() for stage in tokens]
        if self.options.lowest_share is None:
            distances = [nearest_normal_distance(stage, bank) for stage, bank in zip(floats, banks, strict=True)]
        else:
            distances = unlabelled_distance(floats, banks, self.options.lowest_share)
        maps = [
            distance_map(distance, shape.grid, size) for distance, shape in zip(distances, self.shapes, strict=True)
        ]
        return torch.stack(maps).sum(dim=0)

    def parts_of(self, row: int) -> list[list[Part]]:
        """What is remembered of a class, part by part for every stage; a RuntimeError if nothing is."""
        remembered, whole = dict(self.remembered[row].named_buffers()), self._whole(row)
        stages: list[list[Part]] = [[] for _ in self.shapes]
        first = 0
        if "coreset" in remembered:
            images, first = remembered["coreset_images"], self.number(row) - len(whole)
            widths = [shape.width for shape in self.shapes]
            for stage, tokens in enumerate(torch.split(remembered["coreset"], widths, dim=1)):
                stages[stage].append(Part(tokens, images[:, stage]))
        elif not len(whole):
            self.features(row)  # raises
        for stage, bank in enumerate(self.banks_of(whole)):
            stages[stage] += [Part(tokens, first + shot) for shot, tokens in enumerate(bank)]
        return stages

    def _kept(self, parts: Sequence[Part], without: Collection[int]) -> list[Tensor]:
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
        if self.options.dtype == "float32":
            return [tokens.float() for tokens in kept if len(tokens)]
        # Rounding has changed their lengths.
        return [F.normalize(tokens.float(), dim=-1) for tokens in kept if len(tokens)]


class VisionMemoryBank(MemoryBank):
    """A memory bank in the features of a vision tower of its own (AnomalyDINO, arXiv:2405.14529).

    Images come as CLIP takes them. They are brought to the tower's size and statistics. The frozen tower is attached
    later, as the network's CLIP is, and is no part of a checkpoint.

    Args:
        architecture: The tower and its image size.
        stages: Tapped stages of the tower, counted from 1, after its last normalisation.
        statistics: Channel means and standard deviations that images come normalised with.
        neighbourhood: See ``MemoryBank``.
        options: See ``MemoryBank``.
    """

    def __init__(
        self,
        architecture: TowerArchitecture,
        stages: Sequence[int],
        statistics: tuple[Sequence[float], Sequence[float]],
        neighbourhood: int = 1,
        options: BankOptions | None = None,
    ) -> None:
        super().__init__(architecture, stages, neighbourhood, options)
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
