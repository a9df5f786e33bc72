"""The network: CLIP, adapters and memory bank, from images to scores and maps (arXiv:2305.17382, fig. 1)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from ..class_rows import rows_by_class
from ..clip.backbone import ClipBackbone, VisionOutput
from .adapters import LinearAdapters
from .memory_bank import MemoryBank
from .scoring import (
    distance_map,
    map_statistic,
    nearest_normal_distance,
    neighbourhood_mean,
    smooth,
    text_logits,
    text_probability,
    text_probability_maps,
)


class HeldOut(NamedTuple):
    """What the few-shot maps of references reach, each held out of the memory bank in turn.

    Attributes:
        maxima: ``(K,)``, or empty where nothing can be held out (a single picture).
        statistics: ``(K,)``, or empty: what stands for these maps in the score, see :func:`map_statistic`.
    """

    maxima: Tensor
    statistics: Tensor


class AprilGANModel(nn.Module):
    """Zero-shot and few-shot anomaly scores and maps from one vision pass per image.

    Text features are held per class name in the buffer ``text_features`` ``(N, D, 2)``, so that a
    forward pass never needs the text tower, and every class has a memory bank of its own. The frozen CLIP is
    attached later than the rest: it is large, and not needed to hold, count or optimise what is learned.

    Args:
        adapters: One linear map per stage of ``stages``.
        stages: Tapped blocks of the zero-shot map, ascending, counted from 1.
        memory_stages: Tapped blocks of the memory bank, ascending, counted from 1.
        smoothing_sigma: Standard deviation in pixels of the Gaussian that maps are smoothed with; 0 for none.
        neighbourhood: Odd side in patches of the square whose tokens are averaged before patches are compared with
            the memory bank; 1 for the tokens as they are.
    """

    def __init__(
        self,
        adapters: LinearAdapters,
        stages: Sequence[int],
        memory_stages: Sequence[int],
        smoothing_sigma: float = 0.0,
        neighbourhood: int = 1,
    ) -> None:
        super().__init__()
        self.adapters = adapters
        self.memory_banks = nn.ModuleList()
        self.stages = tuple(stages)
        self.memory_stages = tuple(memory_stages)
        self.smoothing_sigma = smoothing_sigma
        self.neighbourhood = neighbourhood
        self.class_names: tuple[str, ...] = ()
        self.register_buffer("text_features", torch.empty(0))
        self.text_features: Tensor
        self._backbone: ClipBackbone | None = None

    @property
    def backbone(self) -> ClipBackbone:
        """The frozen CLIP.

        Raises:
            RuntimeError: None was attached yet.
        """
        if self._backbone is None:
            msg = "The model has no CLIP yet: call `AprilGAN.setup('predict')` first."
            raise RuntimeError(msg)
        return self._backbone

    @property
    def has_backbone(self) -> bool:
        """Whether a CLIP was attached."""
        return self._backbone is not None

    def attach_backbone(self, backbone: ClipBackbone) -> None:
        """Give the model its frozen CLIP."""
        self._backbone = backbone

    def set_classes(self, class_names: Sequence[str], text_features: Tensor) -> None:
        """Replace the classes.

        A class that was there before keeps its memory bank; so does the only class where it gets another name.

        Args:
            class_names: ``N`` names.
            text_features: ``(N, D, 2)``, unit columns: normal, anomalous.
        """
        renamed = len(self.class_names) == len(class_names) == 1
        kept = dict(zip(class_names if renamed else self.class_names, self.memory_banks, strict=True))
        self.memory_banks = nn.ModuleList([kept.get(name, MemoryBank()) for name in class_names])
        self.class_names = tuple(class_names)
        self.text_features = text_features

    def memory_bank(self, number: int = 0) -> MemoryBank:
        """The memory bank of a class, by its row of ``text_features``."""
        return cast("MemoryBank", self.memory_banks[number])

    @property
    def is_few_shot(self) -> bool:
        """Whether any class has references."""
        return any(self.memory_bank(number).k_shot for number in range(len(self.memory_banks)))

    @contextmanager
    def only(self, number: int) -> Iterator[None]:
        """The model of one of its classes, for as long as the context lasts."""
        everything = self.class_names, self.text_features, self.memory_banks
        self.class_names, self.text_features = self.class_names[number : number + 1], self.text_features[number, None]
        self.memory_banks = self.memory_banks[number : number + 1]
        try:
            yield
        finally:
            self.class_names, self.text_features, self.memory_banks = everything

    def class_index(self, class_names: Sequence[str]) -> Tensor:
        """Rows of ``text_features`` for the class names of a batch.

        Raises:
            ValueError: A name whose text was not encoded.
        """
        unknown = sorted(set(class_names) - set(self.class_names))
        if unknown:
            msg = f"`class_names` must be out of {self.class_names}, got {unknown}."
            raise ValueError(msg)
        index = [self.class_names.index(name) for name in class_names]
        return torch.tensor(index, device=self.text_features.device)

    def forward(self, images: Tensor, class_index: Tensor | None = None) -> InferenceBatch:
        """Anomaly score and map of every image.

        Args:
            images: ``(B, 3, H, W)``, resized and normalised.
            class_index: ``(B,)`` rows of ``text_features``; not needed for a model of one class.

        Returns:
            ``pred_score`` ``(B,)``, the text probability in ``[0, 1]``, and ``anomaly_map``
            ``(B, H, W)`` in ``[0, S]``, or ``[0, S + 2 S']`` with a memory bank of ``S'`` stages.
        """
        return self.infer(images, class_index)[0]

    def infer(self, images: Tensor, class_index: Tensor | None = None) -> tuple[InferenceBatch, list[Tensor]]:
        """What :meth:`forward` returns, and the probability maps it rests on, for the loss.

        Returns:
            Scores and maps, and per stage ``(B, 2, H, W)`` probabilities: normal, anomalous.
        """
        output = self.encode(images)
        size = (images.shape[-2], images.shape[-1])
        text_features = self._text_features_of(class_index)
        with _full_precision(images):
            probabilities = self._probability_maps(output, text_features, size)
            anomaly_map = _zero_shot_map(probabilities)
            if self.is_few_shot:
                anomaly_map = anomaly_map + self._memory_maps(self._memory_tokens(output), size, class_index)
            anomaly_map = smooth(anomaly_map, self.smoothing_sigma)
            pred_score = text_probability(output.image_feature.float(), text_features)
        return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map), probabilities

    @torch.no_grad()
    def infer_banks(
        self, images: Tensor, references: MemoryBank, banks: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Scores and maps for several memory banks from one vision pass; those of :meth:`forward` for each of them.

        Every reference is compared with the images once, in however many banks it is. The maps are made one by one,
        as they are asked for.

        Args:
            images: ``(B, 3, H, W)`` of the only class, resized and normalised.
            references: Patches of ``K`` images, any number (:meth:`memory_tokens`).
            banks: Which of the references are in every bank; none for zero-shot.

        Returns:
            Text probability ``(B,)``, the same for all banks, and for every bank the map ``(B, H, W)``.
        """
        output = self.encode(images)
        size = (images.shape[-2], images.shape[-1])
        text_features = self._text_features_of(None)
        with _full_precision(images):
            zero_shot = _zero_shot_map(self._probability_maps(output, text_features, size))
            score = text_probability(output.image_feature.float(), text_features)
            # By stage ``(K, B, L)``: distances of the patches to every single reference.
            distances = (
                [
                    torch.stack([nearest_normal_distance(tokens.float(), [reference]) for reference in remembered])
                    for tokens, remembered in zip(self._memory_tokens(output), references.stages(), strict=True)
                ]
                if references.k_shot
                else []
            )
        return score, (self._map_of_bank(zero_shot, distances, bank, size) for bank in banks)

    def _map_of_bank(
        self, zero_shot: Tensor, distances: Sequence[Tensor], bank: Sequence[int], size: tuple[int, int]
    ) -> Tensor:
        with _full_precision(zero_shot):
            anomaly_map = zero_shot
            if bank:
                grid = self.backbone.architecture.grid
                maps = [distance_map(of_stage[list(bank)].amin(dim=0), grid, size) for of_stage in distances]
                anomaly_map = zero_shot + torch.stack(maps).sum(dim=0)
            return smooth(anomaly_map, self.smoothing_sigma)

    def stage_probabilities(self, images: Tensor, class_index: Tensor | None = None) -> list[Tensor]:
        """Probability maps of every stage, with gradients for the adapters.

        Args:
            images: ``(B, 3, H, W)``, resized and normalised.
            class_index: As in :meth:`forward`.

        Returns:
            Per stage ``(B, 2, H, W)``: normal, anomalous.
        """
        output = self.encode(images)
        with _full_precision(images):
            size = (images.shape[-2], images.shape[-1])
            return self._probability_maps(output, self._text_features_of(class_index), size)

    @torch.no_grad()
    def encode(self, images: Tensor) -> VisionOutput:
        """One pass of the frozen tower over the union of both stage lists."""
        output: VisionOutput = self.backbone(images, self._tapped)
        return output

    @torch.no_grad()
    def memory_tokens(self, images: Tensor) -> list[Tensor]:
        """What a memory bank is filled with: per stage of ``memory_stages`` the patch tokens of images.

        Args:
            images: ``(B, 3, H, W)``, resized and normalised.

        Returns:
            Per stage ``(B, L, C)``.
        """
        return self._memory_tokens(self.encode(images))

    @torch.no_grad()
    def remember(
        self, images: Tensor, number: int = 0, tiles: Sequence[int] | None = None, top_share: float = 0.0
    ) -> HeldOut:
        """Fill the memory bank of a class with normal images, one vision pass each.

        Args:
            images: ``(K, 3, H, W)``, resized and normalised.
            number: Row of ``text_features``.
            tiles: How many of the images, one after the other, are tiles of the same picture; else every image is a
                picture.
            top_share: As in :func:`map_statistic`; over all tiles of a picture.

        Returns:
            What the few-shot map of every picture reaches, the picture itself held out of the bank.
        """
        size, bank = (images.shape[-2], images.shape[-1]), self.memory_bank(number)
        ends = list(accumulate(tiles or [1] * len(images)))
        pictures = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        text_features = self.text_features[number].float()
        tokens, zero_shot_maps = [], []
        for image in torch.split(images, 1):
            output = self.encode(image)
            tokens.append(self._memory_tokens(output))
            if len(pictures) > 1:
                with _full_precision(image):
                    zero_shot_maps.append(_zero_shot_map(self._probability_maps(output, text_features, size)))
        bank.fill([torch.cat(stage) for stage in zip(*tokens, strict=True)])
        if len(pictures) == 1:
            return HeldOut(images.new_empty(0), images.new_empty(0))
        maxima, statistics = [], []
        for picture in pictures:
            with _full_precision(images):
                maps = [
                    zero_shot_maps[shot] + self._memory_map(tokens[shot], size, bank, without=picture)
                    for shot in picture
                ]
                whole = smooth(torch.cat(maps), self.smoothing_sigma).flatten()[None]
            maxima.append(map_statistic(whole))
            statistics.append(map_statistic(whole, top_share))
        return HeldOut(torch.cat(maxima), torch.cat(statistics))

    @property
    def _tapped(self) -> list[int]:
        return sorted({*self.stages, *self.memory_stages})

    def _memory_tokens(self, output: VisionOutput) -> list[Tensor]:
        tokens = zip(self._tapped, output.patch_tokens, strict=True)
        grid = self.backbone.architecture.grid
        return [
            neighbourhood_mean(stage_tokens, grid, self.neighbourhood)
            for stage, stage_tokens in tokens
            if stage in self.memory_stages
        ]

    def _probability_maps(self, output: VisionOutput, text_features: Tensor, size: tuple[int, int]) -> list[Tensor]:
        tokens = zip(self._tapped, output.patch_tokens, strict=True)
        features = self.adapters([stage_tokens for stage, stage_tokens in tokens if stage in self.stages])
        grid = self.backbone.architecture.grid
        return [text_probability_maps(text_logits(stage, text_features), grid, size) for stage in features]

    def _memory_maps(self, patch_tokens: list[Tensor], size: tuple[int, int], class_index: Tensor | None) -> Tensor:
        """``(B, H, W)``: every image against the references of its class."""
        if class_index is None or len(self.memory_banks) == 1:
            return self._memory_map(patch_tokens, size, self.memory_bank())
        maps = patch_tokens[0].new_zeros((len(class_index), *size), dtype=torch.float32)
        for number, rows in rows_by_class(class_index):
            maps[rows] = self._memory_map([tokens[rows] for tokens in patch_tokens], size, self.memory_bank(number))
        return maps

    def _memory_map(
        self, patch_tokens: list[Tensor], size: tuple[int, int], bank: MemoryBank, *, without: Collection[int] = ()
    ) -> Tensor:
        grid = self.backbone.architecture.grid
        remembered = bank.stages(without=without)
        maps = [
            distance_map(nearest_normal_distance(tokens.float(), bank), grid, size)
            for tokens, bank in zip(patch_tokens, remembered, strict=True)
        ]
        return torch.stack(maps).sum(dim=0)

    def _text_features_of(self, class_index: Tensor | None) -> Tensor:
        """``(B, D, 2)``, or ``(D, 2)`` where every image is of the one class."""
        if not self.class_names:
            msg = "The model has no text features yet: call `AprilGAN.setup('predict')` first."
            raise RuntimeError(msg)
        if class_index is not None:
            return self.text_features[class_index].float()
        if len(self.class_names) > 1:
            msg = f"`class_index` is needed to choose among the classes {self.class_names}, got None."
            raise ValueError(msg)
        return self.text_features[0].float()


def _zero_shot_map(probabilities: Sequence[Tensor]) -> Tensor:
    """Anomalous probability, summed over the stages (the authors do not average)."""
    return torch.stack([maps[:, 1] for maps in probabilities]).sum(dim=0)


def _full_precision(images: Tensor) -> AbstractContextManager[object]:
    """Context in which scores and maps are computed in fp32, whatever the trainer's precision.

    A half-precision logit near 25 has steps of 1/64 to 1/8: scores would tie and maps band.
    """
    device = images.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
