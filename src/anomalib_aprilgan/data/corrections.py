"""What people say of results: corrections from a report; escaped defects, where adapters can be trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shutil import copyfileobj

from anomalib.data.utils.image import is_image_file
from PIL import Image

from ..checks import shown
from ..csv_text import plain_name, read_csv
from ..files import is_file, write_atomically
from .reading import UnreadableImageError, load_image
from .references import content_digests

# Folders of images and masks.
IMAGES, MASKS = "defective", "masks"


def read_corrections(path: Path, mark: str, class_name: str | None = None) -> dict[str | None, list[str]]:
    """The images with a mark, "good" or "bad", in a report's ``corrections.csv``, by class.

    Args:
        path: The table.
        mark: Which images are wanted.
        class_name: The only class that is wanted; else all, ``None`` for images that have none.

    Raises:
        FileNotFoundError: There is no such table.
        ValueError: It is another table, or no image has this mark.
    """
    if not is_file(path):
        msg = f"There is no {path}: give the corrections.csv that a report's page has downloaded."
        raise FileNotFoundError(msg)
    found: dict[str | None, list[str]] = {}
    for row in read_csv(path):
        if row.get("mark") not in {"good", "bad"} or not {"image_path", "class_name"} <= set(row):
            msg = f"{path} must have the columns image_path, class_name and mark (good or bad), got {shown(row)}."
            raise ValueError(msg)
        name = plain_name(row["class_name"]) or None
        if row["mark"] == mark and class_name in {None, name}:
            found.setdefault(name, []).append(row["image_path"])
    if not found:
        msg = f"{path} marks no image as {mark}{'' if class_name is None else f' of {class_name!r}'}."
        raise ValueError(msg)
    return found


def masks_of(files: Sequence[Path], folder: Path) -> list[Image.Image]:
    """The mask of each file, black and white: what has its name up to the ending in a folder.

    White is defective: what is brighter than half of the brightest pixel.

    Raises:
        FileNotFoundError: There is no folder, or no mask of a file.
        ValueError: A mask or an image cannot be read, or a mask is of another size, or shows no defect.
    """
    if not folder.is_dir():
        msg = f"`masks`: {folder} is no folder."
        raise FileNotFoundError(msg)
    by_stem = {path.stem: path for path in sorted(folder.iterdir()) if is_file(path) and is_image_file(path)}
    missing = [file for file in files if file.stem not in by_stem]
    if missing:
        msg = f"`masks`: {folder} has no mask of {missing[0].name}: an image named {missing[0].stem!r}, of any type."
        raise FileNotFoundError(msg)
    return [_mask_of(file, by_stem[file.stem]) for file in files]


def _mask_of(file: Path, path: Path) -> Image.Image:
    try:
        image, mask = load_image(file), load_image(path)
    except UnreadableImageError as error:
        msg = f"`masks`: {error}"
        raise UnreadableImageError(msg, error.path) from error
    if mask.shape != image.shape:
        of_image, of_mask = (f"{one.shape[-1]} x {one.shape[-2]}" for one in (image, mask))
        msg = f"`masks`: {path} must be as large as its image, {of_image} pixels, got {of_mask}."
        raise ValueError(msg)
    if not mask.any():
        msg = f"`masks`: {path} shows no defect: mark what is defective in white."
        raise ValueError(msg)
    return Image.fromarray((mask.amax(dim=0) > mask.max() / 2.0).numpy())


def add_to_training_folder(files: Sequence[Path], masks: Sequence[Image.Image], folder: Path) -> None:
    """Copy images and write their masks into ``defective`` and ``masks`` of a folder, for anomalib's ``Folder``.

    The names end in a digest of the image's content, so that what is there already is replaced by the same.
    """
    for file, mask, content in zip(files, masks, content_digests(files), strict=True):
        name = f"{file.stem[:100]}-{content[:8]}"
        # The mask first: an image without one would be taken for one without a defect.
        write_atomically(folder / MASKS / f"{name}.png", partial(mask.convert("L").save, format="PNG"))
        with file.open("rb") as source:
            write_atomically(folder / IMAGES / f"{name}{file.suffix}", partial(copyfileobj, source))
