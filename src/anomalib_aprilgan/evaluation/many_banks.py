"""Predictions with many memory banks from one vision pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..network.memory_bank import MemoryBank
from ..network.model import AprilGANModel
from ..network.scoring import distance_map, nearest_normal_distance, smooth
from ..running import full_precision


@torch.no_grad()
def predict_banks(
    network: AprilGANModel, references: MemoryBank, images: Tensor, banks: Sequence[Sequence[int]]
) -> tuple[Tensor, Iterator[Tensor]]:
    """Text probability and maps with several memory banks; the maps are those of ``network.predict`` for each of them.

    Every reference is compared with the images once, in however many banks it is. The maps are made one by one, as
    they are asked for.

    Args:
        network: Of one class; taps the stages of ``references``.
        references: Remembers ``K`` images of that class, any number.
        images: ``(B, 3, H, W)``, resized and normalised.
        banks: Which of the references are in every bank; none for zero-shot.

    Returns:
        Text probability ``(B,)``, the same for all banks, and for every bank the map ``(B, H, W)``.
    """
    output = network.encode(images)
    raw = network.predict(images, output=output, few_shot=False)
    zero_shot = torch.stack([maps[:, 1] for maps in raw.stage_probabilities]).sum(dim=0)
    distances: list[Tensor] = []  # by stage ``(K, B, L)``: of the patches to every single reference
    if references.number(0):
        remembered_by_stage = references.banks_of(references.features(0))
        with full_precision(images):
            distances = [
                torch.stack([nearest_normal_distance(tokens.float(), [reference]) for reference in remembered])
                for tokens, remembered in zip(references.tokens_of(images, output), remembered_by_stage, strict=True)
            ]
    size = (images.shape[-2], images.shape[-1])

    def map_of(bank: Sequence[int]) -> Tensor:
        anomaly_map = zero_shot
        with full_precision(images):
            if bank:
                nearest = [of_stage[list(bank)].amin(dim=0) for of_stage in distances]
                by_stage = zip(nearest, references.shapes, strict=True)
                maps = [distance_map(of_stage, shape.grid, size) for of_stage, shape in by_stage]
                anomaly_map = zero_shot + torch.stack(maps).sum(dim=0)
            return smooth(anomaly_map, network.smoothing_sigma)

    return raw.text_probability, (map_of(bank) for bank in banks)
