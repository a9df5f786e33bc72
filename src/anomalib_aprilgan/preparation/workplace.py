"""What was made so far, and what it is made with."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from torch import Tensor, nn

from ..classes import Classes
from ..clip.backbone import VisionOutput
from ..data.listing import DataAtHand
from ..data.references import augmented
from ..decision.fusion import ScoreFusion
from ..decision.post_processing import AprilGANPostProcessor
from ..network.model import AprilGANModel, RawPredictions
from ..provenance import Provenance
from ..recipe import Recipe, RowRecipes
from ..running import datamodule_of, precision_of
from ..settings import Settings
from ..tile_layout import tile_positions


@dataclass
class Made:
    """What was made so far, and from what: by row for each class, and for all of them together.

    ``adapters`` is ``None`` for fresh ones and for those of a checkpoint. ``has_trained`` says that fresh ones were
    trained here, or came with a checkpoint. ``clip`` is the digest of the CLIP that a checkpoint was made with,
    ``memory_tower`` that of the memory bank's own tower.
    ``is_changing`` says that a thread is making things now.
    """

    classes: Classes = field(default_factory=Classes)
    rows: list[RowRecipes] = field(default_factory=list)
    adapters: Recipe | None = None
    provenance: Provenance = field(default_factory=Provenance)
    has_trained: bool = False
    clip: str | None = None
    memory_tower: str | None = None
    is_changing: bool = False

    @property
    def references(self) -> dict[str, list[str]]:
        """By class, the paths of the references that are remembered, for the log."""
        named = zip(self.classes.names, self.rows, strict=True)
        return {name: recipes.references for name, recipes in named if recipes.references}


@dataclass(frozen=True)
class Workplace:
    """What the functions here work on.

    ``post_processor`` is ``None`` for one that is not ours; ``own_fusion`` then fuses the scores. ``precision`` names
    that in which images are encoded. ``data`` is what a run knows of its images; normal ones go through the same
    augmentations. ``frame`` is height and width of images that are inspected without a run. ``predict`` is
    ``AprilGAN.predict``.
    """

    settings: Settings
    made: Made
    network: AprilGANModel
    own_fusion: ScoreFusion
    post_processor: AprilGANPostProcessor | None
    datamodule: AnomalibDataModule | None
    pre_processor: nn.Module | None
    data: DataAtHand
    precision: str
    predict: Callable[[Tensor, Tensor | None, Collection[int], VisionOutput | None], RawPredictions]
    device: torch.device
    frame: tuple[int, int] | None = None

    @classmethod
    def of(cls, model: Any, data: DataAtHand | None, frame: tuple[int, int] | None = None) -> Workplace:  # noqa: ANN401  # an AprilGAN, a layer above
        """What an ``AprilGAN`` is made ready with now."""
        post_processor = model.post_processor
        return cls(
            settings=model.settings,
            made=model.made,
            network=model.model,
            own_fusion=model.own_fusion,
            post_processor=post_processor if isinstance(post_processor, AprilGANPostProcessor) else None,
            datamodule=datamodule_of(model),
            pre_processor=model.pre_processor,
            data=data or DataAtHand(),
            precision=precision_of(model)[0],
            predict=model.predict,
            device=model.device,
            frame=frame,
        )

    @property
    def fusion(self) -> ScoreFusion:
        """The fusion of the scores."""
        return self.own_fusion if self.post_processor is None else self.post_processor.fusion

    def augmented(self, image: Tensor) -> Tensor:
        """A normal image ``(1, 3, H, W)`` after what the images under inspection go through."""
        return augmented(image, self.data.augmentations, self.settings.seed)

    def row(self, row: int) -> Tensor:
        """A row as a batch of one image carries it."""
        return torch.tensor([row], device=self.device)


def tiles_of(place: Workplace, image: Tensor) -> Tensor:
    """``(T, 3, H, W)``: the reference ``(1, 3, H, W)``, or its tiles side by side."""
    side, image = place.settings.tile_size, image.to(place.device)
    if side is None:
        return image
    height, width = min(side, image.shape[-2]), min(side, image.shape[-1])
    corners = tile_positions(image.shape[-2], image.shape[-1], side, 0.0)
    return torch.cat([image[..., top : top + height, left : left + width] for top, left in corners])
