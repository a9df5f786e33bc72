"""Thresholds from normal images alone: which scores would the requested share of good parts exceed?"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats.mstats import hdquantiles
from torch import Tensor
from torchvision.transforms import v2

from ..checks import check_number
from ..data.references import References, list_references, read_reference, references_of_class
from ..running import seeded

FROM_REFERENCES = "references"
# Variants of a reference at least: fewer would hardly show how a score wavers.
_LEAST_VARIANTS = 12
_LEAST_RATE_OF_REFERENCES = 0.001
# How light the variants are: relative changes, noise of four grey levels in 255, least share of the area kept.
_BRIGHTNESS, _CONTRAST, _SATURATION, _NOISE, _KEPT = 0.2, 0.2, 0.05, 0.015, 0.85

# From an image ``(1, 3, H, W)`` and the indices of remembered images to hold out, to raw score, fused where there are
# references, and map maximum, both scalars.
Score = Callable[[Tensor, Collection[int]], tuple[Tensor, Tensor]]


class Thresholds(NamedTuple):
    """Raw score and map maximum that the requested share of good parts would exceed."""

    image: float
    pixel: float


@dataclass(frozen=True)
class Calibration:
    """How thresholds are found without a single defect.

    From held-out normal images, each scored as it is. Or from the references themselves: each is held out of the
    memory bank in turn and scored as it is and in light variants. A single reference cannot be held out: its variants,
    also cut a little at the border, are compared with itself. The thresholds are quantiles (Harrell and Davis,
    Biometrika 69, 1982: an average over all order statistics, steadier than any one of them).

    Args:
        normals: ``"references"``, or held-out normal images: folder or list; for several classes a mapping from names
            to such, or a folder with a folder of each name.
        false_positive_rate: Share of good parts that may be taken for anomalous, in ``(0, 0.5]``.
        seed: Seed of the variants.
        contamination: Share of the references that may be defective, in ``[0, 0.5]``: so many, those with the highest
            maps, are left out.
    """

    normals: References
    false_positive_rate: float = 0.01
    seed: int = 0
    contamination: float = 0.0

    def __post_init__(self) -> None:
        """Raise if the share is out of range."""
        expected = "the share of good parts that may be flagged, in (0, 0.5], such as 0.01"
        if not 0.0 < check_number("false_positive_rate", self.false_positive_rate, expected) <= 0.5:
            msg = f"`false_positive_rate` must be {expected}, got {self.false_positive_rate}."
            raise ValueError(msg)
        if self.from_references and self.false_positive_rate < _LEAST_RATE_OF_REFERENCES:
            msg = (
                f"`false_positive_rate` must be at least {_LEAST_RATE_OF_REFERENCES} for `calibration='references'`, "
                f"which scores more than 1 / share variants of them, got {self.false_positive_rate}. Calibrate with a "
                "folder of normal images, or ask for a larger share."
            )
            raise ValueError(msg)

    @property
    def from_references(self) -> bool:
        """Whether the references themselves are what is scored."""
        return self.normals == FROM_REFERENCES

    @property
    def least(self) -> int:
        """Number of scores below which not one would be beyond the threshold."""
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
        given = references_of_class(self.normals, class_name, class_names, "calibration")
        files = [file for file in list_references(given, "calibration") if file.resolve() not in remembered]
        if len(files) < self.least:
            share = f"ask for a share of {1.0 / (len(files) + 1):.2g}, " if files else ""
            msg = (
                f"`calibration` has {len(files)} normal images of {class_name!r} that are no references; a "
                f"`false_positive_rate` of {self.false_positive_rate:g} needs at least {self.least}. Give more, {share}"
                "or calibrate with 'references'."
            )
            raise ValueError(msg)
        return files

    def thresholds(
        self,
        files: Sequence[Path],
        tiles: Callable[[Tensor], int],
        score: Score,
        augment: Callable[[Tensor], Tensor] = lambda image: image,
        in_place: bool = False,
    ) -> Thresholds:
        """Score these normal images and cut at the requested share.

        ``tiles`` tells how many remembered images a reference ``(1, 3, H, W)`` has become; ``augment`` does with an
        image what is done with those under inspection. Where only a region of them is looked at, variants must show it
        ``in_place``: they are not mirrored or cut.
        """
        argument = "references" if self.from_references else "calibration"
        normals = (augment(read_reference(file, argument)) for file in files)
        if self.from_references:
            scores = self._of_references(list(normals), tiles, score, in_place=in_place)
        else:
            scores = [score(image, ()) for image in normals]
        # In double precision on the host: not every accelerator has it.
        images, pixels = (
            torch.stack(values).float().cpu().numpy().astype(np.float64) for values in zip(*scores, strict=True)
        )
        share = [1.0 - self.false_positive_rate]
        return Thresholds(float(hdquantiles(images, share)[0]), float(hdquantiles(pixels, share)[0]))

    def _of_references(
        self, images: Sequence[Tensor], tiles: Callable[[Tensor], int], score: Score, *, in_place: bool
    ) -> list[tuple[Tensor, Tensor]]:
        ends = np.cumsum([tiles(image) for image in images]).tolist()
        single = len(images) == 1
        held_out = [() if single else range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        taken = list(range(len(images)))
        if self.contamination:
            highest = [score(image, without)[1] for image, without in zip(images, held_out, strict=True)]
            taken = likely_good(torch.stack(highest), self.contamination)
        number = max(_LEAST_VARIANTS, math.ceil((self.least + 1) / len(taken)))
        scores = []
        for place in taken:
            seeds = [(self.seed, place, one) for one in range(number)]
            variants = (light_variant(images[place], seed, cut=single, in_place=in_place) for seed in seeds)
            scores += [score(image, held_out[place]) for image in (images[place], *variants)]
        return scores


def likely_good(statistics: Tensor, contamination: float) -> list[int]:
    """Places, ascending, of the images of which most are good where the share ``contamination`` is defective at most.

    They are those with the lowest map statistics ``(K,)``, each held out; the share that is left out is rounded up.
    """
    left_out = math.ceil(contamination * len(statistics) - 1e-9)
    return sorted(statistics.argsort(stable=True)[: max(1, len(statistics) - left_out)].tolist())


def light_variant(image: Tensor, seed: tuple[int, int, int], *, cut: bool = False, in_place: bool = False) -> Tensor:
    """The part ``(1, 3, H, W)`` in ``[0, 1]`` as another shot might show it: perhaps mirrored, lighter, with noise.

    Nothing is turned or shifted: interpolation blurs and invented borders break patterns, either of which a model may
    well take for a defect. With ``cut``, up to a seventh of the area is cut off at the border and the rest resized, so
    that no patch is the one it was. With ``in_place``, everything stays where it is. The same seed gives the same
    variant.
    """
    changes = [v2.ColorJitter(_BRIGHTNESS, _CONTRAST, _SATURATION), v2.GaussianNoise(sigma=_NOISE)]
    if not in_place:
        changes = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), *changes]
    if cut and not in_place:
        shape = (image.shape[-1] / image.shape[-2],) * 2
        changes.insert(0, v2.RandomResizedCrop(image.shape[-2:], (_KEPT, 1.0), shape, v2.InterpolationMode.BICUBIC))
    with seeded(int(np.random.SeedSequence(seed).generate_state(1)[0])):
        varied: Tensor = v2.Compose(changes)(image)
    return varied
