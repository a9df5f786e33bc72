"""Thresholds from normal images alone: which scores would the requested share of good parts exceed?"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.stats.mstats import hdquantiles  # type: ignore[import-untyped]  # its stubs are a package of their own
from torch import Tensor
from torchvision.transforms import v2

from ..data.references import References, content_digests, list_references, read_reference, references_of_class
from ..network.memory_bank import MemoryBank

logger = logging.getLogger(__name__)

FROM_REFERENCES = "references"
# Variants of a reference at least: fewer would hardly show how a score wavers.
_LEAST_VARIANTS = 12
# How light the variants are: relative changes, noise of four grey levels in 255, least share of the area kept.
_BRIGHTNESS, _CONTRAST, _SATURATION, _NOISE, _KEPT = 0.2, 0.2, 0.05, 0.015, 0.85

# From an image ``(1, 3, H, W)`` to its raw fused score and the maximum of its map, both scalars.
Score = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Thresholds:
    """Raw scores and map maxima that the requested share of good parts would exceed."""

    image: float
    pixel: float


@dataclass
class Calibration:
    """How thresholds are found without a single defect.

    From held-out normal images, each scored as it is; or from the references themselves: each is left out of the
    memory bank in turn and scored as it is and in lightly changed variants (mirrored, lighter or darker, with noise).
    A single reference cannot be left out: its variants, also cut a little at the border, are compared with itself.
    The thresholds are quantiles (Harrell and Davis, Biometrika 69, 1982: an average over all order statistics,
    steadier than any one of them).

    Args:
        normals: ``"references"``, or held-out normal images: folder or list; for several classes a mapping from names
            to such, or a folder with a folder of each name.
        false_positive_rate: Share of good parts that may be taken for anomalous, in ``(0, 0.5]``.
        seed: Seed of the variants.

    Attributes:
        used: By class, what its thresholds rest on.

    Raises:
        ValueError: The share is out of its range.
    """

    normals: References
    false_positive_rate: float = 0.01
    seed: int = 0
    used: dict[str, list[str]] = field(default_factory=dict)
    _contents: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        if not 0.0 < self.false_positive_rate <= 0.5:
            msg = (
                "`false_positive_rate` must be the share of good parts that may be flagged, in (0, 0.5], such as 0.01, "
                f"got {self.false_positive_rate}."
            )
            raise ValueError(msg)

    @property
    def from_references(self) -> bool:
        """Whether the references themselves are what is scored."""
        return self.normals == FROM_REFERENCES

    @property
    def least(self) -> int:
        """Number of scores below which nothing can be said about the share: not one would be beyond it."""
        return math.ceil(1.0 / self.false_positive_rate - 1e-9) - 1

    def files_of(self, class_name: str, class_names: Sequence[str], references: Sequence[str]) -> list[Path]:
        """The normal images of a class; held-out ones without those that are references.

        Raises:
            FileNotFoundError: One is missing.
            ValueError: There are none, or fewer than the share needs.
        """
        if self.from_references:
            files = [Path(reference) for reference in references]
            missing = [file for file in files if not file.is_file()]
            if missing or not files:
                msg = f"`calibration='references'` scores the references of {class_name!r} again, and "
                msg += f"{missing[0]} is gone." if missing else "there are none: set `k_shot`."
                raise FileNotFoundError(msg) if missing else ValueError(msg)
            return files
        remembered = {Path(reference).resolve() for reference in references}
        given = list_references(
            references_of_class(self.normals, class_name, class_names, "calibration"), "calibration"
        )
        files = [file for file in given if file.resolve() not in remembered]
        if len(files) < self.least:
            share = f"ask for a share of {1.0 / (len(files) + 1):.2g}, " if files else ""
            msg = (
                f"`calibration` has {len(files)} normal images of {class_name!r} that are no references; a "
                f"`false_positive_rate` of {self.false_positive_rate:g} needs at least {self.least}. Give more, {share}"
                "or calibrate with 'references'."
            )
            raise ValueError(msg)
        return files

    def is_done(self, class_name: str, key: Sequence[str], files: Callable[[], Sequence[Path]]) -> bool:
        """Whether the thresholds of a class rest on just these things already.

        Args:
            class_name: The class.
            key: What they rest on, in words.
            files: Tells the normal images; not asked where a checkpoint brought the thresholds.
        """
        if self.used.get(class_name) != list(key):
            return False
        return class_name not in self._contents or self._contents[class_name] == [*content_digests(files())]

    def thresholds(
        self, files: Sequence[Path], bank: MemoryBank, tiles: Callable[[Tensor], int], score: Score
    ) -> Thresholds:
        """Score the normal images of a class and cut at the requested share.

        Args:
            files: What :meth:`files_of` returned.
            bank: Memory bank of the class.
            tiles: Tells how many rows of the bank an image ``(1, 3, H, W)`` has.
            score: From an image to raw score and map maximum.
        """
        scores = (
            self._of_references(files, bank, tiles, score)
            if self.from_references
            else [score(read_reference(file, "calibration")) for file in files]
        )
        images, pixels = (torch.stack(values).double().cpu().numpy() for values in zip(*scores, strict=True))
        share = [1.0 - self.false_positive_rate]
        return Thresholds(float(hdquantiles(images, share)[0]), float(hdquantiles(pixels, share)[0]))

    def note(self, class_name: str, key: Sequence[str], files: Sequence[Path]) -> None:
        """Write down what the thresholds of a class rest on."""
        self.used[class_name], self._contents[class_name] = list(key), [*content_digests(files)]

    def forget(self) -> None:
        """The model has changed: calibrate anew."""
        self.used, self._contents = {}, {}

    def restore(self, used: dict[str, list[str]]) -> None:
        """Take over ``used`` of a checkpoint, whose images may be long gone."""
        self.used, self._contents = used, {}

    def _of_references(
        self, files: Sequence[Path], bank: MemoryBank, tiles: Callable[[Tensor], int], score: Score
    ) -> list[tuple[Tensor, Tensor]]:
        images = [read_reference(file) for file in files]
        ends = torch.tensor([tiles(image) for image in images]).cumsum(0).tolist()
        number = max(_LEAST_VARIANTS, math.ceil((self.least + 1) / len(images)))
        scores = []
        for place, (image, start, end) in enumerate(zip(images, [0, *ends[:-1]], ends, strict=True)):
            with bank.without(range(start, end) if len(images) > 1 else ()):
                scores.append(score(image))
                for variant in range(number):
                    scores.append(score(light_variant(image, (self.seed, place, variant), cut=len(images) == 1)))
        return scores


def light_variant(image: Tensor, seed: tuple[int, int, int], *, cut: bool = False) -> Tensor:
    """The same part as another shot might show it: perhaps mirrored, lighter or darker, with a little noise.

    Nothing is turned or shifted: interpolation blurs and invented borders break patterns, either of which a model may
    well take for a defect.

    Args:
        image: ``(1, 3, H, W)`` in ``[0, 1]``.
        seed: The same seed, the same variant.
        cut: Whether up to a seventh of the area is cut off at the border, and the rest resized: so that no patch is
            the one it was.

    Returns:
        Same shape and range.
    """
    area = (_KEPT, 1.0)
    shape = (image.shape[-1] / image.shape[-2],) * 2
    changes = [
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.ColorJitter(_BRIGHTNESS, _CONTRAST, _SATURATION),
        v2.GaussianNoise(sigma=_NOISE),
    ]
    if cut:
        changes.insert(0, v2.RandomResizedCrop(image.shape[-2:], area, shape, v2.InterpolationMode.BICUBIC))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        varied: Tensor = v2.Compose(changes)(image)
    return varied
