"""Which class an image is of, and the words that stand for it in the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def words_of_classes(class_name: Mapping[str, str] | Sequence[str] | None) -> dict[str, str] | None:
    """Names of the classes, and the words for each.

    Raises:
        ValueError: There are none, or two of the same name.
    """
    if class_name is None or isinstance(class_name, str):
        return None if class_name is None else {class_name: class_name}
    words = dict(class_name) if isinstance(class_name, Mapping) else {name: name for name in class_name}
    if not words:
        msg = "`class_name` must name at least one class, got none."
        raise ValueError(msg)
    if len(words) < len(class_name):
        msg = f"`class_name` must be different names, got {list(class_name)}."
        raise ValueError(msg)
    for said in words.values():
        same = [name for name in words if words[name].strip().lower() == said.strip().lower()]
        if len(same) > 1:
            msg = f"`class_name` has the same words {said!r} for {' and '.join(same)}. Give each its own."
            raise ValueError(msg)
    return {str(name): str(said) for name, said in words.items()}


def class_of_file(path: str, known: Sequence[str]) -> str:
    """The class that the nearest folder of a file is named after; the path itself where there is none."""
    return next((folder.name for folder in Path(path).absolute().parents if folder.name in known), str(path))
