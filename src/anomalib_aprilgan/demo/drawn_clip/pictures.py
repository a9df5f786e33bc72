"""Pictures to train on: many random products drawn once into memory, varied cheaply when they are used."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ..drawing import Twins, draw_twins

_CHUNK = 240
# Category, seed, index and defect kind of twins; good, bad and mask of some of them.
_Drawing = tuple[str, int, int, str]
_Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]


@dataclass(frozen=True)
class Pictures:
    """Twins of good and bad pictures.

    Attributes:
        good: ``(N, H, W, 3)`` 8-bit RGB.
        bad: ``(N, H, W, 3)``, the same with a defect.
        mask: ``(N, H, W)``, true where they differ.
        categories: ``N`` names.
        kinds: ``N`` defect kinds.
    """

    good: NDArray[np.uint8]
    bad: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    categories: tuple[str, ...]
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        """Number of twins."""
        return len(self.categories)


def draw_pictures(
    categories: Sequence[str],
    kinds: Sequence[str],
    products: int,
    per_product: int,
    seed: int,
    image_size: int,
    *,
    workers: int = 1,
    progress: bool = True,
) -> Pictures:
    """Twins of many products, those of a product one after the other.

    Args:
        categories: What to draw in turn; what is named twice gets twice as many products.
        kinds: The defects; all of them occur equally often in each category.
        products: Number of products.
        per_product: Twins of each.
        seed: Number of the first product of every category; those that follow count on from it.
        image_size: Side in pixels.
        workers: Processes that draw; the pictures do not depend on it.
        progress: Whether to show a bar.
    """
    plan: list[_Drawing] = []
    drawn = Counter[str]()
    for product in range(products):
        turn, place = divmod(product, len(categories))
        category = categories[place]
        for index in range(per_product):
            kind = kinds[(turn * per_product + place + index) % len(kinds)]
            plan.append((category, seed + drawn[category], index, kind))
        drawn[category] += 1
    # Made beforehand, so that many pictures are held once and not twice.
    good, bad = (np.empty((len(plan), image_size, image_size, 3), dtype=np.uint8) for _ in range(2))
    mask = np.empty((len(plan), image_size, image_size), dtype=np.bool_)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(plan), _CHUNK)]
    draw = partial(_draw_chunk, image_size=image_size)
    with ExitStack() as stack:
        shown = stack.enter_context(Progress(console=Console(stderr=True), disable=not progress))
        task = shown.add_task("twins drawn", total=len(plan))
        apply: Callable[..., Iterator[_Arrays]] = map
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            apply = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context)).map
        for chunk, arrays in zip(chunks, apply(draw, [plan[chunk] for chunk in chunks]), strict=True):
            good[chunk], bad[chunk], mask[chunk] = arrays
            shown.advance(task, len(arrays[0]))
    return Pictures(good, bad, mask, tuple(entry[0] for entry in plan), tuple(entry[3] for entry in plan))


def _draw_chunk(plan: Sequence[_Drawing], image_size: int) -> _Arrays:
    twins = [_draw(category, seed, index, kind, image_size) for category, seed, index, kind in plan]
    return (
        np.stack([pair.good for pair in twins]),
        np.stack([pair.bad for pair in twins]),
        np.stack([pair.mask for pair in twins]),
    )


def _draw(category: str, seed: int, index: int, kind: str, image_size: int) -> Twins:
    """The twins of this index; of a far one in the rare case that no visible defect came out."""
    while True:
        try:
            return draw_twins(category, seed, index, kind, image_size)
        except RuntimeError:
            index += 1_000_000


def vary(good: Tensor, bad: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The same twins turned or mirrored (the batch as one), lighter or darker, tinted and noisy (each by itself).

    Args:
        good: ``(B, 3, H, H)`` in ``[0, 1]``.
        bad: ``(B, 3, H, H)``; gets the change of its twin.
        mask: ``(B, H, H)``.
        generator: Source of the changes, on the CPU.

    Returns:
        Good, bad, mask of the same shapes.
    """
    turn = int(torch.randint(8, (), generator=generator))
    number, device = len(good), good.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=generator)).to(device)

    gain, offset = uniform(0.85, 1.15, number, 3, 1, 1), uniform(-0.08, 0.08, number, 1, 1, 1)
    gain = 1.0 + (gain - 1.0) * 0.5 + (gain.mean(dim=1, keepdim=True) - 1.0)
    noise = uniform(0.0, 0.015, number, 1, 1, 1) * torch.randn(good.shape, generator=generator).to(device)
    changed = []
    for planes in (good, bad, mask):
        turned = torch.rot90(planes, turn // 2, (-2, -1))
        changed.append(turned.flip(-1) if turn % 2 else turned)
    good, bad = (torch.clamp(planes * gain + offset + noise, 0.0, 1.0) for planes in changed[:2])
    return good, bad, changed[2]


def crop(pictures: Pictures, chosen: NDArray[np.int64], side: int, generator: np.random.Generator) -> Pictures:
    """Windows of some twins, each with part of its defect well inside.

    Args:
        pictures: Where they come from.
        chosen: Which of them.
        side: Side of the windows in pixels; the whole pictures where they are no larger.
        generator: Source of the places.
    """
    categories = tuple(pictures.categories[twin] for twin in chosen)
    kinds = tuple(pictures.kinds[twin] for twin in chosen)
    height, width = pictures.mask.shape[1:]
    if side >= min(height, width):
        return Pictures(pictures.good[chosen], pictures.bad[chosen], pictures.mask[chosen], categories, kinds)
    windows = []
    margin = side // 6
    for twin in chosen:
        rows, columns = np.nonzero(pictures.mask[twin])
        shown = int(generator.integers(len(rows)))
        top, left = (
            int(np.clip(place - generator.integers(margin, side - margin), 0, length - side))
            for place, length in ((rows[shown], height), (columns[shown], width))
        )
        windows.append((twin, slice(top, top + side), slice(left, left + side)))
    return Pictures(
        np.stack([pictures.good[window] for window in windows]),
        np.stack([pictures.bad[window] for window in windows]),
        np.stack([pictures.mask[window] for window in windows]),
        categories,
        kinds,
    )
