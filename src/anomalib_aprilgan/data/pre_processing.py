"""From an image to what CLIP sees: the same 8-bit antialiased resize in Engine, ``forward`` and every export."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from anomalib.data import Batch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize
from torchvision.tv_tensors import Mask, wrap

from ..checks import check_bool, check_int, check_list, check_number, shown
from ..running import full_precision

# CLIP's own statistics (open_clip.constants.OPENAI_DATASET_MEAN / _STD).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Numbers of an image that are resized together.
_PIXELS_AT_ONCE = 2**23
Array = TypeVar("Array", Tensor, NDArray[np.float64])
# From numpy or torch, and distances, to the weights of taps.
Kernel = Callable[[ModuleType, Any], Any]
# How far values may lie outside [0, 1]: as far as rounding to 8 bits covers up, or as bicubic augmentations shoot over.
_HALF_STEP, _OVERSHOOT = 0.5 / 255.0, 0.5


class EightBitResize(Resize):  # type: ignore[misc]  # torchvision carries no types
    """``resize_image`` and ``resize_mask`` as a ``Resize``, which anomalib's datamodules look for."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size, interpolation=InterpolationMode.BICUBIC, antialias=True)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:  # noqa: ANN401  # torchvision's signature
        """One image or mask resized; what augmentations have shot over the range is cut. Anything else passes."""
        del params
        height, width = self.size
        if isinstance(inpt, Mask):
            return wrap(resize_mask(inpt.as_subclass(Tensor), (height, width)), like=inpt)
        if isinstance(inpt, Tensor):
            _check_range(inpt, _OVERSHOOT)
            resized = resize_image(inpt.as_subclass(Tensor), (height, width))
            return resized if type(inpt) is Tensor else wrap(resized, like=inpt)
        return super().transform(inpt, {})


class AprilGANPreProcessor(PreProcessor):
    """Resize and normalisation of the published method (authors' dataset.py and train.py).

    Args:
        image_size: Height and width in pixels.
        mean: Channel means in ``[0, 1]``; ``std`` are their standard deviations.
        tiled: Whether anomalib leaves images and masks of a batch at full size; the model then prepares tiles of them.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
        *,
        tiled: bool = False,
    ) -> None:
        _check_pre_processing(image_size, mean, std)
        check_bool("tiled", tiled)
        whole = Compose([EightBitResize(image_size), Normalize(mean=list(mean), std=list(std))])
        super().__init__(None if tiled else whole)
        self.image_size = image_size
        self.tiled = tiled
        self.mean: Tensor = nn.Buffer(torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.std: Tensor = nn.Buffer(torch.tensor(std).view(3, 1, 1), persistent=False)
        # anomalib would export a copy of the transform with antialiasing switched off.
        self.export_transform = None

    def forward(self, batch: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` resized to ``(B, 3, *image_size)`` and normalised."""
        return (resize_image(batch, self.image_size) - self.mean) / self.std

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch[Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Drop the number that Lightning passes where there are several loaders: anomalib's does not take it."""
        del dataloader_idx
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx)

    def checkpoint_config(self) -> dict[str, Any]:
        """Plain data from which the transforms are rebuilt; anomalib's own way knows only its own transforms."""
        statistics = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return {"image_size": list(self.image_size), **statistics}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore what ``checkpoint_config`` returned; tiled or not is this object's own choice."""
        height, width = config["image_size"]
        # Made whole first: what does not fit changes nothing.
        restored = AprilGANPreProcessor((height, width), tuple(config["mean"]), tuple(config["std"]), tiled=self.tiled)
        self.transform, self.image_size = restored.transform, restored.image_size
        self.mean, self.std = restored.mean.to(self.mean.device), restored.std.to(self.std.device)


def _check_pre_processing(image_size: object, mean: object, std: object) -> None:
    """Raise an error that names the argument unless sizes and statistics are such."""
    what = "height and width in pixels"
    if len([check_int("image_size", side, 1) for side in check_list("image_size", image_size, what)]) != 2:
        msg = f"`image_size` must be {what}, got {shown(image_size)}."
        raise ValueError(msg)
    what = "three numbers, standard deviations above 0"
    for name, given in (("mean", mean), ("std", std)):
        numbers = [check_number(name, value, what) for value in check_list(name, given, what)]
        if len(numbers) != 3 or (name == "std" and min(numbers) <= 0.0):
            msg = f"`{name}` must be {what}, got {shown(given)}."
            raise ValueError(msg)


