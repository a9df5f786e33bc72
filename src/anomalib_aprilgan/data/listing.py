"""What lies in datamodules and loaders: data sets, the files behind them, and their classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import NamedTuple

from anomalib.data import AnomalibDataModule, AnomalibDataset, PredictDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import Compose, Resize, Transform


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


class ListedFile(NamedTuple):
    """Path of an image as batches name it, and the class that its data set tells, if any."""

    path: str
    class_name: str | None = None


def named_files(data: object) -> list[ListedFile]:
    """The images in data sets and loaders; none of what does not tell its files."""
    files: list[ListedFile] = []
    for entry in entries(data):
        if isinstance(entry, DataLoader):
            files += named_files(entry.dataset)
        elif isinstance(entry, Subset):
            whole = named_files(entry.dataset)
            files += [whole[index] for index in entry.indices] if whole else []
        elif isinstance(entry, PredictDataset):
            files += [ListedFile(str(path)) for path in entry.image_filenames]
        elif isinstance(entry, AnomalibDataset):
            names = entry.samples.get("class_name", [None] * len(entry.samples))
            files += [ListedFile(str(path), name) for path, name in zip(entry.samples.image_path, names, strict=True)]
        elif isinstance(parts := getattr(entry, "datasets", None), list):  # ConcatDataset
            files += named_files(parts)
    return files


def listed_files(data: object) -> list[str]:
    """Paths of the images in data sets and loaders; see ``named_files``."""
    return [file.path for file in named_files(data)]


@dataclass(frozen=True)
class DataAtHand:
    """What a run knows of its images.

    ``root`` is the folder of all, ``augmentations`` what they go through before the model's own resize.
    """

    root: Path | None = None
    augmentations: Transform | None = None
    files: Sequence[ListedFile] = ()

    @classmethod
    def of(cls, loaders: object, pre_processor: object) -> DataAtHand:
        """What loaders tell."""
        return cls(common_folder(loaders), augmentations_of(loaders, pre_processor), named_files(loaders))


def augmentations_of(loaders: object, pre_processor: object) -> Transform | None:
    """What the images of loaders go through before the model's own resize, which anomalib puts at the end of it."""
    # By what they do: a checkpoint brings its own objects.
    resizes = {str(one) for one in extract_transforms_by_type(getattr(pre_processor, "transform", None), Resize)}
    for entry in entries(loaders):
        dataset = getattr(entry, "dataset", None)
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        given = getattr(dataset, "augmentations", None) or getattr(dataset, "transform", None)
        parts = list(given.transforms) if isinstance(given, Compose) else [given]
        own = [part for part in parts if part is not None and str(part) not in resizes]
        if own:
            return Compose(own)
    return None


def common_folder(data: object) -> Path | None:
    """The folder that all files lie in which ``listed_files`` lists; ``None`` where there are none."""
    folders = {Path(file).absolute().parent for file in listed_files(data)}
    return Path(commonpath(folders)) if folders else None


def tells_classes(loaders: object) -> bool:
    """Whether the images of a loader, or of any in a list or dictionary of them, come with their class names."""
    datasets = [getattr(loader, "dataset", None) for loader in entries(loaders)]
    return any("class_name" in getattr(dataset, "samples", ()) for dataset in datasets)


def class_name_of(module: AnomalibDataModule) -> str:
    """The class of a datamodule's images: its category, else the name that the user gave, else "object"."""
    return module.category or ("object" if module.name == type(module).__name__ else module.name)
