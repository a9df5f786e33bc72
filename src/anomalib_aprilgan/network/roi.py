"""Regions of interest: what is looked at of the images of each class."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class ClassRoi(nn.Module):
    """The region of interest of one class.

    ``inside`` is a mask ``(h, w)``, bool, at the size of maps; empty where the whole image counts. ``frame`` ``(2,)``
    is height and width of the images that it was given for.
    """

    def __init__(self, inside: Tensor | None = None, frame: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.register_buffer("inside", torch.zeros(0, 0, dtype=torch.bool) if inside is None else inside)
        self.register_buffer("frame", torch.tensor(frame))
        self.inside: Tensor
        self.frame: Tensor


class RegionsOfInterest(nn.Module):
    """The regions of interest of all classes, a row for each.

    What lies outside is replaced in images, before anything sees them, and is 0 in maps; see ``within``.
    """

    def __init__(self, number: int = 1) -> None:
        super().__init__()
        self.of_class = nn.ModuleList(ClassRoi() for _ in range(number))

    def set_rows(self, kept: Sequence[int | None]) -> None:
        """Have as many classes, each with the region of the row named here, and the whole image for ``None``."""
        known = list(self.of_class)
        self.of_class = nn.ModuleList(ClassRoi() if row is None else known[row] for row in kept)

    def set(self, row: int, inside: Tensor | None, frame: tuple[int, int] = (0, 0)) -> None:
        """Replace the region of a class; ``None`` for the whole image."""
        device = next(self.buffers()).device
        self.of_class[row] = ClassRoi(inside, frame).to(device)

    def make_room(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        """Have buffers of the shape of those of a checkpoint, which are loaded next."""
        inside = tensors.get("inside")
        self.set(row, None if inside is None else torch.empty_like(inside))

    def inside(self, row: int) -> Tensor | None:
        """Mask ``(h, w)`` of a class; ``None`` where the whole image counts."""
        mask = self.of_class[row].get_buffer("inside")
        return mask if mask.numel() else None

    def frame(self, row: int) -> tuple[int, int] | None:
        """Height and width of the images that the region of a class is for; ``None`` where it has none."""
        height, width = self.of_class[row].get_buffer("frame").tolist()
        return (height, width) if height else None

    def without_frames(self) -> RegionsOfInterest:
        """The same regions, for images of any size: in proportion."""
        one = copy.deepcopy(self)
        for of_class in one.of_class:
            of_class.get_buffer("frame").zero_()
        return one

    def masks(self, rows: Tensor | None, size: tuple[int, int]) -> Tensor | None:
        """Masks ``(B, h, w)``, or ``(1, h, w)`` without rows, of maps of this size; ``None`` where all counts.

        ``rows`` ``(B,)`` is the class of each image; not needed for one class.
        """
        chosen = [0] if rows is None or len(self.of_class) == 1 else rows.tolist()
        found = [self.inside(row) for row in chosen]
        known = next((mask for mask in found if mask is not None), None)
        if known is None:
            return None
        whole = torch.ones(size, dtype=torch.bool, device=known.device)
        return torch.stack([whole if mask is None else mask for mask in found])


class StackedRegions(RegionsOfInterest):
    """The regions of several classes at the size of their maps (height, width), of which a graph chooses by row."""

    def __init__(self, regions: RegionsOfInterest, size: tuple[int, int]) -> None:
        number = len(regions.of_class)
        super().__init__(number)
        self.register_buffer("stack", regions.masks(torch.arange(number), size))
        self.stack: Tensor | None

    def masks(self, rows: Tensor | None, size: tuple[int, int]) -> Tensor | None:
        """See the base class."""
        del size
        return self.stack if rows is None or self.stack is None else self.stack.index_select(0, rows)


def within(values: Tensor, masks: Tensor | None) -> Tensor:
    """Maps ``(B, h, w)``, or normalised images ``(B, 3, h, w)``, with 0 where the masks ``(B, h, w)`` are false.

    In an image that is the mean colour of what CLIP was trained on.
    """
    if masks is None:
        return values
    return torch.where(masks if values.ndim == masks.ndim else masks[:, None], values, torch.zeros_like(values))
