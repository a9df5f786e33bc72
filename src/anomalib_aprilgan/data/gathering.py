"""What datamodules over other datamodules share: which ones, where their data come from, and one set-up for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from anomalib.data import AnomalibDataModule, MVTecAD, Visa
from anomalib.data.datamodules.image.visa import VISA_CATEGORIES
from anomalib.data.datasets.image.mvtecad import CATEGORIES as MVTEC_AD_CATEGORIES
from torchvision.transforms.v2 import Transform

_DATASETS: dict[str, tuple[Callable[..., AnomalibDataModule], tuple[str, ...]]] = {
    "mvtec": (MVTecAD, MVTEC_AD_CATEGORIES),
    "visa": (Visa, VISA_CATEGORIES),
}


def class_name_of(module: AnomalibDataModule) -> str:
    """The class of a datamodule's images, for training, prompts, references and metrics alike.

    It is the datamodule's category; without one the name that the user gave it; and "object" where its name is only
    that of its type.
    """
    if module.category:
        return module.category
    return "object" if module.name == type(module).__name__ else module.name


class GatheredData(AnomalibDataModule):
    """Several datamodules as one; what is done with their data sets is up to the subclass's ``_setup``.

    Constructor arguments are those of :class:`AuxiliaryData` of the same names.

    Raises:
        ValueError: No data.
    """

    def __init__(
        self,
        dataset: str | None,
        root: str | Path | None,
        categories: list[str] | None,
        datamodules: list[AnomalibDataModule] | None,
        train_batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        train_augmentations: Transform | None = None,
    ) -> None:
        super().__init__(train_batch_size, eval_batch_size, num_workers, train_augmentations=train_augmentations)
        self.datamodules = [*_expand(dataset, root, categories), *(datamodules or [])]
        if not self.datamodules:
            msg = f"`dataset` must be one of {tuple(_DATASETS)}, or `datamodules` a list of datamodules; got neither."
            raise ValueError(msg)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of all images, each once."""
        return tuple(dict.fromkeys(class_name_of(module) for module in self._modules_read))

    @property
    def sources(self) -> dict[str, list[str]]:
        """Names of the data sets and their categories: the provenance of adapters, and what is compared with it."""
        sources: dict[str, list[str]] = {}
        for module in self.datamodules:
            sources.setdefault(module.name, []).extend([module.category] if module.category else [])
        return sources

    @property
    def _modules_read(self) -> list[AnomalibDataModule]:
        """All datamodules whose files are needed."""
        return self.datamodules

    def prepare_data(self) -> None:
        """Let every datamodule fetch or write its files."""
        for module in self._modules_read:
            module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Gather the images of all datamodules, once."""
        if not self._is_setup:
            self._setup(stage)
            self._is_setup = True
        self._update_augmentations()


def _expand(dataset: str | None, root: str | Path | None, categories: list[str] | None) -> list[AnomalibDataModule]:
    if dataset is None:
        if categories is not None:
            msg = "`categories` belong to `dataset`, which is not given; `datamodules` carry their own."
            raise ValueError(msg)
        return []
    if dataset not in _DATASETS:
        msg = f"`dataset` must be one of {tuple(_DATASETS)}, got {dataset!r}. Give others as `datamodules`."
        raise ValueError(msg)
    module, known = _DATASETS[dataset]
    unknown = sorted(set(categories or []) - set(known))
    if unknown:
        msg = f"`categories` must be out of {known}, got {unknown}."
        raise ValueError(msg)
    options = {} if root is None else {"root": root}
    return [module(category=category, **options) for category in categories or known]
