"""What CLIP makes of the images of a training, kept on disk: each image goes through CLIP once, not once an epoch."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from .clip.backbone import VisionOutput
from .files import check_writable, unwritable_named
from .recipe import Recipe

logger = logging.getLogger(__name__)

_KEY = 16  # bytes of the digest of an image
_BYTES = 4  # of a float32


class KeptFeatures:
    """Outputs of CLIP by the content of the image that it was given, in a file that is mapped into memory.

    An output is found again where the image, as the network takes it, is the same bit by bit: what was augmented at
    random goes through CLIP again. There are two files. One holds the outputs, a row for each image. The other lists
    the digests of the images, and a row counts once its digest is there, which is written after it: a run that is
    killed leaves nothing that a later one takes for whole. Both are named by the recipe of all that outputs rest on.

    Args:
        folder: Where the files are.
        recipe: What outputs rest on beside the image: CLIP, its image size, precision.
        widths: Numbers of patches and of channels of each stage.
        stages: The stages, ascending.
        embed_dim: Length of the image feature.
        images: How many images are expected at most: there must be room for all of them.

    Raises:
        OSError: The folder cannot be written, has no room, or another training writes the same file.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        widths: Sequence[tuple[int, int]],
        stages: Sequence[int],
        embed_dim: int,
        images: int,
    ) -> None:
        check_writable(folder)
        self.widths, self.stages, self.embed_dim = list(widths), tuple(stages), embed_dim
        self._numbers = sum(patches * channels for patches, channels in widths) + embed_dim
        self._path = folder / f"{recipe.digest}.features"
        self._index = self._path.with_suffix(".index")
        self._lock = FileLock(self._path.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            msg = f"`kept_features`: another training writes to {self._path}. Wait for it, or choose another folder."
            raise OSError(msg) from None
        self._rows = self._read_index()
        self._most = len(self._rows) + images
        self._has_warned = False
        try:
            self._reserve(images)
        except BaseException:
            self._lock.release()
            raise

    def output_of(self, images: Tensor, encode: Callable[[Tensor], VisionOutput]) -> VisionOutput:
        """CLIP's output of images ``(B, 3, H, W)``, resized and normalised: kept, or else encoded now and kept."""
        keys = [_digest(image) for image in images]
        first = {key: place for place, key in reversed([*enumerate(keys)])}
        missing = sorted(place for key, place in first.items() if key not in self._rows)
        if len(self._rows) + len(missing) > self._most:
            self._warn()
            return encode(images)
        if missing:
            encoded = encode(images[missing])
            self._keep([keys[place] for place in missing], encoded)
        flat = torch.from_numpy(np.stack([self._row(self._rows[key]) for key in keys])).to(images.device)
        lengths = [*(patches * channels for patches, channels in self.widths), self.embed_dim]
        *tokens, feature = torch.split(flat, lengths, dim=1)
        shaped = [part.view(-1, *shape) for part, shape in zip(tokens, self.widths, strict=True)]
        return VisionOutput(shaped, feature, self.stages)

    def close(self) -> None:
        """Give back the room that was not needed, and let others write."""
        with self._path.open("r+b") as file:
            file.truncate(len(self._rows) * self._numbers * _BYTES)
        self._lock.release()

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "`kept_features`: the images differ from epoch to epoch, as augmentations make them. What is new goes "
                "through CLIP each time and is not kept.",
                stacklevel=3,
            )

    def _row(self, number: int) -> NDArray[np.float32]:
        offset, shape = number * self._numbers * _BYTES, (self._numbers,)
        return np.array(np.memmap(self._path, dtype=np.float32, mode="r", offset=offset, shape=shape))

    def _keep(self, keys: Sequence[bytes], output: VisionOutput) -> None:
        parts = [tokens.flatten(1) for tokens in map(output.tokens_of, self.stages)]
        rows = torch.cat([*parts, output.image_feature], dim=1).float().cpu().contiguous().numpy()
        with unwritable_named(self._path), self._path.open("r+b", buffering=0) as file:
            file.seek(len(self._rows) * self._numbers * _BYTES)
            file.write(rows.tobytes())
            os.fsync(file.fileno())
        with unwritable_named(self._index), self._index.open("ab", buffering=0) as file:
            file.write(b"".join(keys))
        for key in keys:
            self._rows[key] = len(self._rows)

    def _read_index(self) -> dict[bytes, int]:
        """Digests and rows; what a killed run has left half-written at the end is cut off."""
        content = self._index.read_bytes() if self._index.is_file() and self._path.is_file() else b""
        room = self._path.stat().st_size // (self._numbers * _BYTES) if content else 0
        number = min(len(content) // _KEY, room)
        with unwritable_named(self._index), self._index.open("ab") as file:
            file.truncate(number * _KEY)
        return {content[row * _KEY : (row + 1) * _KEY]: row for row in range(number)}

    def _reserve(self, images: int) -> None:
        """Say how much room is needed, and take it; an OSError where there is less."""
        size = self._numbers * _BYTES
        needed, free = images * size, shutil.disk_usage(self._path.parent).free
        logger.info("Features of %s images are kept in %s: %.2f GB.", images, self._path, needed / 1e9)
        if needed > free:
            msg = (
                f"`kept_features` needs {needed / 1e9:.2f} GB for {images} images, and {self._path.parent} has "
                f"{free / 1e9:.2f} GB. Make room there, choose another folder, or leave it out."
            )
            raise OSError(msg)
        with unwritable_named(self._path), self._path.open("ab") as file:
            file.truncate(len(self._rows) * size)
            if needed and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), len(self._rows) * size, needed)
            elif needed:
                file.truncate((len(self._rows) + images) * size)


def _digest(image: Tensor) -> bytes:
    content = image.detach().cpu().contiguous()
    return hashlib.blake2b(content.numpy().data, digest_size=_KEY).digest()
