"""The files behind a trainer's loaders, in the order of the data."""

from __future__ import annotations

from anomalib.data import AnomalibDataset, PredictDataset
from torch.utils.data import DataLoader, Subset

from .reading_hooks import _entries


def listed_files(data: object) -> list[str]:
    """Paths of the images, in the order of the data, as batches name them in ``image_path``.

    Args:
        data: A data set, a ``Subset`` or ``ConcatDataset``, a loader, or a list or dictionary of these, such as
            ``trainer.predict_dataloaders``. What does not tell its files counts as having none.
    """
    files: list[str] = []
    for entry in _entries(data):
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
