"""The drawing of one result: the image, where its map is hot, and what was decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from anomalib.visualization.image.functional import create_image_grid, overlay_images
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from skimage.segmentation import find_boundaries
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_dtype, to_pil_image

# Every map is drawn in these colours, from 0 to 1, so that drawings can be compared with each other. The colours grow
# lighter with the value; those of anomalib's `apply_colormap` do not, and hold the one of the contour.
COLOUR_MAP = "inferno"
CONTOUR_COLOUR = (0, 255, 255)
TRUTH_COLOUR = (0, 255, 0)
BOX_COLOUR = (255, 200, 0)
ROI_COLOUR = (255, 255, 255)
# Left, top, right and bottom of a box, as shares of an image's width and height.
Box = tuple[float, float, float, float]

_SMALLEST_SIDE = 320  # a smaller image is enlarged until its longest side has as many pixels
OPACITY = 0.8  # of the colours in the upper half of the range; below they fade, to nothing at its lower end
_OUTSIDE = 0.35  # brightness of what is not looked at
_DIMMED = 0.45  # brightness that the image keeps under a cold map
_MARGIN, _BAR_WIDTH, _BAR_LABELS = 12, 16, 40
_TITLE, _SUBTITLE, _TEXT = 22, 18, 14  # font sizes in pixels
_HEADER, _CAPTION = _TITLE + _TEXT + 4 * _MARGIN, _TEXT + 10  # heights of what is above and below the panels
_BACKGROUND, _INK, _FAINT = (24, 24, 24), (240, 240, 240), (160, 160, 160)
_DECISIONS = {True: ("ANOMALOUS", (200, 40, 40)), False: ("GOOD", (30, 130, 60)), None: ("NOT DECIDED", (90, 90, 90))}


@dataclass(frozen=True)
class Result:
    """What is drawn of one image; ``None`` what is not known.

    The image is ``(3, H, W)``, uint8, or float in ``[0, 1]``. Map and ground-truth mask are ``(h, w)``, of any size, in
    proportion to the image or not; the map is outlined above the pixel threshold. Outside the mask ``inside``
    ``(h, w)`` the image is dimmed.
    """

    image: Tensor
    anomaly_map: Tensor | None = None
    truth: Tensor | None = None
    score: float | None = None
    is_anomalous: bool | None = None
    is_labelled_anomalous: bool | None = None
    image_threshold: float | None = None
    pixel_threshold: float | None = None
    name: str = ""
    inside: Tensor | None = None
    boxes: Sequence[Box] = ()


def draw(result: Result, max_side: int = 1024) -> Image.Image:
    """Panels of at most ``max_side`` pixels, side by side or for wide images in a column, under the decision."""
    image = dimmed(_panel(result.image, max_side), result.inside)
    panels = [("image", image)]
    if result.truth is not None:
        outline = _outline(_resize_map((result.truth > 0).float(), image.size) >= 0.5, TRUTH_COLOUR)
        panels.append(("ground truth", overlay_images(image, outline, alpha=1.0)))
    if result.boxes:
        panels[0] = ("image and regions", _boxed(image, result.boxes))
    if result.anomaly_map is not None:
        panels.append(_heatmap(image, result.anomaly_map, result.pixel_threshold))
    in_a_row = 1 if image.width > 1.4 * image.height else len(panels)
    grid = create_image_grid([_tile(*panel) for panel in panels], nrow=in_a_row)
    bar_width = 0 if result.anomaly_map is None else _BAR_WIDTH + _BAR_LABELS
    return _framed(result, grid, image.height, bar_width)


def _panel(image: Tensor, max_side: int) -> Image.Image:
    """The image in 8 bits at the size of a panel; pixels that are enlarged keep their values."""
    floats = image.clamp(0.0, 1.0) if image.is_floating_point() else image
    panel: Image.Image = to_pil_image(to_dtype(floats, torch.uint8, scale=True).cpu())
    longest = max(panel.size)
    scale = min(max(longest, _SMALLEST_SIDE), max_side) / longest
    width, height = (max(1, round(side * scale)) for side in panel.size)
    return panel.resize((width, height), Image.Resampling.BILINEAR if scale < 1.0 else Image.Resampling.NEAREST)


def dimmed(image: Image.Image, inside: Tensor | None) -> Image.Image:
    """An image whose part outside a mask ``(h, w)``, of any size, is darker and gray; as it is without a mask."""
    if inside is None:
        return image
    mask = Image.fromarray(inside.cpu().numpy()).resize(image.size, Image.Resampling.NEAREST)
    outside = ImageEnhance.Brightness(image.convert("L").convert("RGB")).enhance(_OUTSIDE)
    shown = Image.composite(image.convert("RGB"), outside, mask.convert("L"))
    return overlay_images(shown, _outline(np.asarray(mask), ROI_COLOUR), alpha=1.0).convert("RGB")


def draw_roi(image: Tensor, inside: Tensor) -> Image.Image:
    """An image ``(3, H, W)`` with what lies outside a mask ``(h, w)`` dark and gray."""
    panel: Image.Image = to_pil_image(image)
    return dimmed(panel, inside)


def _boxed(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """An image with boxes around its regions."""
    boxed = image.convert("RGB").copy()
    pen = ImageDraw.Draw(boxed)
    for left, top, right, bottom in boxes:
        corners = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        around = [round(corner) + side for corner, side in zip(corners, (-2, -2, 1, 1), strict=True)]
        pen.rectangle(around, width=2, outline=BOX_COLOUR)
    return boxed


def _resize_map(anomaly_map: Tensor, size: tuple[int, int]) -> NDArray[np.float32]:
    """A map at a width and height; made smaller by its maxima, so that no small spot is lost."""
    values = anomaly_map.detach().float().cpu().reshape(1, 1, *anomaly_map.shape[-2:])
    smaller = [min(of_map, of_panel) for of_map, of_panel in zip(values.shape[-2:], size[::-1], strict=True)]
    values = F.interpolate(F.adaptive_max_pool2d(values, smaller), size[::-1], mode="bilinear", align_corners=False)
    return values[0, 0].numpy()


def _outline(mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Image.Image:
    """The edge of a mask, a pixel on either side of it; anomalib's contours are half as wide."""
    edge = find_boundaries(mask, mode="thick")
    return Image.fromarray(edge[..., None] * np.array((*colour, 255), dtype=np.uint8))


