"""Drawn inspection data on disk in MVTec AD's layout, and the datamodule over it.

Nothing is downloaded: the pictures are drawn on first use by
``anomalib_aprilgan.demo.drawing``, so that a run needs no data set and every mask is exact.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from torchvision.transforms.v2 import Transform

from ..checks import (
        check_bool,
    check_choice,
    check_loaders,
    check_optional,
    check_share,
    check_text,
)  # fmt: skip
from .drawing import CATEGORIES, DEFECTS, OBJECTS, TEXTURES, write_category
from .drawing.folder import select

__all__ = ["CATEGORIES", "DEFECTS", "OBJECTS", "TEXTURES", "DrawnInspection", "write_category"]


class DrawnInspection(AnomalibDataModule):
    """Datamodule of procedurally drawn products with exact defect masks.

    The pictures are drawn into ``dataset_root`` on first use and found there later. One
    ``seed`` and ``category`` is one product: its colours and style stay, while pose, light
    and fine structure change from picture to picture.

    Args:
        root: Folder for all drawn data sets.
        category: One of ``CATEGORIES``.
        image_size: Side of the square pictures in pixels, in [32, 1024]; or height and width, alike, which is what
            anomalib's ``get_datamodule`` makes of a number.
        num_train: Number of good training pictures.
        num_test: Number of good test pictures, and again of defective ones, spread evenly over the defects.
        seed: Number of the product; also the seed of anomalib's splits.
        defects: Some of ``DEFECTS``; all of them if None.
        random_style: Draw a new product for each picture, for pre-training over many products.
        train_batch_size: Pictures per training batch.
        eval_batch_size: Pictures per validation and test batch.
        num_workers: Worker processes of each dataloader.
        train_augmentations: Transform of the training pictures.
        val_augmentations: Transform of the validation pictures.
        test_augmentations: Transform of the test pictures.
        augmentations: Transform where the one of the stage is not given.
        test_split_mode: How anomalib makes the test set.
        test_split_ratio: Share of the pictures for testing, where the mode needs one.
        val_split_mode: How anomalib makes the validation set.
        val_split_ratio: Share of the pictures for validation, where the mode needs one.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/DrawnInspection",
        category: str = "tile",
        *,
        image_size: int | tuple[int, int] = 128,
        num_train: int = 20,
        num_test: int = 20,
        seed: int = 0,
        defects: list[str] | None = None,
        random_style: bool = False,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        test_split_ratio: float = 0.2,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
    ) -> None:
        check_loaders(train_batch_size=train_batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers)
        check_bool("random_style", random_style)
        for name, of_stage in (
            ("train_augmentations", train_augmentations),
            ("val_augmentations", val_augmentations),
            ("test_augmentations", test_augmentations),
            ("augmentations", augmentations),
        ):
            check_optional(name, of_stage, Transform, "a transform of torchvision")
        check_choice("test_split_mode", test_split_mode, [mode.value for mode in TestSplitMode])
        check_choice("val_split_mode", val_split_mode, [mode.value for mode in ValSplitMode])
        check_share("test_split_ratio", test_split_ratio)
        check_share("val_split_ratio", val_split_ratio)
        root = check_text("root", root, "a folder")
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.selection = select(
            category,
            image_size=_side(image_size),
            num_train=num_train,
            num_test=num_test,
            seed=seed,
            defects=defects,
            random_style=random_style,
        )
        self.root = Path(root)
        self.category = category

    @property
    def dataset_root(self) -> Path:
        """Folder of this selection of pictures in MVTec AD's layout; the category's folder lies in it."""
        return self.root / self.selection.name

    def prepare_data(self) -> None:
        """Draws the category unless it is there already.

        Raises:
            NotADirectoryError: A file lies where a folder is needed.
            OSError: The folder cannot be written.
        """
        write_category(
            self.root,
            self.category,
            image_size=self.selection.image_size,
            num_train=self.selection.num_train,
            num_test=self.selection.num_test,
            seed=self.selection.seed,
            defects=self.selection.defects,
            random_style=self.selection.random_style,
        )

    def _setup(self, _stage: str | None = None) -> None:
        if not (self.dataset_root / self.category).is_dir():
            msg = f"No pictures in {self.dataset_root / self.category}; call `prepare_data()` before `setup()`."
            raise RuntimeError(msg)
        self.train_data = MVTecADDataset(split=Split.TRAIN, root=self.dataset_root, category=self.category)
        self.test_data = MVTecADDataset(split=Split.TEST, root=self.dataset_root, category=self.category)


def _side(image_size: int | tuple[int, int]) -> int:
    """The side of a square; anything else is left for the drawing to refuse."""
    if isinstance(image_size, Sequence) and len(image_size) == 2 and image_size[0] == image_size[1]:
        return image_size[0]
    return cast("int", image_size)
