"""What every few-shot scorer offers: it remembers references by class, and maps how far images are from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..clip.architecture import ClipArchitecture
from ..clip.backbone import VisionOutput
from ..running import FullPrecision


class RememberedImages(FullPrecision):
    """Features of the references of one class; empty for none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.empty(0))


class Comparison(NamedTuple):
    """Distance maps ``(B, H, W)``: to all that is remembered, to the references, and to accepted parts.

    The latter two are ``None`` where nothing was accepted of any class in the batch.
    """

    nearest: Tensor
    references: Tensor | None = None
    accepted: Tensor | None = None


class FewShotScorer(nn.Module, ABC):
    """Base of few-shot scorers: one ``RememberedImages`` per row, filled and compared by the subclass.

    Images ``(B, 3, H, W)`` come resized and normalised, with what CLIP made of them as ``output``. ``stages`` are those
    of CLIP that the scorer needs, ascending; none for one with a backbone of its own. Maps are expected up to
    ``map_limit`` and cannot exceed ``map_ceiling``.
    """

    stages: tuple[int, ...] = ()
    map_limit: float
    map_ceiling: float

    def __init__(self) -> None:
        super().__init__()
        self.remembered = nn.ModuleList()

    @abstractmethod
    def fill(self, row: int, images: Tensor, output: VisionOutput) -> None:
        """Forget the references of a class and remember these."""

    def add(self, row: int, images: Tensor, output: VisionOutput) -> None:
        """Remember these images of a class too, after those that are remembered already."""
        before = self.features(row)
        self.fill(row, images, output)
        self.set_features(row, torch.cat([before, self.features(row)]))

    def condense(self, row: int) -> None:
        """Keep as much of a class as the scorer is meant to; called once all of its references were added."""

    @abstractmethod
    def distance_maps(
        self, images: Tensor, output: VisionOutput, rows: Tensor | None, without: Collection[int] = ()
    ) -> Tensor:
        """How far every pixel is from the references of its image's class: ``(B, H, W)`` in ``[0, map_ceiling]``.

        ``rows`` ``(B,)`` is the class of each image, ``None`` where there is one class. ``without`` are the indices of
        remembered images to hold out. A class without references gives a RuntimeError.
        """

    def compare(
        self, images: Tensor, output: VisionOutput, rows: Tensor | None, without: Collection[int] = ()
    ) -> Comparison:
        """Distances to the references, and to good parts that were accepted later; see ``distance_maps``."""
        return Comparison(self.distance_maps(images, output, rows, without))

    def set_rows(self, kept: Sequence[int | None]) -> None:
        """Replace the rows; each takes over the references of the row named here, and none for ``None``."""
        before = list(self.remembered)
        self.remembered = nn.ModuleList(RememberedImages() if row is None else before[row] for row in kept)

    def number(self, row: int) -> int:
        """Number of images that are remembered of a class."""
        features = self.remembered[row].get_buffer("features")
        return len(features) if features.ndim > 1 else 0

    def features(self, row: int) -> Tensor:
        """What is remembered of a class, its first axis counting images; a RuntimeError if nothing is."""
        if not self.number(row):
            msg = "The memory bank is empty: call `AprilGAN.setup` with `references` or a datamodule first."
            raise RuntimeError(msg)
        return self.remembered[row].get_buffer("features")

    def check_features(self, features: Tensor) -> None:
        """Raise a ValueError for features, from a checkpoint, that this scorer cannot have made."""

    @contextmanager
    def unchanged_on_error(self, row: int) -> Iterator[None]:
        """Context after whose errors a class is remembered as it was before."""
        buffers = vars(self.remembered[row])["_buffers"]
        held = dict(buffers)
        try:
            yield
        except BaseException:
            buffers.clear()
            buffers.update(held)
            raise

    def make_room(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        """Have buffers for the tensors of a class, by name, which a checkpoint holds and which are loaded next.

        Tensors that this scorer cannot have made are a ValueError.
        """
        self.check_features(tensors["features"])
        self.set_features(row, torch.empty_like(tensors["features"]))

    def set_features(self, row: int, features: Tensor) -> None:
        """Replace what is remembered of a class."""
        self.remembered[row].features = features


def rows_in(rows: Tensor | None, number: int) -> Iterator[tuple[int, Tensor | slice]]:
    """Every class that occurs in a batch of ``number`` classes, ascending, and where its images are.

    ``rows`` ``(B,)`` holds the class of each image; ``None`` where all are of the only one.
    """
    if rows is None or number == 1:
        yield 0, slice(None)
        return
    for row in sorted(set(rows.tolist())):
        yield row, (rows == row).nonzero().flatten()


# From a CLIP, the stages to remember and the neighbourhood to a scorer.
ScorerBuilder = Callable[[ClipArchitecture, Sequence[int], int], FewShotScorer]
