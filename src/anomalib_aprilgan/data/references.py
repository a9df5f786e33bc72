"""Which normal images the few-shot branch remembers: given, or drawn from a seed, always written down."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils.image import is_image_file
from torch import Tensor
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Image

from ..files import is_drawing, is_file, sha256
from ..running import seeded
from .reading import UnreadableImageError, load_image

OneClass = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
References = OneClass | Mapping[str, OneClass]


@dataclass(frozen=True)
class ReferenceSource:
    """Draws from what the user gave, else from the training images (of ``class_name``, if known) of a datamodule."""

    k_shot: int
    seed: int
    given: OneClass | None
    datamodule: AnomalibDataModule | None
    class_name: str | None = None

    @property
    def is_available(self) -> bool:
        """Whether there is something to draw from."""
        return self.given is not None or getattr(self.datamodule, "train_data", None) is not None

    @property
    def name(self) -> str:
        """The source in words."""
        if self.given is not None:
            return f"`references` {self.given}"
        name = getattr(self.datamodule, "name", "no datamodule")
        category = self.class_name or getattr(self.datamodule, "category", None) or ""
        return f"the training images of {name} {category}".rstrip()

    def draw(self) -> list[Path]:
        """The chosen files; a RuntimeError where there is nothing to draw from."""
        if self.given is not None:
            files = list_references(self.given)
        elif self.datamodule is None:
            msg = "There is no datamodule to draw references from; ask `is_available` first."
            raise RuntimeError(msg)
        else:
            samples = self.datamodule.train_data.samples
            if self.class_name is not None and "class_name" in samples:
                samples = samples[samples.class_name == self.class_name]
            files = sorted(Path(path) for path in samples.image_path[samples.label_index == 0])
        return draw_references(files, self.k_shot, self.seed, self.name)


def references_of_class(
    references: References, class_name: str, class_names: Sequence[str], argument: str = "references"
) -> OneClass:
    """An entry of a mapping, or the folder of that name; a ValueError where the class has neither."""
    if isinstance(references, Mapping):
        if class_name in references:
            return references[class_name]
        msg = f"`{argument}` has nothing for the class {class_name!r}, only for {', '.join(references)}. Add it."
        raise ValueError(msg)
    if len(class_names) == 1:
        return references
    folder = Path(references).expanduser() / class_name if isinstance(references, (str, os.PathLike)) else None
    if folder is None or not folder.is_dir():
        msg = (
            f"`{argument}` must tell which images are of {class_name!r}: a mapping from {', '.join(class_names)} to "
            f"folders, or one folder with a folder of each of these names; got {references!r}."
        )
        raise ValueError(msg)
    return folder


def content_digests(files: Sequence[Path]) -> tuple[str, ...]:
    """SHA-256 of the content of each file, its first 16 bytes in hex; a FileNotFoundError where one is gone."""
    return tuple(_digest(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    del size, mtime_ns  # a file that has changed is read again
    return sha256(file)[:32]


def list_references(references: References, argument: str = "references") -> list[Path]:
    """Image files of a folder and those in it (sorted), of one file, or of a list; errors for none or missing ones."""
    if isinstance(references, (str, os.PathLike)):
        try:
            path = Path(references).expanduser().resolve()
            exists = path.exists()
        except (OSError, ValueError, RuntimeError):  # a name that no file can have; links in a loop
            path, exists = Path(references), False
        if not exists:
            remedy = "Pass a folder of normal images or a list of image files."
            msg = f"`{argument}`: {path} does not exist. {remedy}"
            raise FileNotFoundError(msg)
        # Not by anomalib's own listing, which takes no paths with letters outside ASCII.
        files = sorted(filter(is_image_file, path.glob("**/*") if path.is_dir() else [path]))
        files = [file for file in files if file == path or not is_drawing(file)]
        if not files:
            msg = f"`{argument}`: {path} holds no images. Put normal images there, or pass another folder."
            raise ValueError(msg)
        return files
    files = [Path(entry).expanduser() for entry in references]
    missing = [file for file in files if not is_file(file)]
    if missing or not files:
        msg = f"`{argument}`: no file {missing[0]}." if missing else f"`{argument}` is an empty list."
        raise FileNotFoundError(msg) if missing else ValueError(msg)
    return files


def draw_references(files: Sequence[Path], k_shot: int, seed: int, source: str) -> list[Path]:
    """Draw ``k_shot`` files without replacement; exactly as many stay in their order, and fewer are a ValueError."""
    if len(files) < k_shot:
        msg = f"`k_shot` must be at most the {len(files)} normal images in {source}, got {k_shot}."
        raise ValueError(msg)
    if len(files) == k_shot:
        return list(files)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
    return [files[index] for index in order[:k_shot].tolist()]


def read_reference(file: Path, argument: str = "references") -> Tensor:
    """One reference image ``(1, 3, H, W)``, read by ``load_image``, whose error then names the argument."""
    try:
        return load_image(file).unsqueeze(0)
    except UnreadableImageError as error:
        msg = f"`{argument}`: {error}"
        raise UnreadableImageError(msg, error.path) from error


def augmented(image: Tensor, augmentations: Transform | None, seed: int) -> Tensor:
    """An image ``(1, 3, H, W)`` in ``[0, 1]`` after what the images under inspection go through, if anything.

    Random augmentations start from the seed.
    """
    if augmentations is None:
        return image
    with seeded(seed):
        changed: Tensor = augmentations(Image(image[0])).as_subclass(Tensor)
    return changed.clamp(0.0, 1.0).unsqueeze(0)
