"""A frozen vision tower of timm, without text: what a memory bank can compare images in instead of CLIP's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..checks import shown
from ..files import is_file
from ..recipe import digest_of_tensors
from .library import StageShape, set_input_size
from .state_dict import read_state_dict
from .weights import TIMM_FILES, find_published


@dataclass(frozen=True)
class TowerArchitecture:
    """A vision tower that timm knows by ``name``, at an image size (height, width in pixels)."""

    name: str
    image_size: tuple[int, int]

    @classmethod
    def load(cls, name: str, image_size: tuple[int, int], *, exact: bool) -> TowerArchitecture:
        """Tower of a timm name such as ``"vit_base_patch14_dinov2.lvd142m"``; a ValueError for one that is none.

        Its patches must tile the image where the size is ``exact``; else the nearest size that they tile is taken.
        """
        stride = _facts(name)[0]
        if exact and any(side % stride for side in image_size):
            msg = (
                f"`memory_image_size` must be a multiple of {name}'s patch of {stride} pixels, "
                f"got {image_size[0]} x {image_size[1]}."
            )
            raise ValueError(msg)
        height, width = (max(stride, round(side / stride) * stride) for side in image_size)
        found = cls(name, (height, width))
        if not found.shapes:
            raise _without_grid(name)
        return found

    @cached_property
    def shapes(self) -> tuple[StageShape, ...]:
        """Width and grid of every stage that can be tapped, the first one first."""
        with torch.device("meta"):
            tower = _build(self.name).eval()
            try:
                set_input_size(tower, self.image_size)
                return _shapes(tower, self.image_size, norm=self.normalises)
            except Exception as error:  # whatever a tower of timm says of a size
                config: Any = timm.get_pretrained_cfg(self.name)
                own = config.input_size[1:]
                msg = (
                    f"`memory_image_size`: {self.name} cannot take images of {self.image_size[0]} x "
                    f"{self.image_size[1]} pixels ({shown(str(error))}). Its own size is {own[0]} x {own[1]}."
                )
                raise ValueError(msg) from error

    @property
    def normalises(self) -> bool:
        """Whether stages go through the tower's last normalisation; some of timm's towers have none for them."""
        return _facts(self.name)[1]

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Channel means and standard deviations that images are normalised with."""
        config: Any = timm.get_pretrained_cfg(self.name)
        return tuple(config.mean), tuple(config.std)


@lru_cache(maxsize=32)
def _facts(name: str) -> tuple[int, bool]:
    """Pixels between two cells of a tower's coarsest grid, and whether its last normalisation is for stages, too.

    A ValueError for a name that timm does not know.
    """
    with torch.device("meta"):
        tower = _build(name).eval()
        config: Any = tower.pretrained_cfg
        size = tuple(config["input_size"][1:])
        norm = True
        try:
            shapes = _shapes(tower, size, norm=True)
        except AssertionError:  # how timm says that it has none
            shapes, norm = _shapes(tower, size, norm=False), False
    if not shapes:
        raise _without_grid(name)
    return int(size[0] // min(shape.grid[0] for shape in shapes)), norm


def _without_grid(name: str) -> ValueError:
    return ValueError(f"`memory_backbone`: {name} gives no grid of features to make a map of.")


def _build(name: str, **options: object) -> nn.Module:
    """A model of timm without classifier."""
    known = "://" not in name and ":" not in name and timm.is_model(name.partition(".")[0])
    if known and (not name.partition(".")[2] or name in timm.list_pretrained(f"{name.partition('.')[0]}.*")):
        create: Any = timm.create_model
        model: nn.Module = create(name, num_classes=0, **options)
        if not hasattr(model, "forward_intermediates"):
            raise _without_grid(name)
        return model
    similar = timm.list_pretrained(f"{name.partition('.')[0]}*")[:5] or ["vit_base_patch14_dinov2.lvd142m"]
    msg = f"`memory_backbone` must be a model of timm, such as {', '.join(similar)}, got {shown(name)}."
    raise ValueError(msg)


def _run(tower: nn.Module, images: Tensor, indices: list[int] | None, *, norm: bool) -> list[Tensor]:
    """Planes ``(B, C, h, w)``, after the tower's last normalisation or not, without class token and registers."""
    run: Any = tower
    planes: list[Tensor] = run.forward_intermediates(
        images, indices=indices, norm=norm, output_fmt="NCHW", intermediates_only=True
    )
    return planes


@torch.no_grad()
def _shapes(tower: nn.Module, image_size: tuple[int, int], *, norm: bool) -> tuple[StageShape, ...]:
    planes = _run(tower, torch.empty(1, 3, *image_size), None, norm=norm)
    if any(plane.ndim != 4 for plane in planes):
        return ()
    return tuple(StageShape(plane.shape[1], (plane.shape[2], plane.shape[3])) for plane in planes)


class VisionTower(nn.Module):
    """The tower with its weights, always in eval mode and without gradients for its parameters.

    ``digest`` is over the weights as they were given.
    """

    def __init__(self, architecture: TowerArchitecture, state_dict: dict[str, Tensor], source: str) -> None:
        super().__init__()
        self.architecture = architecture
        weights = {name: value.float() if value.is_floating_point() else value for name, value in state_dict.items()}
        try:
            overlay = {"state_dict": weights, "source": "", "num_classes": 0}
            self.trunk = _build(architecture.name, pretrained=True, pretrained_cfg_overlay=overlay)
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            msg = f"`memory_pretrained`: the weights of {source} are not those of {architecture.name}: {reason[:400]}"
            raise ValueError(msg) from error
        set_input_size(self.trunk, architecture.image_size)
        self.digest = digest_of_tensors(weights)
        self.requires_grad_(requires_grad=False)
        self.train(mode=False)

    def train(self, mode: bool = True) -> VisionTower:
        """Stay in eval mode: the tower is frozen."""
        del mode
        return super().train(mode=False)

    def forward(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Tokens ``(B, L, C)`` of stages, counted from 1, of normalised images ``(B, 3, H, W)``."""
        images = images.to(next(self.trunk.parameters()).dtype)
        if not torch.compiler.is_compiling() and not len(images):
            return [tokens[:0] for tokens in self(images.new_zeros(1, *images.shape[1:]), stages)]
        planes = _run(self.trunk, images, [stage - 1 for stage in stages], norm=self.architecture.normalises)
        return [plane.flatten(2).transpose(1, 2) for plane in planes]


def load_tower(architecture: TowerArchitecture, pretrained: str | None) -> VisionTower:
    """The tower with the weights of a file, or with those that timm publishes for ``None``.

    Weights that cannot be had are a FileNotFoundError, unfit ones a ValueError.
    """
    if pretrained is not None:
        path = Path(pretrained).expanduser()
        if not is_file(path):
            msg = f"`memory_pretrained`: no weight file {path}."
            raise FileNotFoundError(msg)
    else:
        config: Any = timm.get_pretrained_cfg(architecture.name)
        repository = f"{config.hf_hub_id}/" if config.hf_hub_id else ""
        if not (repository or config.url):
            msg = f"`memory_backbone`: timm publishes no weights of {architecture.name}: pass `memory_pretrained`."
            raise ValueError(msg)
        argument, url = f"`memory_backbone={architecture.name!r}`", config.url or ""
        remedy = "`memory_pretrained=/path/to/file`"
        path = find_published(url, repository, argument, architecture.name, remedy, TIMM_FILES)
    return VisionTower(architecture, read_state_dict(path, "memory_pretrained"), str(path))
