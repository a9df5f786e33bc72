"""Evaluation and prediction over many categories at once: one model, one run, a table with a row for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule
from torch.utils.data import DataLoader

from .gathering import GatheredData, class_name_of
from .multi_category import MultiCategoryDataset


class MultiCategoryData(GatheredData):
    """The data of many categories as one: test images for evaluation and prediction, training images as references.

    Every image comes with its category, so that a model of several classes knows which one it is of.
    Validation is on the test images, as in anomalib's own datamodules of the same data.

    Args:
        dataset: ``"mvtec"`` or ``"visa"``: all its categories, read by anomalib's datamodules.
        root: Folder of that data set; anomalib's default otherwise.
        categories: Some of its categories; all otherwise.
        datamodules: Any anomalib datamodules instead of, or added to, ``dataset``.
        eval_batch_size: Images a step.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: No data, or two datamodules of the same category.
    """

    def __init__(
        self,
        dataset: str | None = None,
        root: str | Path | None = None,
        categories: list[str] | None = None,
        datamodules: list[AnomalibDataModule] | None = None,
        eval_batch_size: int = 8,
        num_workers: int = 8,
    ) -> None:
        super().__init__(dataset, root, categories, datamodules, eval_batch_size, eval_batch_size, num_workers)
        names = [class_name_of(module) for module in self.datamodules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            msg = f"`datamodules` must be of different categories, got {', '.join(twice)} more than once."
            raise ValueError(msg)

    def _setup(self, _stage: str | None = None) -> None:
        for module in self.datamodules:
            module.setup()
        self.train_data = MultiCategoryDataset([module.train_data for module in self.datamodules], self.datamodules)
        self.test_data = MultiCategoryDataset([module.test_data for module in self.datamodules], self.datamodules)
        self.val_data = self.test_data

    def train_dataloader(self) -> DataLoader[Any]:
        """Nothing is trained here.

        Raises:
            RuntimeError: Always; says what trains adapters.
        """
        msg = "`MultiCategoryData` is for evaluation and prediction. Adapters are trained on `AuxiliaryData`."
        raise RuntimeError(msg)
