"""What lies in loaders: data sets, and the files behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from anomalib.data import AnomalibDataModule, AnomalibDataset, PredictDataset
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, Subset


def entries(data: object) -> Iterator[object]:
    """What collections of any depth hold."""
    if isinstance(data, CombinedLoader):
        data = data.flattened
    elif isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        for entry in data:
            yield from entries(entry)
    else:
        yield data


def datasets_in(data: object) -> Iterator[object]:
    """Data sets at the bottom of loaders, subsets, concatenations and datamodules."""
    for entry in entries(data):
        if isinstance(entry, (DataLoader, Subset)):
            yield from datasets_in(entry.dataset)
        elif isinstance(entry, AnomalibDataModule):
            yield from datasets_in([getattr(entry, name, None) for name in ("train_data", "val_data", "test_data")])
        elif isinstance(parts := getattr(entry, "datasets", None), list):  # ConcatDataset, and ours of many categories
            yield from datasets_in(parts)
        elif isinstance(entry, Dataset):
            yield entry


def listed_files(data: object) -> list[str]:
    """Paths of the images, in the order of the data, as batches name them in ``image_path``.

    Args:
        data: A data set, a ``Subset`` or ``ConcatDataset``, a loader, or a list or dictionary of these, such as
            ``trainer.predict_dataloaders``. What does not tell its files counts as having none.
    """
    files: list[str] = []
    for entry in entries(data):
        if isinstance(entry, DataLoader):
            files += listed_files(entry.dataset)
        elif isinstance(entry, Subset):
            whole = listed_files(entry.dataset)
            files += [whole[index] for index in entry.indices] if whole else []
        elif isinstance(entry, PredictDataset):
            files += [str(path) for path in entry.image_filenames]
        elif isinstance(entry, AnomalibDataset):
            files += [str(path) for path in entry.samples.image_path]
        elif isinstance(parts := getattr(entry, "datasets", None), list):  # ConcatDataset
            files += listed_files(parts)
    return files
