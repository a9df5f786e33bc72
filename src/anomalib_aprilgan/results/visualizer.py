"""A drawing of every result; anomalib's are squares whatever the image, and tell neither score nor decision."""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from ..checks import check_int, check_text
from ..classes import rows_of
from ..data.listing import augmentations_of
from ..data.pre_processing import AprilGANPreProcessor
from ..data.reading import UnreadableImageError, display_image
from ..files import check_writable, write_atomically
from ..network.roi import RegionsOfInterest
from .callback import ResultWriter
from .drawing import Box, Result, draw
from .file_names import FileNames, marked
from .regions import Regions


class AprilGANVisualizer(ResultWriter, Visualizer):
    """Draws every tested or predicted image beside its heatmap, with score and decision.

    Panels: the image as a viewer shows it; where there is a mask, the image with its outline in green; the heatmap
    over the dimmed image, its colours ranging from 0 to 1 in every drawing, with an outline in cyan at the threshold.
    Without the default post-processor, maps may exceed this range; they are then drawn as its ends, and the text under
    the panel says so. Without thresholds nothing is outlined or decided, and without a map there is no heatmap.

    Where the batch has regions, their boxes are drawn; what lies outside a region of interest is dimmed.

    Files are PNGs, named by ``anomalib_aprilgan.results.file_names.FileNames``.

    Args:
        output_dir: Folder for the drawings; else ``images`` in the trainer's ``default_root_dir``.
        max_side: Longest side of a panel in pixels, at least 64; larger images are drawn smaller.
    """

    def __init__(self, output_dir: str | Path | None = None, max_side: int = 1024) -> None:
        super().__init__()
        check_int("max_side", max_side, 64, hint=" pixels")
        self.output_dir = None if output_dir is None else Path(check_text("output_dir", output_dir, "a folder"))
        self.max_side = max_side
        self._names: FileNames | None = None
        self._is_augmented = False

    def visualize(self, result: Result) -> Image.Image:
        """The drawing of one result."""
        return draw(result, self.max_side)

    def start(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Choose folders for all images of the run; an OSError where they cannot be written."""
        check_writable(self._folder(trainer))
        pre_processor = getattr(pl_module, "pre_processor", None)
        self._is_augmented = augmentations_of(loaders, pre_processor) is not None
        self._names = FileNames(trainer, loaders)

    def write_batch(self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch) -> None:
        """Draw the images of a batch; a drawing that fails is a warning and not the end of the run."""
        names = self._names = self._names or FileNames(trainer, [])
        for place in range(batch.batch_size):
            name = batch.image_path[place] if batch.image_path else ""
            file = names.next(name)
            try:
                drawing = self.draw_of_batch(batch, place, pl_module)
                write_atomically(
                    self._folder(trainer) / file,
                    partial(drawing.save, format="PNG", compress_level=1, pnginfo=marked()),
                )
            except Exception as error:  # whatever it is: the decisions count
                warnings.warn(f"There is no drawing of {name or file.stem!r}: {error}", stacklevel=2)

    def draw_of_batch(self, batch: ImageBatch, place: int, pl_module: LightningModule) -> Image.Image:
        """The drawing of one image of a batch of results."""
        name = batch.image_path[place] if batch.image_path else ""
        row = int(rows_of(pl_module, batch)[place])
        return self.visualize(self._result_of(name, batch, place, row, pl_module))

    def finish(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Log where the drawings are."""
        del pl_module, loaders
        rank_zero_info(f"Drawings of the results: {self._folder(trainer)}")

    def _folder(self, trainer: Trainer) -> Path:
        # Not kept: the next run of the same model has another folder.
        return self.output_dir or Path(trainer.default_root_dir) / "images"

    def _result_of(self, name: str, batch: ImageBatch, place: int, row: int, pl_module: LightningModule) -> Result:
        thresholds: list[float | None] = [None, None]
        roi: RegionsOfInterest | None = getattr(getattr(pl_module, "model", None), "roi", None)
        post_processor = getattr(pl_module, "post_processor", None)
        if isinstance(post_processor, PostProcessor) and post_processor.enable_thresholding:
            both = post_processor.normalized_image_threshold, post_processor.normalized_pixel_threshold
            thresholds = [(values[row] if values.ndim else values).item() for values in both]
        score, label, truth = (_at(values, place) for values in (batch.pred_score, batch.pred_label, batch.gt_label))
        is_decided = label is not None and score is not None and bool(score.isfinite())
        return Result(
            image=self._image_of(name, cast("Tensor", batch.image)[place], getattr(pl_module, "pre_processor", None)),
            anomaly_map=_at(batch.anomaly_map, place),
            truth=_at(batch.gt_mask, place),
            score=None if score is None else score.item(),
            is_anomalous=bool(label) if is_decided else None,
            is_labelled_anomalous=None if truth is None else bool(truth),
            image_threshold=thresholds[0],
            pixel_threshold=thresholds[1],
            name=name,
            inside=None if roi is None else roi.inside(row),
            boxes=_boxes(batch, place),
        )

    def _image_of(self, name: str, image: Tensor, pre_processor: object) -> Tensor:
        """The image as it was before pre-processing: from its file, or else from the batch.

        Where the data change it (a crop), its file would not fit the map.
        """
        image = image.as_subclass(Tensor)
        own = pre_processor if isinstance(pre_processor, AprilGANPreProcessor) else None
        if own is not None and own.tiled:
            return image  # as it was read, and maybe too large to be read twice
        with suppress(UnreadableImageError):  # a name alone, or a file that is gone
            if not self._is_augmented:
                return display_image(name, self.max_side)
        return image if own is None else image * own.std.to(image.device) + own.mean.to(image.device)


def _boxes(batch: ImageBatch, place: int) -> list[Box]:
    """The boxes of an image's regions, as shares of its width and height."""
    known: list[Regions] | None = getattr(batch, "regions", None)
    if known is None:
        return []
    height, width = known[place].size
    return [
        (one.left / width, one.top / height, (one.left + one.width) / width, (one.top + one.height) / height)
        for one in known[place]
    ]


def _at(values: Tensor | None, place: int) -> Tensor | None:
    return None if values is None else values[place].as_subclass(Tensor)
