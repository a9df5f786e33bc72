"""The model's arguments, checked before anything is loaded, as plain data that a checkpoint can hold."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .clip.architecture import ClipArchitecture
from .clip.prompts import PromptEnsemble
from .data.pre_processing import aspect_size
from .data.references import OneClass, References
from .decision.calibration import Calibration
from .decision.fusion import FUSIONS
from .network import SCORERS
from .network.scoring import smoothing_radius
from .network.tiling import check_tiles

PlainPaths = dict[str, str | list[str]] | list[str] | str


@dataclass(frozen=True)
class Settings:
    """What the user asked for; the arguments are described in :class:`~anomalib_aprilgan.AprilGAN`."""

    architecture: ClipArchitecture
    pretrained: str
    adapters: str | None
    stages: tuple[int, ...]
    memory_stages: tuple[int, ...]
    words: Mapping[str, str] | None
    default_class: str | None
    class_aliases: bool
    prompts: PromptEnsemble
    k_shot: int
    references: PlainPaths | None
    seed: int
    few_shot: str
    score_fusion: str
    tile_size: int | None
    tile_overlap: float
    smoothing_sigma: float
    neighbourhood: int
    top_share: float
    calibration: PlainPaths | None
    false_positive_rate: float

    def __post_init__(self) -> None:
        """Raise if arguments are out of range or do not go together."""
        _check_maps(self.smoothing_sigma, self.neighbourhood, self.architecture.image_size)
        if self.tile_size is not None:
            check_tiles(self.tile_size, self.tile_overlap)
        for argument, given, known in (
            ("few_shot", self.few_shot, SCORERS),
            ("score_fusion", self.score_fusion, FUSIONS),
        ):
            if given not in known:
                msg = f"`{argument}` must be one of {', '.join(known)}, got {given!r}."
                raise ValueError(msg)
        self._check_references()
        for words in (self.words or {}).values():
            self.prompts.sentences(words)  # raises if they are empty
        if self.default_class is not None and self.default_class not in (self.words or {}):
            names, given = None if self.words is None else list(self.words), self.default_class
            msg = f"`default_class` must be one of the classes in `class_name` ({names}), got {given!r}."
            raise ValueError(msg)

    def _check_references(self) -> None:
        if self.k_shot < 0:
            msg = f"`k_shot` must be 0 (zero-shot) or more, got {self.k_shot}."
            raise ValueError(msg)
        if self.references is not None and not self.k_shot:
            msg = "`references` are given but `k_shot` is 0. Set `k_shot` to the number of them to use."
            raise ValueError(msg)
        calibration = self.how_to_calibrate
        if calibration is not None and calibration.from_references and not self.k_shot:
            msg = (
                "`calibration='references'` needs `k_shot` and `references`. Without them calibrate with a folder of "
                f"at least {calibration.least} normal images, or another `false_positive_rate`."
            )
            raise ValueError(msg)

    @property
    def how_to_calibrate(self) -> Calibration | None:
        """How thresholds are found from normal images; ``None`` where that was not asked for."""
        if self.calibration is None:
            return None
        return Calibration(self.calibration, self.false_positive_rate, self.seed)


def architecture_of(
    backbone: str,
    quick_gelu: bool | None,
    image_size: int | tuple[int, int],
    aspect_ratio: float | None,
    tile_size: int | None,
) -> ClipArchitecture:
    """The CLIP that the arguments ask for, at its image size; see :meth:`ClipArchitecture.load`."""
    size = height_and_width(image_size)
    if aspect_ratio is not None:
        size = _size_of_shape(image_size, aspect_ratio, tile_size, backbone)
    return ClipArchitecture.load(backbone, size, quick_gelu)


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels, of a square or as they are; a ValueError for other than one or two sides."""
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2:
        msg = f"`image_size` must be one side, or height and width, got {sides}."
        raise ValueError(msg)
    return sides[0], sides[1]


def plain_paths(paths: References | None) -> PlainPaths | None:
    """Paths as a checkpoint can hold them: as text."""
    if paths is None:
        return None
    if isinstance(paths, Mapping):
        return {str(name): _plain(given) for name, given in paths.items()}
    return _plain(paths)


def _plain(paths: OneClass) -> str | list[str]:
    return str(paths) if isinstance(paths, (str, os.PathLike)) else [str(path) for path in paths]


def _size_of_shape(
    image_size: int | Sequence[int], aspect_ratio: float, tile_size: int | None, backbone: str
) -> tuple[int, int]:
    """Height and width in the shape of the images, at the cost of the square."""
    if not isinstance(image_size, int):
        msg = f"`aspect_ratio` needs an `image_size` of one number, got {tuple(image_size)}. Give one or the other."
        raise ValueError(msg)
    if tile_size is not None:
        msg = "`aspect_ratio` is the shape of whole images, and tiles are squares: give it or `tile_size`."
        raise ValueError(msg)
    if not 0.0 < aspect_ratio < math.inf:
        msg = f"`aspect_ratio` must be the images' width / height, above 0, got {aspect_ratio}."
        raise ValueError(msg)
    square = ClipArchitecture.load(backbone, (image_size, image_size), None)  # raises if patches do not tile the side
    return aspect_size((1.0, aspect_ratio), image_size, image_size // square.grid[0])


def _check_maps(smoothing_sigma: float, neighbourhood: int, size: tuple[int, int]) -> None:
    if not 0.0 <= smoothing_sigma < math.inf:
        msg = f"`smoothing_sigma` must be 0 (no smoothing) or more pixels, got {smoothing_sigma}."
        raise ValueError(msg)
    if smoothing_sigma and smoothing_radius(smoothing_sigma) >= min(size):
        msg = (
            f"`smoothing_sigma` reaches four times as far, which must be within the map of {size[0]} x {size[1]} "
            f"pixels: it must be below {(min(size) - 0.5) / 4.0:g}, got {smoothing_sigma}."
        )
        raise ValueError(msg)
    if isinstance(neighbourhood, bool) or not isinstance(neighbourhood, int):
        msg = f"`neighbourhood` must be an int, got {neighbourhood!r}."
        raise TypeError(msg)
    if neighbourhood < 1 or neighbourhood % 2 == 0:
        msg = f"`neighbourhood` must be an odd number of patches, 1 for each patch alone, got {neighbourhood}."
        raise ValueError(msg)
