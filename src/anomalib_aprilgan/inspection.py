"""The one way from images to raw predictions: pre-processing, tiles, network."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from .clip.backbone import VisionOutput
from .data.pre_processing import prepared
from .network.model import AprilGANModel, RawPredictions
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
    prepared, or whose CLIP output is known, are never tiled.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        msg = f"`batch` must be (B, 3, H, W), got {tuple(images.shape)}."
        raise ValueError(msg)
    if settings.tile_size is None:
        images = images if is_prepared else prepared(pre_processor, images)
        return network.predict(images, rows, without, output, few_shot=few_shot)

    def predict(tiles: Tensor, of_tiles: Tensor | None) -> tuple[Tensor, Tensor]:
        raw = network.predict(prepared(pre_processor, tiles), of_tiles, without, few_shot=few_shot)
        return raw.text_probability, raw.anomaly_map

    found = predict_in_tiles(images, rows, settings.tile_size, settings.tile_overlap, predict)
    return RawPredictions(*found, appearance=mean_colour(images))
