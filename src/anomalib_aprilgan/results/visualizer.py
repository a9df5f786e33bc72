"""A picture of every result: what was inspected, where the map is hot, and what was decided.

anomalib's own visualizer stretches every map between its lowest and its highest pixel, so that good parts glow like bad
ones, squashes pictures into squares and draws 16-bit ones white. Here all maps share one colour range, in which
the threshold has its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from os.path import commonpath
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageDraw, ImageFont
from skimage.segmentation import find_boundaries
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_dtype

from ..clip.weights import write_atomically
from ..data.display import display_image
from ..data.listing import listed_files
from ..data.reading import UnreadableImageError
from ..data.pre_processing import AprilGANPreProcessor

# Maps are drawn in these colours over this range, whatever they hold: pictures can be compared with each other.
COLOUR_MAP = "inferno"
COLOUR_RANGE = (0.0, 1.0)
CONTOUR_COLOUR = (0, 255, 255)  # in no colour map of heat
TRUTH_COLOUR = (0, 255, 0)

_SMALLEST_SIDE = 320  # a smaller picture is enlarged until its longest side has as many pixels
_OPACITY = 0.8  # of the colours in the upper half of the range; below they fade, to nothing at its lower end
_DIMMED = 0.45  # brightness that the picture keeps under a cold map
_MARGIN, _BAR_WIDTH, _BAR_LABELS = 12, 16, 40
_TITLE, _TEXT = 22, 14  # heights of letters in pixels
_BACKGROUND, _INK, _FAINT = (24, 24, 24), (240, 240, 240), (160, 160, 160)
_DECISIONS = {True: ("ANOMALOUS", (200, 40, 40)), False: ("GOOD", (30, 130, 60)), None: ("NOT DECIDED", (90, 90, 90))}


@dataclass(frozen=True)
class Result:
    """What is drawn of one image.

    Args:
        picture: ``(3, H, W)`` in ``[0, 1]``.
        anomaly_map: ``(h, w)``; of any size, in proportion to the picture or not.
        truth: ``(h, w)`` ground-truth mask.
        score: Score of the image.
        is_anomalous: The decision, where there is one.
        is_labelled_anomalous: The label, where there is one.
        image_threshold: Score from which on an image is anomalous.
        pixel_threshold: Value from which on a pixel is; it is outlined. ``None`` for no outline.
        name: Name of the image.
    """

    picture: Tensor
    anomaly_map: Tensor | None = None
    truth: Tensor | None = None
    score: float | None = None
    is_anomalous: bool | None = None
    is_labelled_anomalous: bool | None = None
    image_threshold: float | None = None
    pixel_threshold: float | None = None
    name: str = ""


class AprilGANVisualizer(Visualizer):
    """Draws every tested or predicted image beside its heatmap, with score and decision.

    Panels: the picture as a viewer shows it; where there is a mask, the picture with its outline in green; the heatmap
    over the dimmed picture, its colours ranging from 0 to 1 in every picture, so that good parts stay dark, with an
    outline in cyan at the threshold. Without the default post-processor, maps may lie outside this range; what
    exceeds it is drawn as its end, and the text under the panel says so. Without thresholds nothing is outlined
    or decided, and without a map there is no heatmap.

    Files are PNGs in ``images`` of the run's results folder, in the folders that anomalib's visualizer would choose;
    where that would throw two folders together, in the folders of the data. Images without a path are numbered.

    Args:
        output_dir: Folder for the pictures; else ``images`` in the trainer's ``default_root_dir``.
        max_side: Longest side of a panel in pixels; larger pictures are drawn smaller.

    Raises:
        ValueError: ``max_side`` is too small to see anything.
    """

    def __init__(self, output_dir: str | Path | None = None, max_side: int = 1024) -> None:
        super().__init__()
        if max_side < 64:
            msg = f"`max_side` must be at least 64 pixels, got {max_side}."
            raise ValueError(msg)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.max_side = max_side
        self._folders: dict[Path, Path] = {}
        self._drawn = 0

    def visualize(self, result: Result) -> Image.Image:
        """The drawing of one result."""
        return draw(result, self.max_side)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose folders for all images of the test."""
        del pl_module
        self._start(trainer, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose folders for all images to be predicted."""
        del pl_module
        self._start(trainer, trainer.predict_dataloaders)

    def on_test_batch_end(  # type: ignore[override]  # the steps return batches
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        *args: Any,  # noqa: ANN401  # Lightning's batch and numbers
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Draw the images of a batch, which was post-processed before."""
        del args, kwargs
        self._draw_batch(trainer, pl_module, outputs)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        *args: Any,  # noqa: ANN401  # Lightning's batch and numbers
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Draw the images of a batch, which was post-processed before."""
        del args, kwargs
        self._draw_batch(trainer, pl_module, outputs)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the pictures lie."""
        del pl_module
        rank_zero_info(f"Pictures of the results: {self._output_dir(trainer)}")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the pictures lie."""
        self.on_test_end(trainer, pl_module)

    def _output_dir(self, trainer: Trainer) -> Path:
        # Not kept: the next run of the same model has another folder.
        return self.output_dir or Path(trainer.default_root_dir) / "images"

    def _start(self, trainer: Trainer, loaders: object) -> None:
        self._drawn = 0
        datamodule = getattr(trainer, "datamodule", None) if trainer.testing else None
        self._folders = output_folders(
            listed_files(loaders), getattr(datamodule, "name", None), getattr(datamodule, "category", None)
        )

    def _draw_batch(self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch) -> None:
        for row in range(batch.batch_size):
            result = _result_of(batch, row, pl_module, self.max_side)
            # The place in the data, as a DistributedSampler deals it.
            number = self._drawn * trainer.world_size + trainer.global_rank
            self._drawn += 1
            path = self._output_dir(trainer) / self._file_of(result.name, number)
            drawing = self.visualize(result)
            write_atomically(path, partial(drawing.save, format="PNG", compress_level=1))

    def _file_of(self, name: str, number: int) -> Path:
        if not name:
            return Path(f"{number:06d}.png")
        source = Path(name)
        folder = self._folders.get(source.parent, Path(source.parent.name))
        # Two pictures may differ in their suffix alone.
        return folder / (source.name if source.suffix.lower() == ".png" else f"{source.name}.png")


def output_folders(files: list[str], dataset_name: str | None, category: str | None) -> dict[Path, Path]:
    """For every folder of images the one of their drawings, relative to that of all drawings.

    anomalib's choice, which is the folders below the data set's and category's where these are in the path, and else
    the last folder alone. Where that would be the same for two folders, their paths below the folder of all data.

    Args:
        files: All images.
        dataset_name: Name of the data set.
        category: Name of its category.
    """
    folders = {Path(file).parent for file in files}
    chosen = {
        folder: generate_output_filename(folder / "_", Path(), dataset_name, category, mkdir=False).parent
        for folder in folders
    }
    if len(set(chosen.values())) == len(folders):
        return chosen
    whole = Path(commonpath([folder.absolute() for folder in folders]))
    return {folder: folder.absolute().relative_to(whole) for folder in folders}


# -- one picture ------------------------------------------------------------------------------------------------------


def draw(result: Result, max_side: int = 1024) -> Image.Image:
    """Panels side by side, or one below the other for wide pictures, under a line with the decision.

    Args:
        result: What to draw.
        max_side: Longest side of a panel in pixels.
    """
    height, width = _panel_size(tuple(result.picture.shape[-2:]), max_side)
    picture = _resized(result.picture, (height, width))
    panels = [("picture", picture)]
    if result.truth is not None:
        panels.append(("ground truth", _outlined(picture, _mask(result.truth, (height, width)), TRUTH_COLOUR)))
    if result.anomaly_map is not None:
        panels.append((_caption(result), _heatmap(picture, result.anomaly_map, result.pixel_threshold)))
    return _arranged(panels, _headline(result), _from_here(result.name), has_bar=result.anomaly_map is not None)


def _panel_size(size: tuple[int, ...], max_side: int) -> tuple[int, int]:
    longest = max(size)
    scale = min(max(longest, _SMALLEST_SIDE), max_side) / longest
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized(picture: Tensor, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """``(*size, 3)`` in 8 bits; pixels that are enlarged stay what they are."""
    if picture.shape[-2:] != size:
        smaller = picture.shape[-2:] > size
        mode = {"mode": "bilinear", "antialias": True} if smaller else {"mode": "nearest-exact"}
        picture = F.interpolate(picture[None].float(), size, **mode)[0]
    eight_bit: Tensor = to_dtype(picture.clamp(0.0, 1.0).cpu(), torch.uint8, scale=True)
    return eight_bit.permute(1, 2, 0).numpy()


def _map(anomaly_map: Tensor, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A map at the size of the panel; made smaller by its maxima, so that no small spot is lost."""
    values = anomaly_map.detach().float().cpu().reshape(1, 1, *anomaly_map.shape[-2:])
    smaller = [min(of_map, of_panel) for of_map, of_panel in zip(values.shape[-2:], size, strict=True)]
    values = F.interpolate(F.adaptive_max_pool2d(values, smaller), size, mode="bilinear", align_corners=False)
    return values[0, 0].numpy()


def _mask(mask: Tensor, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A mask at the size of the panel; made smaller, it keeps its smallest spots."""
    return _map((mask > 0).float(), size) >= 0.5


def _outlined(
    panel: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], colour: tuple[int, int, int]
) -> np.ndarray[Any, Any]:
    outlined = panel.copy()
    if mask.any():
        outlined[find_boundaries(mask, mode="thick")] = colour  # type: ignore[no-untyped-call]
    return outlined


def _heatmap(picture: np.ndarray[Any, Any], anomaly_map: Tensor, pixel_threshold: float | None) -> np.ndarray[Any, Any]:
    """Colours of the map over the dimmed picture, as a function of the map's values alone."""
    values = _map(anomaly_map, picture.shape[:2])
    low, high = COLOUR_RANGE
    scaled = ((values - low) / (high - low)).clip(0.0, 1.0)
    colours = mpl.colormaps[COLOUR_MAP](scaled, bytes=True)[..., :3].astype(np.float32)
    opacity = (_OPACITY * (2.0 * scaled).clip(0.0, 1.0) ** 2)[..., None]
    gray = _DIMMED * picture.astype(np.float32).mean(axis=-1, keepdims=True)
    panel = ((1.0 - opacity) * gray + opacity * colours).round().astype(np.uint8)
    return panel if pixel_threshold is None else _outlined(panel, values > pixel_threshold, CONTOUR_COLOUR)


def _headline(result: Result) -> tuple[str, tuple[int, int, int], str]:
    decision, colour = _DECISIONS[result.is_anomalous]
    text = "no score" if result.score is None else f"score {result.score:.3f}"
    if result.is_anomalous is not None and result.image_threshold is not None:
        text += f", threshold {result.image_threshold:.2f}"
    if result.is_labelled_anomalous is not None:
        text += f", labelled {'anomalous' if result.is_labelled_anomalous else 'good'}"
    return decision, colour, text


def _caption(result: Result) -> str:
    lowest, highest = (edge.item() for edge in torch.aminmax(cast("Tensor", result.anomaly_map)))
    low, high = COLOUR_RANGE
    if lowest < low or highest > high:
        return f"map, not scaled: {lowest:.2g} to {highest:.2g}"
    return "heatmap" if result.pixel_threshold is None else f"heatmap, outlined above {result.pixel_threshold:.2f}"


def _arranged(
    panels: list[tuple[str, np.ndarray[Any, Any]]],
    headline: tuple[str, tuple[int, int, int], str],
    name: str,
    *,
    has_bar: bool,
) -> Image.Image:
    height, width = panels[0][1].shape[:2]
    decision, colour, text = headline
    title, small = _font(_TITLE), _font(_TEXT)
    caption_height = _TEXT + 10
    top = _TITLE + _TEXT + 4 * _MARGIN
    stacked = width > 1.4 * height
    step_x, step_y = (0, height + caption_height + _MARGIN) if stacked else (width + _MARGIN, 0)
    right = _MARGIN + step_x * (len(panels) - 1) + width
    bottom = top + step_y * (len(panels) - 1) + height + caption_height
    chip = math.ceil(title.getlength(decision)) + 2 * _MARGIN
    needed = 3 * _MARGIN + chip + math.ceil(_font(_TITLE - 4).getlength(text))
    canvas_width = max(right + (_BAR_WIDTH + _BAR_LABELS if has_bar else 0) + _MARGIN, needed)
    canvas = Image.new("RGB", (canvas_width, bottom + _MARGIN), _BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    pen.rounded_rectangle((_MARGIN, _MARGIN, _MARGIN + chip, 2 * _MARGIN + _TITLE), radius=6, fill=colour)
    middle = _MARGIN + (_TITLE + _MARGIN) // 2
    pen.text((_MARGIN + chip // 2, middle), decision, _INK, font=title, anchor="mm")
    pen.text((2 * _MARGIN + chip, middle), text, _INK, font=_font(_TITLE - 4), anchor="lm")
    shown = _shortened(name, small, canvas_width - 2 * _MARGIN)
    pen.text((_MARGIN, top - _MARGIN), shown, _FAINT, font=small, anchor="ls")
    for number, (caption, panel) in enumerate(panels):
        x, y = _MARGIN + number * step_x, top + number * step_y
        canvas.paste(Image.fromarray(panel), (x, y))
        pen.text((x, y + height + 6), caption, _FAINT, font=small, anchor="lt")
    if has_bar:
        _draw_bar(canvas, right + _MARGIN, bottom - caption_height - height, height)
    return canvas


def _draw_bar(canvas: Image.Image, x: int, y: int, height: int) -> None:
    """The colours and what they stand for."""
    values = np.linspace(1.0, 0.0, height, dtype=np.float32)[:, None].repeat(_BAR_WIDTH, axis=1)
    canvas.paste(Image.fromarray(mpl.colormaps[COLOUR_MAP](values, bytes=True)[..., :3]), (x, y))
    pen = ImageDraw.Draw(canvas)
    low, high = COLOUR_RANGE
    for place, anchor in ((high, "lt"), ((low + high) / 2, "lm"), (low, "lb")):
        at = y + (high - place) / (high - low) * height
        pen.text((x + _BAR_WIDTH + 4, at), f"{place:g}", _FAINT, font=_font(_TEXT), anchor=anchor)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The one of matplotlib, which has Greek and Cyrillic letters too."""
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _from_here(name: str) -> str:
    """A path in the working directory as seen from there; any other name as it is."""
    path = Path(name)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else name


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The end of a path, which tells more than its beginning."""
    if font.getlength(text) <= width:
        return text
    keep = next((n for n in range(len(text) - 1, 0, -1) if font.getlength(f"…{text[-n:]}") <= width), 0)
    return f"…{text[-keep:]}" if keep else ""


# -- from a batch -------------------------------------------------------------------------------------------------


def _result_of(batch: ImageBatch, row: int, pl_module: LightningModule, max_side: int) -> Result:
    post_processor = getattr(pl_module, "post_processor", None)
    thresholds: tuple[float | None, float | None] = (None, None)
    if isinstance(post_processor, PostProcessor) and post_processor.enable_thresholding:
        # The same for all classes: with or without a scale, anomalib cuts here.
        thresholds = post_processor.normalized_image_threshold.item(), post_processor.normalized_pixel_threshold.item()
    label, truth = _row(batch.pred_label, row), _row(batch.gt_label, row)
    score = _row(batch.pred_score, row)
    name = batch.image_path[row] if batch.image_path else ""
    return Result(
        picture=_picture_of(name, cast("Tensor", batch.image)[row], getattr(pl_module, "pre_processor", None), max_side),
        anomaly_map=_row(batch.anomaly_map, row),
        truth=_row(batch.gt_mask, row),
        score=None if score is None else score.item(),
        is_anomalous=None if label is None else bool(label),
        is_labelled_anomalous=None if truth is None else bool(truth),
        image_threshold=thresholds[0],
        pixel_threshold=thresholds[1],
        name=name,
    )


def _row(values: Any, row: int) -> Tensor | None:  # noqa: ANN401  # torchvision's subclasses carry no types
    return None if values is None else cast("Tensor", values[row].as_subclass(Tensor))


def _picture_of(name: str, image: Any, pre_processor: object, max_side: int) -> Tensor:  # noqa: ANN401  # torchvision's image
    """The picture as it was before it was prepared: from its file, or else as well as the batch can tell."""
    image = image.as_subclass(Tensor)
    if isinstance(pre_processor, AprilGANPreProcessor) and pre_processor.tiled:
        return cast("Tensor", image)  # as it was read, and maybe too large to be read twice
    if name:
        try:
            return display_image(name, max_side).float() / 255.0
        except UnreadableImageError:
            pass  # a name alone, or a file that is gone
    if isinstance(pre_processor, AprilGANPreProcessor):
        image = image * pre_processor.std.to(image.device) + pre_processor.mean.to(image.device)
    return cast("Tensor", image)
