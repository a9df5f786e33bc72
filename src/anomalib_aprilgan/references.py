"""Which normal images the few-shot branch remembers: given, or drawn from a seed, always written down."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data.utils import get_image_filenames, read_image
from PIL import UnidentifiedImageError
from torch import Tensor

ReferenceSource = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def list_references(references: ReferenceSource) -> list[Path]:
    """Image files of a folder (sorted), of one file, or of a list.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: The folder holds no image, or the list is empty.
    """
    if isinstance(references, (str, os.PathLike)):
        path = Path(references).expanduser()
        if not path.exists():
            msg = f"`references`: {path} does not exist. Pass a folder of normal images or a list of image files."
            raise FileNotFoundError(msg)
        try:
            files = sorted(get_image_filenames(path))
        except ValueError:  # anomalib's word for a folder without images
            files = []
        if not files:
            msg = f"`references`: {path} holds no images. Put normal images there, or pass another folder."
            raise ValueError(msg)
        return files
    files = [Path(entry).expanduser() for entry in references]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        msg = f"`references`: no file {missing[0]}." if missing else "`references` is an empty list."
        raise FileNotFoundError(msg) if missing else ValueError(msg)
    return files


def draw_references(files: Sequence[Path], k_shot: int, seed: int, source: str) -> list[Path]:
    """Draw ``k_shot`` files without replacement; exactly as many are taken as they are, in their order.

    Raises:
        ValueError: There are fewer files than ``k_shot``.
    """
    if len(files) < k_shot:
        msg = f"`k_shot` must be at most the {len(files)} normal images in {source}, got {k_shot}."
        raise ValueError(msg)
    if len(files) == k_shot:
        return list(files)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
    return [files[index] for index in order[:k_shot].tolist()]


def read_reference(file: Path) -> Tensor:
    """One reference image, ``(1, 3, H, W)`` in ``[0, 1]``.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        image = read_image(file, as_tensor=True)
    except (UnidentifiedImageError, OSError) as error:
        msg = f"`references`: {file} cannot be read as an image ({error}). Replace or remove it."
        raise ValueError(msg) from error
    return torch.as_tensor(image).as_subclass(Tensor).unsqueeze(0)