def prepared(pre_processor: nn.Module | None, images: Tensor) -> Tensor:
    """Images ``(B, 3, H, W)``, floats in ``[0, 1]`` or ``uint8``, as the network takes them; as given for ``None``.

    anomalib's ``PreProcessor`` resizes without antialias in its ``forward``, which is for exports. Elsewhere its
    transform is taken, and floats outside ``[0, 1]`` by more than half an 8-bit step are a ValueError.
    """
    if pre_processor is None:
        return images
    _check_range(images, _HALF_STEP)
    transform: Callable[[Tensor], Tensor] | None = pre_processor
    if isinstance(pre_processor, PreProcessor) and not isinstance(pre_processor, AprilGANPreProcessor):
        transform = pre_processor if torch.compiler.is_exporting() else pre_processor.transform
    with full_precision(images):  # a resize in half precision is another one
        return images if transform is None else transform(images)


def describe(pre_processor: nn.Module | None) -> str:
    """What a pre-processor does, in words: the same for two that do the same."""
    return str(pre_processor.checkpoint_config() if isinstance(pre_processor, AprilGANPreProcessor) else pre_processor)


def _check_range(images: Tensor, tolerance: float) -> None:
    if torch.compiler.is_compiling() or images.is_meta or not (images.is_floating_point() and images.numel()):
        return
    low, high = images.min().item(), images.max().item()
    if not (low >= -tolerance and high <= 1.0 + tolerance):  # also where one is not a number
        msg = f"Images must be floats in [0, 1] or uint8, got floats in [{low:g}, {high:g}]. Scale them to [0, 1]."
        raise ValueError(msg)


