"""The model's arguments, checked before anything is loaded, as plain data that a checkpoint can hold."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .checks import SEED_LIMIT, check_bool, check_choice, check_int, check_list, check_number, check_text, shown
from .clip.architecture import ClipArchitecture, check_stages
from .clip.hub import check_hub_source, is_on_hub
from .clip.prompts import PromptEnsemble
from .clip.vision_tower import TowerArchitecture
from .data.pre_processing import aspect_size
from .data.references import OneClass, References
from .data.roi import PlainRoi
from .decision.calibration import Calibration
from .decision.fusion import FUSIONS, check_top_share
from .network import SCORERS
from .network.scoring import smoothing_radius
from .remembering import Remembering
from .tile_layout import check_tiles

# Longest side of the model's image: attention over all patches of a larger one fits into no memory.
MAX_SIDE = 4096
_LEAST_TILE, _MOST_OVERLAP = 16, 0.9
PlainPaths = dict[str, str | list[str]] | list[str] | str


@dataclass(frozen=True)
class Settings:
    """What the user asked for; the arguments are described in ``anomalib_aprilgan.AprilGAN``."""

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
    temperature: float | Literal["model"]
    memory_tower: TowerArchitecture | None
    memory_pretrained: str | None
    remembering: Remembering
    roi: PlainRoi | None = None
    kept_features: str | None = None

    def __post_init__(self) -> None:
        """Raise if arguments are out of range or do not go together."""
        check_int("seed", self.seed, 0, SEED_LIMIT - 1)
        check_bool("class_aliases", self.class_aliases)
        check_choice("few_shot", self.few_shot, SCORERS)
        if self.memory_tower is not None and self.few_shot != "memory_bank":
            msg = f"`memory_backbone` is for `few_shot='memory_bank'`, got {shown(self.few_shot)}."
            raise ValueError(msg)
        if self.memory_tower is None and self.memory_pretrained is not None:
            msg = "`memory_pretrained` are the weights of a `memory_backbone`, and none is given."
            raise ValueError(msg)
        check_choice("score_fusion", self.score_fusion, FUSIONS)
        check_top_share(self.top_share)
        expected = 'a number above 0 and at most 10000, or "model"'
        if self.temperature != "model" and not 0.0 < check_number("temperature", self.temperature, expected) <= 1e4:
            msg = f"`temperature` must be {expected}, got {self.temperature}."
            raise ValueError(msg)
        _check_maps(self.smoothing_sigma, self.neighbourhood, self.architecture.image_size)
        if self.tile_size is not None:
            check_int("tile_size", self.tile_size, _LEAST_TILE, hint=" pixels")
        check_tiles(self.tile_size or _LEAST_TILE, self.tile_overlap)
        if self.tile_overlap > _MOST_OVERLAP:
            msg = f"`tile_overlap` must be at most {_MOST_OVERLAP} (tiles would be too many), got {self.tile_overlap}."
            raise ValueError(msg)
        Calibration([] if self.calibration is None else self.calibration, self.false_positive_rate)
        self._check_references()
        for words in (self.words or {}).values():
            self.prompts.sentences(words)  # raises if they are empty
        if self.default_class is not None:
            check_text("default_class", self.default_class, "the name of a class")
            if self.default_class not in (self.words or {}):
                names, given = None if self.words is None else list(self.words), self.default_class
                msg = f"`default_class` must be one of the classes in `class_name` ({names}), got {shown(given)}."
                raise ValueError(msg)

    def _check_references(self) -> None:
        if check_int("k_shot", self.k_shot, -SEED_LIMIT) < 0:
            msg = f"`k_shot` must be 0 (zero-shot) or more, got {self.k_shot}."
            raise ValueError(msg)
        if self.references is not None and not self.k_shot:
            msg = "`references` are given but `k_shot` is 0. Set `k_shot` to the number of them to use."
            raise ValueError(msg)
        self.remembering.check(self.few_shot, self.tile_size, self.k_shot, has_references=self.references is not None)
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
        return Calibration(self.calibration, self.false_positive_rate, self.seed, self.remembering.allowed)


def architecture_of(
    backbone: str,
    quick_gelu: bool | None,
    image_size: int | tuple[int, int],
    aspect_ratio: float | None,
    tile_size: int | None,
) -> ClipArchitecture:
    """The CLIP that the arguments ask for, at its image size; see ``ClipArchitecture.load``."""
    if quick_gelu is not None:
        check_bool("quick_gelu", quick_gelu)
    size = height_and_width(image_size)
    if aspect_ratio is not None:
        size = _size_of_shape(image_size, aspect_ratio, tile_size, backbone)
    return ClipArchitecture.load(backbone, size, quick_gelu)


def memory_of(
    memory_backbone: str | None,
    memory_image_size: tuple[int, int] | None,
    memory_stages: Sequence[int] | Literal["auto"] | None,
    architecture: ClipArchitecture,
    tapped: tuple[int, ...],
) -> tuple[TowerArchitecture | None, tuple[int, ...]]:
    """The vision tower of the memory bank, ``None`` for CLIP's own, and its stages.

    By default they are those of ``tapped``, or the last one of a tower of its own.
    """
    if memory_backbone is None:
        if memory_image_size is not None:
            msg = "`memory_image_size` is that of a `memory_backbone`, and none is given."
            raise ValueError(msg)
        stages = tapped if memory_stages is None else architecture.check_stages(memory_stages, "memory_stages")
        return None, stages
    exact = memory_image_size is not None
    tower = TowerArchitecture.load(memory_backbone, memory_image_size or architecture.image_size, exact=exact)
    depth = len(tower.shapes)
    return tower, check_stages(memory_stages or [depth], depth, tower.name, "memory_stages")


def height_and_width(image_size: int | Sequence[int], argument: str = "image_size") -> tuple[int, int]:
    """Height and width in pixels, of a square or as they are; an error for other than one or two sides."""
    if isinstance(image_size, int):
        sides: list[object] = [image_size, image_size]
    else:
        sides = check_list(argument, image_size, "one side, or height and width, in pixels")
    if len(sides) != 2:
        msg = f"`{argument}` must be one side, or height and width, got {shown(tuple(sides))}."
        raise ValueError(msg)
    height, width = (check_int(argument, side, 1, MAX_SIDE, " pixels") for side in sides)
    return height, width


def source_of(argument: str, value: object) -> str:
    """A name or path as plain text."""
    return check_text(argument, value, "a name or a path")


def optional_source(argument: str, value: object) -> str | None:
    """A name or path as plain text, or ``None``."""
    return None if value is None else source_of(argument, value)


def adapters_of(value: object) -> str | None:
    """Where adapters are from, as plain text; ``None`` for fresh ones."""
    if value is None:
        return None
    source = source_of("adapters", value)
    if is_on_hub(source):
        check_hub_source("adapters", source)
    return source


def numbers_of(argument: str, value: object) -> tuple[int, ...] | Literal["auto"]:
    """Stages as a tuple, or "auto"; ``ClipArchitecture.check_stages`` says which there are."""
    if isinstance(value, str) and value == "auto":
        return "auto"
    return tuple(check_int(argument, entry, -SEED_LIMIT) for entry in check_list(argument, value, "a list of blocks"))


def plain_paths(paths: References | None, argument: str = "references") -> PlainPaths | None:
    """Paths as a checkpoint can hold them: as text; an error for empty ones, which would mean the working folder."""
    if paths is None:
        return None
    if isinstance(paths, Mapping):
        if not paths:
            msg = f"`{argument}` must have an entry for every class, got none."
            raise ValueError(msg)
        what = "the name of a class"
        return {check_text(argument, name, what): _plain(argument, given) for name, given in paths.items()}
    return _plain(argument, paths)


def _plain(argument: str, paths: OneClass) -> str | list[str]:
    what = "a folder or a list of image files"
    if isinstance(paths, (str, os.PathLike)):
        return check_text(argument, paths, what)
    return [check_text(argument, path, what) for path in check_list(argument, paths, what)]


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
    expected = "the images' width / height, above 0"
    if not 0.0 < check_number("aspect_ratio", aspect_ratio, expected) < math.inf:
        msg = f"`aspect_ratio` must be {expected}, got {aspect_ratio}."
        raise ValueError(msg)
    square = ClipArchitecture.load(backbone, (image_size, image_size), None)  # raises if patches do not tile the side
    return aspect_size((1.0, aspect_ratio), image_size, square.stride)


def _check_maps(smoothing_sigma: float, neighbourhood: int, size: tuple[int, int]) -> None:
    expected = "0 (no smoothing) or more pixels"
    if check_number("smoothing_sigma", smoothing_sigma, expected) < 0.0:
        msg = f"`smoothing_sigma` must be {expected}, got {smoothing_sigma}."
        raise ValueError(msg)
    if smoothing_sigma and smoothing_radius(smoothing_sigma) >= min(size):
        msg = (
            f"`smoothing_sigma` reaches four times as far, which must be within the map of {size[0]} x {size[1]} "
            f"pixels: it must be below {(min(size) - 0.5) / 4.0:g}, got {smoothing_sigma}."
        )
        raise ValueError(msg)
    check_int("neighbourhood", neighbourhood, -MAX_SIDE, MAX_SIDE)
    if neighbourhood < 1 or neighbourhood % 2 == 0:
        msg = f"`neighbourhood` must be an odd number of patches, 1 for each patch alone, got {neighbourhood}."
        raise ValueError(msg)
