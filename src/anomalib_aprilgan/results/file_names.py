"""Names of the files that a run writes, one for each image."""

from __future__ import annotations

from functools import partial
from os.path import commonpath
from pathlib import Path

from anomalib.utils.path import generate_output_filename
from lightning.pytorch import Trainer
from PIL.PngImagePlugin import PngInfo

from ..data.listing import listed_files
from ..files import SOFTWARE, fitting_name


class FileNames:
    """Names of PNG files, relative to the folder of all, for the images of a run as they come.

    Folders are chosen by ``output_folders``. Images without a path are numbered.
    """

    def __init__(self, trainer: Trainer, loaders: object) -> None:
        data = getattr(trainer, "datamodule", None) if trainer.testing else None
        name, category = (getattr(data, attribute, None) for attribute in ("name", "category"))
        self._folders = output_folders(listed_files(loaders), name, category)
        # The place in the data, as a DistributedSampler deals it.
        self._next, self._step = trainer.global_rank, trainer.world_size

    def next(self, image_path: str) -> Path:
        """The name for the next image, whose path may be empty."""
        number, self._next = self._next, self._next + self._step
        if not image_path:
            return Path(f"{number:06d}.png")
        source = Path(image_path)
        folder = self._folders.get(source.parent, Path(source.parent.name))
        return folder / png_name(source)


def png_name(source: Path) -> str:
    """The name of a PNG file for an image file; two images may differ in their suffix alone."""
    is_png = source.suffix.lower() == ".png"
    return fitting_name(source.stem if is_png else source.name, source.suffix if is_png else ".png")


def marked() -> PngInfo:
    """What tells a PNG of results from an image to inspect; see ``anomalib_aprilgan.files.is_drawing``."""
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    return info


def output_folders(files: list[str], dataset_name: str | None, category: str | None) -> dict[Path, Path]:
    """For every folder of images the one of their results, relative to that of all results of a kind.

    anomalib's choice, which is the folders below the data set's and category's where these are in the path, and else
    the last folder alone. Where that would be the same for two folders, their paths below the folder of all data.
    """
    folders = {Path(file).parent for file in files}
    choose = partial(generate_output_filename, dataset_name=dataset_name, category=category, mkdir=False)
    chosen = {folder: choose(folder / "_", Path()).parent for folder in folders}
    if len(set(chosen.values())) == len(folders):
        return chosen
    whole = Path(commonpath([folder.absolute() for folder in folders]))
    return {folder: folder.absolute().relative_to(whole) for folder in folders}
