"""The classes of a model: a name and words for each, and a row in everything that is kept per class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .checks import check_list, check_text, shown

# What a caller names classes by: one for all images, or one for each.
Names = str | Sequence[str] | None
_FIELDS = ("pred_score", "anomaly_map", "gt_label", "gt_mask")


@dataclass(frozen=True)
class Classes:
    """Names of ``N`` classes, and the words for each in the prompts. The place of a class is its row everywhere.

    ``default`` is the class of images that tell none.
    """

    names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    default: str | None = None

    @classmethod
    def of(cls, words: Mapping[str, str], default: str | None = None) -> Classes:
        """Classes from their words by name."""
        return cls(tuple(words), tuple(words.values()), default)

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)

    def rows(self, names: Sequence[str]) -> list[int]:
        """The row of each of these names; a ValueError for an unknown one where there is no default class."""
        unknown = sorted({name for name in names if name not in self.names})
        if unknown and self.default is None:
            msg = (
                f"{unknown[0]} belongs to none of the classes {self.names}. Name the folder of the images after the "
                "class, or set `default_class` to the class of all such images."
            )
            raise ValueError(msg)
        default = 0 if self.default is None else self.names.index(self.default)
        return [self.names.index(name) if name in self.names else default for name in names]

    def row(self, name: int | str) -> int:
        """The row of a name, or the row itself; a ValueError where there is no such class."""
        if name in self.names:
            return self.names.index(str(name))
        if isinstance(name, int) and 0 <= name < len(self):
            return name
        msg = f"`name` must be one of {', '.join(self.names)}, got {name!r}."
        raise ValueError(msg)

    def rows_for(
        self,
        class_name: Names,
        number: int,
        device: torch.device,
        class_index: Tensor | None = None,
    ) -> Tensor:
        """``(number,)`` rows for the class names that a caller gives: one for all images, or one for each.

        The caller may give the rows instead.

        Raises:
            ValueError: A name or row is unknown, their number is wrong, or none tells one of several classes.
        """
        if class_index is not None:
            return self._rows_given(class_name, number, device, class_index)
        if class_name is None:
            if len(self) > 1 and self.default is None:
                msg = f"`class_name` is needed to choose among the classes {self.names}, got None."
                raise ValueError(msg)
            rows = [0 if self.default is None else self.names.index(self.default)] * number
        else:
            names = [class_name] * number if isinstance(class_name, str) else class_name
            if len(names) != number:
                msg = f"`class_name` must be one name, or one for each of {number} images, got {len(names)} names."
                raise ValueError(msg)
            rows = self.rows(names)
        return torch.tensor(rows, dtype=torch.long, device=device)

    def _rows_given(
        self,
        class_name: object,
        number: int,
        device: torch.device,
        class_index: Tensor,
    ) -> Tensor:
        given: Any = class_index.tolist() if isinstance(class_index, Tensor) else class_index
        whole = isinstance(given, list) and all(type(row) is int and 0 <= row < len(self) for row in given)
        if class_name is not None or not whole or len(given) != number:
            msg = (
                f"`class_index` must be {number} whole numbers from 0 to {len(self) - 1}, the rows of {self.names}, "
                f"and `class_name` left out; got {shown(given)}."
            )
            raise ValueError(msg)
        return torch.tensor(given, dtype=torch.long, device=device)

    def default_row(self) -> int:
        """Row of the default class, or of the only one; a ValueError where there is neither."""
        if len(self) > 1 and self.default is None:
            msg = (
                f"An exported model serves one class: set `default_class` to one of {self.names}; export once for each."
            )
            raise ValueError(msg)
        return 0 if self.default is None else self.names.index(self.default)

    def of_row(self, row: int) -> Classes:
        """One of the classes alone."""
        return Classes(self.names[row : row + 1], self.words[row : row + 1])

    def kept_in(self, others: Classes) -> list[int | None]:
        """For every row of ``others`` the row of the class of that name here; the only class may change its name."""
        if len(self) == len(others) == 1:
            return [0]
        return [self.names.index(name) if name in self.names else None for name in others.names]


def words_by_name(class_name: Mapping[str, str] | Sequence[str] | None) -> dict[str, str] | None:
    """Words of the classes by name, from what a user gives; a ValueError for none, or the same name or words twice."""
    if class_name is None:
        return None
    what = "words for the object, a list of names, or a mapping from names to words"
    if isinstance(class_name, str):
        class_name = [class_name]
    given = class_name if isinstance(class_name, Mapping) else check_list("class_name", class_name, what)
    pairs = given.items() if isinstance(given, Mapping) else [(name, name) for name in given]
    words = {_text_of(name, what): _text_of(one, what) for name, one in pairs}
    for name in [*words, *words.values()]:
        if not name.isprintable():
            msg = f"`class_name` must be {what}, without line breaks or control characters, got {shown(name)}."
            raise ValueError(msg)
    if not words:
        msg = "`class_name` must name at least one class, got none."
        raise ValueError(msg)
    if len(words) < len(class_name):
        msg = f"`class_name` must not repeat a name, got {list(class_name)}."
        raise ValueError(msg)
    for one in words.values():
        same = [name for name in words if words[name].strip().lower() == one.strip().lower()]
        if len(same) > 1:
            msg = f"`class_name` has the same words {one!r} for {' and '.join(same)}. Give each its own."
            raise ValueError(msg)
    return words


def _text_of(name: object, what: str) -> str:
    if isinstance(name, str) and not name.strip():
        msg = f"`class_name` must name an object, got {name!r}. Try 'object' if nothing better is known."
        raise ValueError(msg)
    return check_text("class_name", name, what)


def class_of_file(path: str, known: Sequence[str], root: Path | None) -> str:
    """The known class that the nearest folder of a file is named after, or the path itself where no folder tells.

    Only folders from the root of the data down count, where it is known: one above says nothing about an image.
    """
    folders = [folder for folder in Path(path).absolute().parents if root is None or folder.is_relative_to(root)]
    return next((folder.name for folder in folders if folder.name in known), str(path))


def rows_of_batch(classes: Classes, batch: Any, name: str | None, root: Path | None) -> Tensor:  # noqa: ANN401  # with or without class names
    """``(B,)`` the row of each image's class, told by the batch, by the data's name, or by a folder below the root.

    Raises:
        ValueError: Nothing tells the class of an image, and there is no default one.
    """
    if len(classes) <= 1:
        return torch.zeros(batch.batch_size, dtype=torch.long, device=batch.image.device)
    names = getattr(batch, "class_name", None)
    if names is None:
        names = classes_of_files(classes, batch.image_path or [""] * batch.batch_size, name, root)
    return torch.tensor(classes.rows(names), dtype=torch.long, device=batch.image.device)


def classes_of_files(classes: Classes, paths: Sequence[str], name: str | None, root: Path | None) -> list[str]:
    """The class of each file: the data's name where that is a class, else what ``class_of_file`` finds."""
    # An image without a path has no folder: the one of this program says nothing.
    return [name if name in classes.names else path and class_of_file(path, classes.names, root) for path in paths]


def names_of(module: object) -> tuple[str, ...]:
    """Names of the classes of a model; none for a model that knows no classes."""
    names: tuple[str, ...] = getattr(getattr(module, "classes", None), "names", ())
    return names


def rows_of(module: object, batch: Any) -> Tensor:  # noqa: ANN401  # any model's batch
    """``(B,)`` the row of each image's class; row 0 for a model that knows no classes."""
    find: Callable[[Any], Tensor] | None = getattr(module, "rows_of", None)
    return torch.zeros(batch.batch_size, dtype=torch.long) if find is None else find(batch)


def images_of_row(batch: object, rows: Tensor, row: int) -> Any:  # noqa: ANN401  # has the fields of a batch
    """The predictions and truths of the images of one class, under the names of a batch's fields."""
    chosen = (rows == row).nonzero().flatten()
    fields = {name: getattr(batch, name, None) for name in _FIELDS}
    return SimpleNamespace(**{name: None if value is None else value[chosen] for name, value in fields.items()})
