"""Results of images without a trainer, as a run of the Engine has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor

from .classes import classes_of_files
from .data.pre_processing import prepared
from .decision.post_processing import AprilGANPostProcessor
from .lightning_model import AprilGAN


def inspect_images(
    model: AprilGAN, images: Sequence[torch.Tensor], paths: Sequence[str], class_name: str | None, root: Path
) -> ImageBatch:
    """Post-processed results of images ``(3, H, W)``, of any sizes, as a run of the Engine has them.

    Args:
        model: A model that is ready; one that inspects in tiles takes one image.
        images: Float in ``[0, 1]``.
        paths: Their files.
        class_name: Class of all of them; else the only one, or the one that a folder below ``root`` is named after.
        root: See there.
    """
    tiled, device = model.settings.tile_size is not None, model.device
    given = [image[None].to(device) for image in images]
    ready = torch.cat(given if tiled else [prepared(model.pre_processor, image) for image in given])
    batch: Any = ImageBatch(image=ready, image_path=list(paths))
    names = [class_name] * len(images) if class_name is not None else classes_of_files(model.classes, paths, None, root)
    vars(batch)["image_sizes"] = [(image.shape[-2], image.shape[-1]) for image in images]  # the files may be gone
    if len(model.classes) > 1:
        vars(batch)["class_name"] = names
    model.predict_step(batch)
    post_processor = model.post_processor
    if isinstance(post_processor, AprilGANPostProcessor):
        post_processor.post_process_batch(batch, model.rows_of(batch))
    elif isinstance(post_processor, PostProcessor):
        post_processor.post_process_batch(batch)
    found: ImageBatch = batch
    return found
