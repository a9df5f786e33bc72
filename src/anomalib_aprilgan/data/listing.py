"""What lies in datamodules and loaders: data sets, the files behind them, and their classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os.path import commonpath
from pathlib import Path

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
    """Paths of the images in data sets and loaders, as batches name them; none of what does not tell its files."""
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


def common_folder(data: object) -> Path | None:
    """The folder that all files lie in which :func:`listed_files` lists; ``None`` where there are none."""
    folders = {Path(file).absolute().parent for file in listed_files(data)}
    return Path(commonpath(folders)) if folders else None


def tells_classes(loaders: object) -> bool:
    """Whether the images of a loader, or of any in a list or dictionary of them, come with their class names."""
    datasets = [getattr(loader, "dataset", None) for loader in entries(loaders)]
    return any("class_name" in getattr(dataset, "samples", ()) for dataset in datasets)


def class_name_of(module: AnomalibDataModule) -> str:
    """The class of a datamodule's images: its category, else the name that the user gave, else "object"."""
    return module.category or ("object" if module.name == type(module).__name__ else module.name)
