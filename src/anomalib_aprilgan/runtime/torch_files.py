"""Where tensors lie in a file that torch wrote, found without torch and without running anything in the file."""

from __future__ import annotations

import errno
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..checks import shown

Content = Any  # containers, places of tensors, inert objects
_HARMLESS = {"OrderedDict": OrderedDict, "set": set, "frozenset": frozenset, "dict": dict, "list": list}


class Place(NamedTuple):
    """Where the values of a tensor lie: a record of the archive, bytes before the first one, how many there are."""

    record: str
    start: int
    number: int


class Inert:
    """Stands for any object of a pickle: it keeps its state and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Inert:
        """An object without a state yet."""
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        """Keep the state."""
        self.state = state

    def __setitem__(self, *_: object) -> None:
        """Nothing: for what is pickled as a mapping."""

    def append(self, *_: object) -> None:
        """Nothing: for what is pickled as a list."""

    def extend(self, *_: object) -> None:
        """Nothing: see ``append``."""


class _Reader(pickle.Unpickler):
    """Reads a pickle into plain containers, places of tensors and inert objects."""

    def __init__(self, file: IO[bytes], prefix: str) -> None:
        super().__init__(file)
        self._prefix = prefix

    def find_class(self, module: str, name: str) -> object:
        """What stands for a class or function: never the thing itself, but for containers."""
        if module in {"collections", "builtins"} and name in _HARMLESS:
            return _HARMLESS[name]
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _place
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda place, *_: place
        if module == "torch" and name.endswith("Storage"):
            return name
        return type(name, (Inert,), {})

    def persistent_load(self, pid: Sequence[str]) -> tuple[str, str]:
        """The record and type of a storage."""
        _, kind, key, *_ = pid
        return f"{self._prefix}data/{key}", str(kind)


_WIDTHS = {"FloatStorage": 4, "BoolStorage": 1}


def _place(storage: tuple[str, str], offset: int, size: tuple[int, ...], *_: object) -> Place | None:
    record, kind = storage
    if kind not in _WIDTHS or len(size) != 1:
        return None  # none of the values
    return Place(record, offset * _WIDTHS[kind], size[0])


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive that ``torch.save`` wrote; a ValueError where it is none, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Exception as error:  # whatever zipfile and pickle say of a damaged file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a full disk, no permission
            raise
        msg = f"{path} is no file that torch wrote, or is damaged ({shown(str(error), 200)})."
        raise ValueError(msg) from error


def read_content(path: Path) -> Content:
    """What a file of ``torch.save`` holds, tensors as their places; a ValueError where it is none."""
    with _archive(path) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith("data.pkl"))
        with archive.open(name) as file:
            return _Reader(file, name.removesuffix("data.pkl")).load()


def read_bytes(path: Path, place: Place, width: int) -> bytes:
    """The bytes of the values of a tensor, so many each; a ValueError where there are fewer."""
    with _archive(path) as archive, archive.open(place.record) as file:
        file.seek(place.start)
        content = file.read(width * place.number)
        if len(content) != width * place.number:
            msg = f"{place.record} ends too early"
            raise ValueError(msg)
        return content


def copy_with(path: Path, target: IO[bytes], changes: Mapping[Place, bytes]) -> None:
    """Write the archive anew, with other bytes at these places; all else stays as it is. Errors as ``read_bytes``."""
    with _archive(path) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as new:
        for entry in archive.infolist():
            own = {place: content for place, content in changes.items() if place.record == entry.filename}
            info = zipfile.ZipInfo(entry.filename, entry.date_time)
            with archive.open(entry) as old, new.open(info, "w", force_zip64=entry.file_size > 2**31) as file:
                if not own:
                    shutil.copyfileobj(old, file, 2**20)
                    continue
                content = bytearray(old.read())
                for place, changed in own.items():
                    content[place.start : place.start + len(changed)] = changed
                file.write(content)
