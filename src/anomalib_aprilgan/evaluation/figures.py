"""Pictures of results, in the manner of the paper's figure 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalib.data.utils import read_image, read_mask
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ..files import SOFTWARE, write_atomically


def heatmap_figure(
    image_paths: Sequence[Path],
    masks: Sequence[Path | NDArray[Any]],
    maps: Mapping[str, Sequence[Tensor]],
    path: Path,
) -> None:
    """One row per image: the image, its ground truth, and a map per setting, all maps on one colour range.

    Args:
        image_paths: Image files.
        masks: Their ground truth: files, or arrays ``(H, W)`` of 0 and 1.
        maps: Per setting, by its title, the maps ``(H, W)`` in ``[0, 1]`` of the images.
        path: PNG file to write.
    """
    columns = 2 + len(maps)
    figure = Figure(figsize=(1.6 * columns, 1.6 * len(image_paths) + 0.3), layout="constrained")
    axes = figure.subplots(len(image_paths), columns, squeeze=False)
    for row, (image_path, mask) in enumerate(zip(image_paths, masks, strict=True)):
        image = read_image(image_path)
        axes[row][0].imshow(image)
        truth = read_mask(mask) > 0 if isinstance(mask, Path) else mask
        axes[row][1].imshow(truth, cmap="gray", vmin=0, vmax=1)
        extent = (0, image.shape[1], image.shape[0], 0)
        for axis, setting in zip(axes[row][2:], maps.values(), strict=True):
            axis.imshow(image)
            axis.imshow(setting[row].cpu().numpy(), cmap="jet", vmin=0.0, vmax=1.0, alpha=0.5, extent=extent)
    for axis, title in zip(axes[0], ("image", "ground truth", *maps), strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110, metadata={"Software": SOFTWARE}))
