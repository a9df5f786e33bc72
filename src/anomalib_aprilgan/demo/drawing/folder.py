"""Drawn pictures on disk, in the layout of MVTec AD."""

import shutil
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...files import temporary_name
from .catalogue import DEFECTS
from .draws import Draws
from .product import check_drawing, draw_good, draw_twins

# Part of a selection's name: raise it when a change in the drawing changes pictures.
DRAWING_VERSION = 1
# Pictures of train, good test and each defect kind come from disjoint ranges of indices, so
# that asking for more of one leaves the others as they are.
_RANGE = 1_000_000
_PNG_LEVEL = 6


@dataclass(frozen=True)
class Selection:
    """Which pictures make up a data set.

    Args:
        image_size: Side of the square pictures in pixels, in [32, 1024].
        num_train: Number of good training pictures.
        num_test: Number of good test pictures, and again of defective ones.
        seed: Number of the product.
        defects: Some of ``DEFECTS``, in that order and once each.
        random_style: A new product in each picture.
    """

    image_size: int
    num_train: int
    num_test: int
    seed: int
    defects: tuple[str, ...]
    random_style: bool

    @property
    def name(self) -> str:
        """Folder name that differs for every selection."""
        parts = [
            f"v{DRAWING_VERSION}",
            f"{self.image_size}px",
            f"seed{self.seed}",
            f"train{self.num_train}",
            f"test{self.num_test}",
        ]
        if self.defects != DEFECTS:
            parts.append(f"defects{zlib.crc32(','.join(self.defects).encode()):08x}")
        if self.random_style:
            parts.append("random")
        return "_".join(parts)

    def counts(self, category: str) -> dict[str, int]:
        """How many pictures of each defect: equal numbers, what is left over to kinds drawn by the seed."""
        order = np.argsort(Draws(self.seed, category, "defects").array(len(DEFECTS)), kind="stable")
        kinds = [DEFECTS[place] for place in order if DEFECTS[place] in self.defects]
        counts = {kind: (self.num_test + len(kinds) - 1 - rank) // len(kinds) for rank, kind in enumerate(kinds)}
        return {kind: counts[kind] for kind in sorted(counts) if counts[kind]}

    def files(self, category: str) -> set[str]:
        """Relative paths of all files of a category."""
        files = {f"train/good/{number:03d}.png" for number in range(self.num_train)}
        files |= {f"test/good/{number:03d}.png" for number in range(self.num_test)}
        for kind, count in self.counts(category).items():
            files |= {f"test/{kind}/{number:03d}.png" for number in range(count)}
            files |= {f"ground_truth/{kind}/{number:03d}_mask.png" for number in range(count)}
        return files


def select(
    category: str,
    *,
    image_size: int,
    num_train: int,
    num_test: int,
    seed: int,
    defects: Sequence[str] | None,
    random_style: bool,
) -> Selection:
    """Checks the arguments of a data set and collects them.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_drawing(category, seed, 0, image_size)
    for name, number in (("num_train", num_train), ("num_test", num_test)):
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= _RANGE:
            msg = f"`{name}` must be an int in [1, {_RANGE}] (a number of pictures), got {number!r}."
            raise ValueError(msg)
    kinds = DEFECTS if defects is None else defects
    is_list = isinstance(kinds, Sequence) and not isinstance(kinds, (str, bytes)) and len(kinds) > 0
    if not is_list or any(not isinstance(kind, str) or kind not in DEFECTS for kind in kinds):
        msg = f"`defects` must be None or a list of some of {', '.join(DEFECTS)}, got {defects!r}."
        raise ValueError(msg)
    ordered = tuple(kind for kind in DEFECTS if kind in kinds)
    return Selection(image_size, num_train, num_test, seed, ordered, random_style)


def write_category(
    root: Path | str,
    category: str,
    *,
    image_size: int = 128,
    num_train: int = 20,
    num_test: int = 20,
    seed: int = 0,
    defects: Sequence[str] | None = None,
    random_style: bool = False,
) -> Path:
    """Writes one category in MVTec AD's layout, all of it or nothing.

    The pictures are drawn into a hidden folder beside the final one, which then gets its name
    in one step. Of two processes at the same time the later one drops its copy. A folder that
    lacks pictures is replaced; a complete one is left as it is.

    Args:
        root: Folder for all drawn data sets. Each selection of pictures gets a folder of its own in it.
        category: One of ``CATEGORIES``.
        image_size: Side of the square pictures in pixels, in [32, 1024].
        num_train: Number of good training pictures.
        num_test: Number of good test pictures, and again of defective ones, spread evenly over the defects.
        seed: Number of the product.
        defects: Some of ``DEFECTS``; all of them if None.
        random_style: A new product in each picture.

    Returns:
        The folder of the category, ``root / <selection> / category``.

    Raises:
        ValueError: An argument is out of its range.
        NotADirectoryError: A file lies where a folder is needed.
        OSError: The folder cannot be written.
    """
    selection = select(
        category,
        image_size=image_size,
        num_train=num_train,
        num_test=num_test,
        seed=seed,
        defects=defects,
        random_style=random_style,
    )
    target = Path(root) / selection.name / category
    expected = selection.files(category)
    if _is_complete(target, expected):
        return target
    draft = temporary_name(target.parent)
    try:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(target)
        draft.mkdir(parents=True)
        _draw_into(draft, category, selection)
        _publish(draft, target, expected)
    except (FileExistsError, NotADirectoryError) as error:
        msg = f"A file lies where the folder {target} is needed; move it away or choose another `root`."
        raise NotADirectoryError(msg) from error
    except OSError as error:
        msg = f"Cannot write the drawn pictures to {target} ({error}); make room there or choose another `root`."
        raise type(error)(msg) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _draw_into(folder: Path, category: str, selection: Selection) -> None:
    """Draws and saves all pictures of a category."""
    seed, size, random_style = selection.seed, selection.image_size, selection.random_style
    for subset, count, first in (("train", selection.num_train, 0), ("test", selection.num_test, _RANGE)):
        goods = folder / subset / "good"
        goods.mkdir(parents=True)
        for number in range(count):
            picture = draw_good(category, seed, first + number, size, random_style=random_style)
            _save(picture, goods / f"{number:03d}.png")
    for kind, count in selection.counts(category).items():
        bads, masks = folder / "test" / kind, folder / "ground_truth" / kind
        bads.mkdir()
        masks.mkdir(parents=True)
        first = _RANGE * (2 + DEFECTS.index(kind))
        for number in range(count):
            twins = draw_twins(category, seed, first + number, kind, size, random_style=random_style)
            _save(twins.bad, bads / f"{number:03d}.png")
            _save(twins.mask.astype(np.uint8) * np.uint8(255), masks / f"{number:03d}_mask.png")


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(pixels).save(path, compress_level=_PNG_LEVEL)


def _is_complete(target: Path, expected: set[str]) -> bool:
    """Whether all expected files are there; more do no harm."""
    if not target.is_dir():
        return False
    return expected <= {
        path.relative_to(target).as_posix() for path in target.rglob("*.png") if path.stat().st_size > 0
    }


def _publish(draft: Path, target: Path, expected: set[str]) -> None:
    """Gives a finished folder its name, unless another process was faster."""
    for _ in range(3):
        try:
            draft.rename(target)
        except OSError:
            if _is_complete(target, expected):
                return
            if not target.is_dir():
                raise
            # Left incomplete by a crash or a deletion: out of the way with it.
            leftover = temporary_name(target.parent)
            with suppress(FileNotFoundError):  # another process was faster
                target.rename(leftover)
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            return
    msg = "another process puts incomplete folders there"
    raise OSError(msg)
