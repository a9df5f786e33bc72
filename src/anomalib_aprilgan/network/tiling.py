"""Large images in overlapping tiles: where they lie, how their maps are blended, one image at a time.

anomalib's ``Tiler`` and torch's ``fold`` hold all tiles of an image at once and average them without weights,
which leaves seams, and the former pads the border with black; hence neither is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


class TiledMap:
    """Anomaly map of a large image, blended from the maps of its tiles as they come.

    A tile weighs most at its centre and, linearly, less towards its borders, where it shows least of what
    surrounds a pixel. At every pixel the weights of all tiles sum to one, so that neighbours fade into each
    other and what they agree on stays. Holds one float32 map at image resolution and nothing of the tiles.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        tile_size: Side of the tiles in pixels; they are cut to the image where it is smaller.
        tile_overlap: Share of a tile's side that its neighbour covers too, at least; in ``[0, 1)``.
        device: Where the map is kept.

    Attributes:
        positions: Top and left of every tile, see :func:`tile_positions`.
        tile_shape: Height and width of every tile in pixels.

    Raises:
        TypeError: A size is not an int.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        height: int,
        width: int,
        tile_size: int,
        tile_overlap: float,
        device: torch.device | None = None,
    ) -> None:
        self.positions = tile_positions(height, width, tile_size, tile_overlap)
        self.tile_shape = (min(tile_size, height), min(tile_size, width))
        self._missing = set(self.positions)
        self._map = torch.zeros(height, width, device=device)
        tops, lefts = zip(*self.positions, strict=True)
        self._rows = _axis_weights(height, self.tile_shape[0], sorted(set(tops)), device)
        self._columns = _axis_weights(width, self.tile_shape[1], sorted(set(lefts)), device)

    def add(self, tile_map: Tensor, top: int, left: int) -> None:
        """Blend in the map of one tile.

        Args:
            tile_map: ``(h, w)``, any size; resized to the tile, bilinear.
            top: First row of the tile in the image.
            left: First column of the tile in the image.

        Raises:
            ValueError: No such tile, or it was added before.
        """
        if (top, left) not in self._missing:
            known = "was added before" if (top, left) in self.positions else "is none of `positions`"
            msg = f"`top`, `left` must be a tile still to be added, and {(top, left)} {known}."
            raise ValueError(msg)
        height, width = self.tile_shape
        plane = tile_map.to(self._map.device, torch.float32)
        if plane.shape != self.tile_shape:
            # Half-pixel centres: what the resize of the tile to the model's size took.
            plane = F.interpolate(plane[None, None], self.tile_shape, mode="bilinear", align_corners=False)[0, 0]
        weights = self._rows[top][:, None] * self._columns[left]
        self._map[top : top + height, left : left + width].addcmul_(plane, weights)
        self._missing.remove((top, left))

    def result(self) -> Tensor:
        """The blended map ``(height, width)``, between the lowest and the highest value of the tiles.

        Raises:
            RuntimeError: A tile is missing.
        """
        if self._missing:
            msg = f"{len(self._missing)} of {len(self.positions)} tiles are missing: call `add` for all `positions`."
            raise RuntimeError(msg)
        return self._map


