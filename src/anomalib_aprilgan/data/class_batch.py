"""Items and batches that know the class name of every image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from anomalib.data import ImageBatch, ImageItem


@dataclass
class ClassImageItem(ImageItem):
    """An image item with the words that stand for its object in the prompts."""

    class_name: str | None = None


@dataclass
class ClassImageBatch(ImageBatch):
    """A batch with a class name per image; collating keeps them as a list."""

    item_class: ClassVar[type[ClassImageItem]] = ClassImageItem
    class_name: list[str] | None = None
