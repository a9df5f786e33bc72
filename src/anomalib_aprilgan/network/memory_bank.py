"""What normal looks like: the patch tokens of the reference images, stage by stage (arXiv:2305.17382, sec. 2.2)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip.architecture import ClipArchitecture
from ..clip.backbone import VisionOutput
from ..clip.vision_tower import TowerArchitecture, VisionTower
from ..data.pre_processing import resize_image
from .bank_parts import DTYPES, BankOptions, Part, kept_patches
from .coreset import coreset_indices
from .few_shot import Comparison, FewShotScorer, rows_in
from .scoring import distance_map, nearest_normal_distance, neighbourhood_mean, unlabelled_distance


class MemoryBank(FewShotScorer):
    """Patch tokens of the references, and distances to the nearest of them.

    For each class ``features`` ``(K, N)``: of each image the tokens ``(L, C)`` of every stage, one after the other.
    They are stored with unit length: only their directions count. They are averaged over a square neighbourhood, of an
    odd side in patches, before they are remembered or compared; 1 leaves them as they are.

    A bounded bank keeps a coreset of the references instead: ``coreset`` ``(M, C_1 + C_2 + …)``, of every stage ``M``
    patches side by side, and ``coreset_images`` ``(M, S)``, the reference that each is of. Good parts that are accepted
    later are kept whole, and apart: ``accepted`` ``(A, N)``.
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
        self._set_buffers(row, coreset=None, coreset_images=None)
        self.set_features(row, self._features_of(images, output))

    def accept(self, row: int, images: Tensor, output: VisionOutput) -> None:
        """Remember good parts of a class beside the references, whole."""
        before, features = self.accepted(row), self._features_of(images, output)
        self._set_buffers(row, accepted=torch.cat([before, features]) if len(before) else features)

    def drop_accepted(self, row: int, number: int) -> None:
        """Forget the good parts of a class that were accepted last, so many."""
        kept = self.accepted(row)[: len(self.accepted(row)) - number]
        self._set_buffers(row, accepted=kept.clone() if len(kept) else None)

    def accepted(self, row: int) -> Tensor:
        """The accepted parts of a class ``(A, N)``, perhaps none."""
        found = self._buffers_of(row).get("accepted")
        return torch.empty(0) if found is None else found

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
        self._set_buffers(
            row, coreset=torch.cat(chosen, dim=1), coreset_images=torch.stack(images, dim=1).to(torch.int32)
        )
        self.set_features(row, chosen[0].new_empty(0))

    def number(self, row: int) -> int:
        """Number of references that are remembered of a class, whole or in part; see the base class."""
        images = self._buffers_of(row).get("coreset_images")
        return super().number(row) if images is None or not len(images) else int(images.max()) + 1

    def _buffers_of(self, row: int) -> dict[str, Tensor]:
        return dict(self.remembered[row].named_buffers())

    def _set_buffers(self, row: int, **values: Tensor | None) -> None:
        """Replace buffers of a class beside its features; there are none where the value is ``None``."""
        for name, value in values.items():
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
        coreset, images, accepted = (tensors.get(name) for name in ("coreset", "coreset_images", "accepted"))
        width, stages = sum(shape.width for shape in self.shapes), len(self.shapes)
        if (coreset is None) != (images is None):
            msg = "`ckpt_path`: a coreset and the images of its patches go together, and one of them is missing."
            raise ValueError(msg)
        if coreset is not None and images is not None:
            shapes = (len(images), width), (len(coreset), stages)
            if (
                (tuple(coreset.shape), tuple(images.shape)) != shapes
                or images.is_floating_point()
                or (images < 0).any()
            ):
                msg = (
                    f"`ckpt_path`: a coreset must be (M, {width}), its images (M, {stages}) from 0 up, for this tower."
                )
                raise ValueError(msg)
        if accepted is not None:
            self.check_features(accepted)
        given = {"coreset": coreset, "coreset_images": images, "accepted": accepted}
        self._set_buffers(
            row, **{name: None if value is None else torch.empty_like(value) for name, value in given.items()}
        )

    def distance_maps(
        self, images: Tensor, output: VisionOutput, rows: Tensor | None, without: Collection[int] = ()
    ) -> Tensor:
        """Distance of each patch to the nearest remembered one, summed over the stages; see the base class."""
        return self.compare(images, output, rows, without).nearest

    def compare(
        self, images: Tensor, output: VisionOutput, rows: Tensor | None, without: Collection[int] = ()
    ) -> Comparison:
        """Distances to all patches, to those of references and to those of accepted parts; see the base class."""
        size, tokens = (images.shape[-2], images.shape[-1]), self.tokens_of(images, output)
        parts = list(rows_in(rows, len(self.remembered)))
        if len(parts) == 1:
            return self._compare_row(parts[0][0], tokens, size, without)
        found = [self._compare_row(row, [stage[chosen] for stage in tokens], size, without) for row, chosen in parts]
        maps = tokens[0].new_zeros((3, len(images), *size), dtype=torch.float32)
        for (_, chosen), (nearest, references, accepted) in zip(parts, found, strict=True):
            maps[0, chosen] = nearest
            # Where nothing was accepted, nothing is nearer than the references.
            maps[1, chosen] = nearest if references is None else references
            maps[2, chosen] = nearest if accepted is None else accepted
        return Comparison(*maps) if any(one.accepted is not None for one in found) else Comparison(maps[0])

    def _compare_row(
        self, row: int, tokens: Sequence[Tensor], size: tuple[int, int], without: Collection[int]
    ) -> Comparison:
        banks = [kept_patches(stage, without) for stage in self.parts_of(row)]
        accepted = [kept_patches(stage) for stage in self.accepted_parts_of(row)]
        return self.compare_with(tokens, banks, accepted, size)

    def compare_with(
        self,
        tokens: Sequence[Tensor],
        references: Sequence[Sequence[Tensor]],
        accepted: Sequence[Sequence[Tensor]],
        size: tuple[int, int],
    ) -> Comparison:
        """Distance maps of tokens ``(B, L, C)`` of every stage to patches of references and of accepted parts, if any.

        Patches are unit rows ``(N, C)``, or ``(B, N, C)`` for an image each, part by part.
        """
        floats = [stage.float() for stage in tokens]
        if self.options.lowest_share is not None:
            return Comparison(self._map(unlabelled_distance(floats, references, self.options.lowest_share), size))
        to_references = [nearest_normal_distance(stage, bank) for stage, bank in zip(floats, references, strict=True)]
        if not accepted:
            return Comparison(self._map(to_references, size))
        to_accepted = [nearest_normal_distance(stage, bank) for stage, bank in zip(floats, accepted, strict=True)]
        nearest = [torch.minimum(*both) for both in zip(to_references, to_accepted, strict=True)]
        return Comparison(*(self._map(distances, size) for distances in (nearest, to_references, to_accepted)))

    def _map(self, distances: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Distances ``(B, L)`` of every stage as one map, their sum."""
        maps = [
            distance_map(of_stage, shape.grid, size) for of_stage, shape in zip(distances, self.shapes, strict=True)
        ]
        return torch.stack(maps).sum(dim=0)

    def accepted_parts_of(self, row: int) -> list[list[Part]]:
        """The accepted parts of a class, part by part for every stage; nothing where there are none."""
        features = self.accepted(row)
        banks = self.banks_of(features) if len(features) else []
        return [[Part(tokens, shot) for shot, tokens in enumerate(bank)] for bank in banks]

    def parts_of(self, row: int) -> list[list[Part]]:
        """What is remembered of the references, part by part for every stage; a RuntimeError if nothing is."""
        buffers = self._buffers_of(row)
        if "coreset" not in buffers:
            banks = self.banks_of(self.features(row))
            return [[Part(tokens, shot) for shot, tokens in enumerate(bank)] for bank in banks]
        tokens = torch.split(buffers["coreset"], [shape.width for shape in self.shapes], dim=1)
        return [[Part(of_stage, buffers["coreset_images"][:, stage])] for stage, of_stage in enumerate(tokens)]


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