def _heatmap(image: Image.Image, anomaly_map: Tensor, threshold: float | None) -> tuple[str, Image.Image]:
    """Colours of the map over the dimmed image, as a function of the map's values alone, and their caption."""
    lowest, highest = anomaly_map.min().item(), anomaly_map.max().item()
    caption = "heatmap" if threshold is None else f"heatmap, outlined above {threshold:.2f}"
    if lowest < 0.0 or highest > 1.0:
        caption = f"map, not scaled: {lowest:.2g} to {highest:.2g}"
    values = _resize_map(anomaly_map, image.size)
    opacity = OPACITY * (2.0 * values).clip(0.0, 1.0) ** 2
    layers = [Image.fromarray(mpl.colormaps[COLOUR_MAP](values.clip(0.0, 1.0), alpha=opacity, bytes=True))]
    if threshold is not None:
        layers.append(_outline(values > threshold, CONTOUR_COLOUR))
    return caption, overlay_images(ImageEnhance.Brightness(image.convert("L")).enhance(_DIMMED), layers, alpha=1.0)


def _tile(caption: str, panel: Image.Image) -> Image.Image:
    """A panel with its caption, and the margins on its left and below."""
    tile = Image.new("RGB", (_MARGIN + panel.width, panel.height + _CAPTION + _MARGIN), _BACKGROUND)
    tile.paste(panel.convert("RGB"), (_MARGIN, 0))
    ImageDraw.Draw(tile).text((_MARGIN, panel.height + 6), caption, _FAINT, font=_font(_TEXT), anchor="lt")
    return tile


def _framed(result: Result, grid: Image.Image, panel_height: int, bar_width: int) -> Image.Image:
    """The panels with decision, score and name above them, and the bar of colours on the right of the last one."""
    decision, colour = _DECISIONS[result.is_anomalous]
    score = _score_text(result)
    chip = math.ceil(_font(_TITLE).getlength(decision)) + 2 * _MARGIN
    needed = 3 * _MARGIN + chip + math.ceil(_font(_SUBTITLE).getlength(score))
    width = max(grid.width + bar_width + _MARGIN, needed)
    canvas = Image.new("RGB", (width, _HEADER + grid.height), _BACKGROUND)
    canvas.paste(grid, (0, _HEADER))
    pen = ImageDraw.Draw(canvas)
    pen.rounded_rectangle((_MARGIN, _MARGIN, _MARGIN + chip, 2 * _MARGIN + _TITLE), radius=6, fill=colour)
    middle = _MARGIN + (_TITLE + _MARGIN) // 2
    pen.text((_MARGIN + chip // 2, middle), decision, _INK, font=_font(_TITLE), anchor="mm")
    pen.text((2 * _MARGIN + chip, middle), score, _INK, font=_font(_SUBTITLE), anchor="lm")
    path = Path(result.name)
    name = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else result.name
    name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    while len(name) > 1 and _font(_TEXT).getlength(name) > width - 2 * _MARGIN:
        name = f"…{name[2:]}"  # the end of a path tells more than its beginning
    pen.text((_MARGIN, _HEADER - _MARGIN), name, _FAINT, font=_font(_TEXT), anchor="ls")
    if bar_width:
        _draw_bar(canvas, grid.width + _MARGIN, canvas.height - _MARGIN - _CAPTION - panel_height, panel_height)
    return canvas


def _score_text(result: Result) -> str:
    text = "no score" if result.score is None else f"score {result.score:.3f}"
    if result.is_anomalous is not None and result.image_threshold is not None:
        text += f", threshold {result.image_threshold:.2f}"
    if result.is_labelled_anomalous is not None:
        text += f", labelled {'anomalous' if result.is_labelled_anomalous else 'good'}"
    return text


def _draw_bar(canvas: Image.Image, x: int, y: int, height: int) -> None:
    """The colours and what they stand for."""
    values = np.linspace(1.0, 0.0, height, dtype=np.float32)[:, None].repeat(_BAR_WIDTH, axis=1)
    canvas.paste(Image.fromarray(mpl.colormaps[COLOUR_MAP](values, bytes=True)[..., :3]), (x, y))
    pen = ImageDraw.Draw(canvas)
    for value, anchor in ((1.0, "lt"), (0.5, "lm"), (0.0, "lb")):
        at = (x + _BAR_WIDTH + 4, y + (1.0 - value) * height)
        pen.text(at, f"{value:g}", _FAINT, font=_font(_TEXT), anchor=anchor)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The one of matplotlib, which has Greek and Cyrillic letters too."""
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
