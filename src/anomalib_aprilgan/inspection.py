"""The one way from images to raw predictions: pre-processing, tiles, network."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from anomalib.data import ImageBatch
from torch import Tensor, nn

from .clip.backbone import VisionOutput
from .data.pre_processing import prepared, unmixed
from .data.roi import image_size_of
from .files import is_file
from .network.model import AprilGANModel, RawPredictions
from .network.roi import RegionsOfInterest
from .network.scoring import mean_colour
from .network.tiling import predict_in_tiles
from .settings import Settings


def predict_images(
    settings: Settings,
    network: AprilGANModel,
    pre_processor: nn.Module | None,
    images: Tensor,
    rows: Tensor | None,
    without: Collection[int] = (),
    output: VisionOutput | None = None,
    *,
    is_prepared: bool = False,
    few_shot: bool = True,
) -> RawPredictions:
    """Raw predictions of images ``(B, 3, H, W)``, float in ``[0, 1]``, whole or in tiles.

    ``rows``, ``without``, ``output`` and ``few_shot`` are those of ``AprilGANModel.predict``. Images that are
    prepared, or whose CLIP output is known, are never tiled. While adapters are trained, neither references nor regions
    of interest count: ``few_shot`` is false. A ValueError where images, not prepared, are of another
    size than those that the region of interest of their class was given for.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        msg = f"`batch` must be (B, 3, H, W), got {tuple(images.shape)}."
        raise ValueError(msg)
    roi = network.roi if few_shot else None
    if roi is not None and not torch.compiler.is_exporting() and (settings.tile_size is not None or not is_prepared):
        for row in {0} if rows is None else set(rows.tolist()):
            check_frame(roi, row, (images.shape[-2], images.shape[-1]), "an image")
    if settings.tile_size is None:
        images = images if is_prepared else prepared(pre_processor, images)
        masks = None if roi is None else roi.masks(rows, (images.shape[-2], images.shape[-1]))
        return network.predict(images, rows, without, output, few_shot=few_shot, masks=masks)

    def predict(tiles: Tensor, of_tiles: Tensor | None, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ready = prepared(pre_processor, tiles)
        masks = None if inside is None else masks_of_tiles(inside, ready)
        raw = network.predict(ready, of_tiles, without, few_shot=few_shot, masks=masks)
        score = raw.text_probability
        # A tile of which nothing is left has no say.
        return score if masks is None else score * masks.flatten(1).any(dim=1), raw.anomaly_map

    tiles = settings.tile_size, settings.tile_overlap
    if roi is None:
        return RawPredictions(*predict_in_tiles(images, rows, *tiles, predict), appearance=mean_colour(images))
    found = predict_in_tiles(images, rows, *tiles, predict, roi.inside)
    of_images = [roi.inside(row) for row in ([0] * len(images) if rows is None else rows.tolist())]
    looked_at = [
        image if mask is None else image[:, mask][:, None] for image, mask in zip(images, of_images, strict=True)
    ]
    colours = [mean_colour(image[None]) for image in looked_at]
    return RawPredictions(*found, appearance=torch.cat([images.new_empty(0, 3), *colours]))


def look_within(roi: RegionsOfInterest, batch: ImageBatch, rows: Tensor, *, check_files: bool) -> None:
    """Take what lies outside the regions of interest out of a batch's ground truth, after a look at its files' sizes.

    An anomalous image whose mask has no pixel left counts as good. A ValueError where a file is of another size than
    the images that the region of its class was given for.
    """
    paths = batch.image_path or []
    for path, row in zip(paths, rows.tolist(), strict=False):
        if check_files and roi.frame(row) is not None and is_file(Path(path)):
            check_frame(roi, row, image_size_of(Path(path)), path)
    truth = batch.gt_mask
    masks = None if truth is None else roi.masks(rows, (truth.shape[-2], truth.shape[-1]))
    if truth is None or masks is None or masks.shape[-2:] != truth.shape[-2:]:
        return
    before, inside = truth.flatten(1).any(dim=1), truth * masks
    batch.gt_mask = inside
    if batch.gt_label is not None:
        batch.gt_label = batch.gt_label * (inside.flatten(1).any(dim=1) | ~before)


def masks_of_tiles(inside: Tensor, tiles: Tensor) -> Tensor:
    """Masks ``(B, h, w)`` of tiles ``(B, 3, h, w)`` as the network takes them, from those before the resize."""
    return torch.stack([unmixed(mask, (tiles.shape[-2], tiles.shape[-1])) for mask in inside])


def check_frame(roi: RegionsOfInterest, row: int, size: tuple[int, int], what: str) -> None:
    """Raise a ValueError if an image of this height and width is not what the region of interest was given for."""
    frame = roi.frame(row)
    if frame is not None and frame != size:
        msg = (
            f"`roi` is for images of {frame[1]} x {frame[0]} pixels, and {what} has {size[1]} x {size[0]}. Give images "
            "of one size, or a class of its own, with its own `roi`, for each."
        )
        raise ValueError(msg)
