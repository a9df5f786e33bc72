"""Large images in overlapping tiles: where they lie, how their maps are blended, one image at a time.

anomalib's ``Tiler`` and torch's ``fold`` hold all tiles of an image at once and average them without weights,
which leaves seams, and the former pads the border with black; hence neither is used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tile_layout import axis_weights, check_positive, tile_positions

# Tiles of a large image that go through CLIP together.
_TILES_AT_ONCE = 4


class TiledMap:
    """Anomaly map of a large image, blended from the maps of the tiles at ``positions``, as they come.

    A tile weighs most at its centre and, linearly, less towards its borders, where it shows least of what surrounds a
    pixel. At every pixel the weights of all tiles sum to one, so that neighbours fade into each other and what they
    agree on stays. Holds one float32 map at image resolution, on the device, and nothing of the tiles.
    """

    def __init__(
        self, height: int, width: int, tile_size: int, tile_overlap: float, device: torch.device | None = None
    ) -> None:
        self.positions = tile_positions(height, width, tile_size, tile_overlap)
        self.tile_shape = (min(tile_size, height), min(tile_size, width))
        self._missing = set(self.positions)
        self._map = torch.zeros(height, width, device=device)
        of_rows = axis_weights(height, self.tile_shape[0], sorted({top for top, _ in self.positions}))
        of_columns = axis_weights(width, self.tile_shape[1], sorted({left for _, left in self.positions}))
        self._rows, self._columns = (
            {start: torch.from_numpy(weights).to(device) for start, weights in of_axis.items()}
            for of_axis in (of_rows, of_columns)
        )

    def add(self, tile_map: Tensor, top: int, left: int) -> None:
        """Blend in the map of a tile, resized to it, bilinear; a ValueError if there is none or it was added before."""
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
        """The blended map ``(height, width)``, in the range of the tiles' values; a RuntimeError if one is missing."""
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
    score: Callable[..., tuple[Tensor, Tensor]],
    inside: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score, a scalar, and map ``(H, W)``, float32 on the image's device, of a large image from its tiles.

    The score is the highest of the tiles' scores: a defect shows in a few tiles, and a mean would fade with the size of
    the image. The more tiles, the higher the highest of good ones: scores, and a threshold for them, are for images of
    one size. In memory are the image, its map, ``batch_size`` tiles and what ``score`` makes of them.

    Args:
        image: ``(3, H, W)``, float in ``[0, 1]`` or ``uint8``; neither copied nor changed.
        tile_size: Side of the tiles in pixels, see ``tile_positions``.
        tile_overlap: Least share of it that a neighbour covers too, in ``[0, 1)``.
        batch_size: Number of tiles that are scored together.
        score: From tiles ``(B, 3, h, w)`` as they are in the image to scores ``(B,)`` and maps of any size; another
            number of either is a ValueError. Where there is a mask, it gets those of the tiles ``(B, h, w)`` too.
        inside: Mask ``(H, W)``, true where the image is looked at. A tile without such a pixel is left out, and the
            map is 0 outside.
    """
    if image.ndim != 3:
        msg = f"`image` must be (3, H, W), got {tuple(image.shape)}. Pass the images of a batch one by one."
        raise ValueError(msg)
    check_positive("batch_size", batch_size)
    blended = TiledMap(image.shape[1], image.shape[2], tile_size, tile_overlap, image.device)
    height, width = blended.tile_shape
    highest = []

    def cut(plane: Tensor, top: int, left: int) -> Tensor:
        return plane[..., top : top + height, left : left + width]

    looked_at = [place for place in blended.positions if inside is None or bool(cut(inside, *place).any())]
    for place in set(blended.positions) - set(looked_at):
        blended.add(torch.zeros(height, width), *place)
    for start in range(0, len(looked_at), batch_size):
        positions = looked_at[start : start + batch_size]
        tiles = torch.stack([cut(image, *place) for place in positions])
        masks = [] if inside is None else [torch.stack([cut(inside, *place) for place in positions])]
        scores, maps = score(tiles, *masks)
        if not len(scores) == len(maps) == len(positions):
            msg = f"`score` must return a score and a map per tile, got {len(scores)} and {len(maps)} for {len(tiles)}."
            raise ValueError(msg)
        highest.append(scores.amax())
        for tile_map, (top, left) in zip(maps, positions, strict=True):
            blended.add(tile_map, top, left)
        del tiles, maps, tile_map  # before the next batch is cut: two would lie in memory
    found = blended.result()
    return torch.stack(highest).amax(), found if inside is None else found * inside


def predict_in_tiles(
    images: Tensor,
    rows: Tensor | None,
    tile_size: int,
    tile_overlap: float,
    predict: Callable[..., tuple[Tensor, Tensor]],
    inside: Callable[[int], Tensor | None] = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """Scores ``(B,)`` and maps ``(B, H, W)`` of large images, one image after the other; see ``run_tiled``.

    ``rows`` ``(B,)`` is the class of each image, ``None`` where there is one; ``predict`` gets those of its tiles, and
    their masks where ``inside`` has one ``(H, W)`` for the row.
    """
    if not len(images):
        return images.new_empty(0), images.new_empty(0, *images.shape[2:])
    found = []
    for number, image in enumerate(images):
        row = None if rows is None else rows[number]

        def score(tiles: Tensor, *masks: Tensor, row: Tensor | None = row) -> tuple[Tensor, Tensor]:
            return predict(tiles, None if row is None else row.expand(len(tiles)), *masks)

        mask = inside(0 if row is None else int(row))
        found.append(run_tiled(image, tile_size, tile_overlap, _TILES_AT_ONCE, score, mask))
    scores, maps = zip(*found, strict=True)
    # No copy of the map of a single large image.
    return torch.stack(scores), maps[0][None] if len(maps) == 1 else torch.stack(maps)