def aspect_size(image_size: tuple[float, float], side: int, patch_size: int) -> tuple[int, int]:
    """Height and width in pixels that keep the shape of ``image_size``, in any unit, at the cost of a square ``side``.

    Of all sizes with at most as many patches as the square and at least nine tenths of them, the one nearest in
    shape, and among equals the largest: for images of 2048 x 1024 pixels 26 x 52 patches of 14, where a square of 518
    would squash them into 37 x 37. A ValueError names an argument out of range.
    """
    height, width = image_size
    if height <= 0 or width <= 0:
        msg = f"`image_size` must be a height and a width above 0, got {height} x {width}."
        raise ValueError(msg)
    if patch_size < 1 or side < patch_size or side % patch_size:
        msg = f"`side` must be a multiple of the patch of {patch_size} pixels, got {side}."
        raise ValueError(msg)
    most = (side // patch_size) ** 2
    shape = math.log(width / height)
    by_rows = {rows: range(math.ceil(0.9 * most / rows), most // rows + 1) for rows in range(1, most + 1)}
    grids = [(rows, columns) for rows, widths in by_rows.items() for columns in widths]
    # Rounded, so that sizes of one shape count as equals.
    rows, columns = min(grids, key=lambda grid: (round(abs(math.log(grid[1] / grid[0]) - shape), 9), -math.prod(grid)))
    return rows * patch_size, columns * patch_size


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic antialiased resize of an image ``(..., H, W)``, float in ``[0, 1]`` or ``uint8``, to multiples of 1/255.

    The published results rest on Pillow's resize: along the width, quantised, along the height, quantised. torchvision
    differs on float images, and OpenVINO drops the antialias flag of ONNX's operator without a word. Two products with
    filter matrices are one arithmetic for data loading, ``forward`` and export, within one 8-bit step of Pillow (from
    Pillow 13 on: of its two passes in this order). The result is float32 in ``[0, 1]``.
    """

    def eight_bit(part: Tensor) -> Tensor:
        return _to_eight_bit(part.float() if part.dtype == torch.uint8 else (part * 255.0).float())

    return _resize_eight_bit(image, eight_bit, size, _bicubic) / 255.0


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear antialiased resize of a mask ``(..., H, W)``, set where above 0, to 0 and 1, cut at 0.5 (dataset.py)."""
    resized = _resize_eight_bit(mask, lambda part: (part > 0).float() * 255.0, size, _bilinear)
    return (resized > 127.5).to(mask.dtype)


def unmixed(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels ``(h, w)`` of a resized image come from true pixels of ``mask`` ``(H, W)`` alone.

    The resize is that of ``resize_image``, whose pixels are made of some that lie around them.
    """
    if tuple(mask.shape) == tuple(size):
        return mask
    rows, columns = _taps(mask.shape, size, mask.device)
    return (rows @ (~mask).float() @ columns.T) == 0


def sources(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels ``(H, W)`` of an image of this size the true pixels of ``mask`` ``(h, w)`` are resized from."""
    if tuple(mask.shape) == tuple(size):
        return mask
    rows, columns = _taps(size, mask.shape, mask.device)
    return (rows.T @ mask.float() @ columns) > 0


def _taps(size: Sequence[int], target: Sequence[int], device: torch.device) -> list[Tensor]:
    """For rows and columns, ones ``(target, size)`` where a pixel counts for one of the resized image."""
    pairs = zip(size, target, strict=True)
    return [(_filter_matrix(length, resized, _bicubic, device) != 0).float() for length, resized in pairs]


def fitting_mask(mask: Tensor, image: Tensor) -> Tensor:
    """A mask ``(h, w)`` at the size of its image ``(..., H, W)``; as it is where it has that size."""
    if mask.shape[-2:] == image.shape[-2:]:
        return mask
    fitting = resize_mask(mask.as_subclass(Tensor), (image.shape[-2], image.shape[-1]))
    return fitting if type(mask) is Tensor else Mask(fitting)


def _resize_eight_bit(
    image: Tensor, eight_bit: Callable[[Tensor], Tensor], size: tuple[int, int], kernel: Kernel
) -> Tensor:
    """Pixels in steps of 8 bits, 0 to 255; ``eight_bit`` makes such of any part of the image."""
    height, width = image.shape[-2:]
    if not torch.compiler.is_exporting() and (height, width) == tuple(size):
        return eight_bit(image)
    rows = _filter_matrix(height, size[0], kernel, image.device)
    columns = _filter_matrix(width, size[1], kernel, image.device)
    if torch.compiler.is_exporting() or image.numel() <= _PIXELS_AT_ONCE:
        return _to_eight_bit(rows @ _to_eight_bit(eight_bit(image) @ columns.T))
    # Not all of a large image as floats at once.
    strips = torch.split(image, max(1, _PIXELS_AT_ONCE * height // image.numel()), dim=-2)
    narrow = torch.cat([_to_eight_bit(eight_bit(strip) @ columns.T) for strip in strips], dim=-2)
    return _to_eight_bit(rows @ narrow)


def _to_eight_bit(pixels: Tensor) -> Tensor:
    # Half up, as Pillow's fixed-point arithmetic rounds; torch.round goes to even.
    return (pixels.clamp(0.0, 255.0) + 0.5).floor()


def _filter_matrix(length: int, target: int, kernel: Kernel, device: torch.device) -> Tensor:
    # Rows sum to one. The kernel widens with the reduction, and taps outside the image are left out (Resample.c).
    # In double precision on the host, since not every device has it, and in fp32 within a graph.
    scale = length / target
    widening: Any
    if torch.compiler.is_exporting():
        widening = torch.sym_max(scale, 1.0)  # symbolic
        centres = (torch.arange(target, device=device) + 0.5) * scale
        taps = torch.arange(length, device=device) + 0.5
        weights: Tensor = kernel(torch, (taps[None, :] - centres[:, None]).abs() / widening)
        return weights / weights.sum(dim=1, keepdim=True)
    distance = np.abs((np.arange(length) + 0.5)[None, :] - ((np.arange(target) + 0.5) * scale)[:, None])
    precise = kernel(np, distance / max(scale, 1.0))
    return torch.from_numpy((precise / precise.sum(axis=1, keepdims=True)).astype(np.float32)).to(device)


def _bilinear(xp: ModuleType, x: Array) -> Array:
    weights: Array = xp.where(x < 1.0, 1.0 - x, 0.0 * x)
    return weights


def _bicubic(xp: ModuleType, x: Array) -> Array:
    # Keys' kernel with a = -0.5, the antialiasing choice of Pillow and torch.
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weights: Array = xp.where(x < 1.0, near, xp.where(x < 2.0, far, 0.0 * x))
    return weights