@torch.no_grad()  # a graph would hold every tile
def run_tiled(
    image: Tensor,
    tile_size: int,
    tile_overlap: float,
    batch_size: int,
    score: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Score and map of a large image, from its tiles.

    The score is the highest of the tiles' scores: a defect shows in a few tiles, and a mean would fade with the
    size of the image; an image of one tile keeps its score. The more tiles, the higher the highest of good ones:
    scores, and a threshold for them, are for images of one size. The map's maximum is that of the blended map.

    Beside the image and its map there are ``batch_size`` tiles and what ``score`` makes of them.

    Args:
        image: ``(3, H, W)``, float in ``[0, 1]`` or ``uint8``; neither copied nor changed.
        tile_size: Side of the tiles in pixels of the image.
        tile_overlap: Share of a tile's side that its neighbour covers too, in ``[0, 1)``.
        batch_size: Number of tiles that are scored together.
        score: Takes tiles ``(B, 3, h, w)`` as they are in the image, ``h = w = tile_size`` where the image is not
            smaller; returns their scores ``(B,)`` and maps ``(B, h', w')`` of any size.

    Returns:
        Score, a scalar, and map ``(H, W)``, float32 on the image's device.

    Raises:
        TypeError: A size is not an int.
        ValueError: An argument is out of its range, or ``score`` returned another number of scores or maps.
    """
    if image.ndim != 3:
        msg = f"`image` must be (3, H, W), got {tuple(image.shape)}. Pass the images of a batch one by one."
        raise ValueError(msg)
    _check_positive("batch_size", batch_size)
    blended = TiledMap(image.shape[1], image.shape[2], tile_size, tile_overlap, image.device)
    height, width = blended.tile_shape
    highest = []
    for start in range(0, len(blended.positions), batch_size):
        positions = blended.positions[start : start + batch_size]
        tiles = torch.stack([image[:, top : top + height, left : left + width] for top, left in positions])
        scores, maps = score(tiles)
        if not len(scores) == len(maps) == len(positions):
            msg = f"`score` must return a score and a map per tile, got {len(scores)} and {len(maps)} for {len(tiles)}."
            raise ValueError(msg)
        highest.append(scores.amax())
        for tile_map, (top, left) in zip(maps, positions, strict=True):
            blended.add(tile_map, top, left)
        del tiles, maps, tile_map  # before the next batch is cut: two would lie in memory
    return torch.stack(highest).amax(), blended.result()


def tile_positions(height: int, width: int, tile_size: int, tile_overlap: float) -> list[tuple[int, int]]:
    """Where the tiles of an image lie: as few as give the overlap, evenly spread, flush with every border.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        tile_size: Side of the tiles in pixels; where the image is smaller, one tile is cut to it.
        tile_overlap: Share of a tile's side that its neighbour covers too, at least; in ``[0, 1)``.

    Returns:
        Top and left of every tile, row by row.

    Raises:
        TypeError: A size is not an int.
        ValueError: An argument is out of its range.
    """
    check_tiles(tile_size, tile_overlap)
    for name, length in (("height", height), ("width", width)):
        _check_positive(name, length)
    return list(product(_starts(height, tile_size, tile_overlap), _starts(width, tile_size, tile_overlap)))


def blend_window(length: int) -> Tensor:
    """Weights along one side of a tile before they are made to sum to one: a triangle, nowhere zero.

    Args:
        length: Side of the tile in pixels.

    Returns:
        ``(length,)`` in ``(0, 1]``, float64, symmetric.
    """
    centres = torch.arange(length, dtype=torch.float64) + 0.5
    return torch.minimum(centres, length - centres) * 2.0 / length


def check_tiles(tile_size: int, tile_overlap: float) -> None:
    """Refuse tiles that cannot be.

    Raises:
        TypeError: ``tile_size`` is not an int.
        ValueError: An argument is out of its range.
    """
    _check_positive("tile_size", tile_size)
    if not 0.0 <= tile_overlap < 1.0:
        msg = f"`tile_overlap` must be a share of the tile in [0, 1), such as 0.25, got {tile_overlap}."
        raise ValueError(msg)


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"`{name}` must be an int, got {value!r}."
        raise TypeError(msg)
    if value < 1:
        msg = f"`{name}` must be at least 1, got {value}."
        raise ValueError(msg)


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    room = length - tile
    if room <= 0:
        return [0]
    step = max(1, int(tile * (1.0 - overlap) + 1e-6))
    steps = ceil(room / step)
    return [index * room // steps for index in range(steps + 1)]


def _axis_weights(length: int, tile: int, starts: Sequence[int], device: torch.device | None) -> dict[int, Tensor]:
    """Per start the ``(tile,)`` weights along one axis; where tiles lie over each other they sum to one.

    The tiles are a grid: sums over rows and columns factorise, and no map of weights is needed.
    """
    window, total = blend_window(tile), torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += window
    return {start: (window / total[start : start + tile]).to(device, torch.float32) for start in starts}
