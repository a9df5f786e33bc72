"""Files that appear whole or not at all, what killed runs leave of them, and which drawings are ours."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

import psutil

# What the drawings of results carry in their field "Software", so that no run inspects them.
SOFTWARE = "anomalib-aprilgan"
_LONGEST_NAME = 255  # bytes, on all common file systems
_ABANDONED_AFTER = 86400.0  # seconds, where it cannot be seen whether the writer still runs
_UNWRITABLE = {
    getattr(errno, name, None)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST", "EISDIR", "ENAMETOOLONG")
}


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it when the block ends, and removed after an error.

    The folder is created, and what killed processes left in it is removed. An OSError names the path and the remedy.
    The tempfile module is not used: its files are readable by their owner alone.
    """
    with unwritable_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path.parent)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_name(folder: Path) -> Path:
    """A new name in a folder, which tells whose it is; what killed processes left there under such names is removed.

    It is short: the name of the file to be may be as long as names can be.
    """
    _remove_abandoned(folder)
    return folder / f".{_host()}-{os.getpid()}-{secrets.token_hex(4)}.part"


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in another one, which is created; removed when the block ends, or by a later process."""
    with unwritable_named(parent):
        folder = temporary_name(parent)
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill an open file under a temporary name, renamed to ``path`` when it is complete."""
    with temporary_beside(path) as temporary, temporary.open("xb") as file:
        write(file)


@contextmanager
def unwritable_named(path: Path) -> Iterator[None]:
    """Raise an OSError that names ``path`` and the remedy where the disk is full or the folder cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        msg = f"{path} cannot be written ({error.strerror}). Make room there, or choose another folder."
        raise OSError(error.errno, msg) from error


def check_writable(folder: Path) -> None:
    """Create a folder and raise an OSError, which names it and the remedy, unless a file can be written there."""
    with unwritable_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))


def fitting_name(stem: str, suffix: str) -> str:
    """A file name of stem and suffix that file systems take: a stem that is too long ends in a digest of itself."""
    room = _LONGEST_NAME - len(os.fsencode(suffix))
    raw = os.fsencode(stem)
    if len(raw) <= room:
        return stem + suffix
    end = f"-{hashlib.blake2b(raw, digest_size=8).hexdigest()}"
    return raw[: room - len(end)].decode(errors="ignore") + end + suffix


def read_json(path: Path) -> object:
    """What is in a JSON file; a ValueError that names it where it is none."""
    try:
        content: object = json.loads(path.read_bytes())
    except ValueError as error:
        msg = f"{path} is no JSON ({error})."
        raise ValueError(msg) from error
    return content


def is_drawing(path: Path) -> bool:
    """Whether a file is a drawing of results that this package made."""
    if path.suffix.lower() != ".png" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            beginning = file.read(1024)
    except OSError:
        return False
    return beginning.startswith(b"\x89PNG") and b"tEXtSoftware\0" + SOFTWARE.encode() in beginning


def is_file(path: Path) -> bool:
    """Whether a regular file is there; also where the name is one that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long; a NUL
        return False


def damaged(argument: str, path: Path, question: str, error: Exception) -> ValueError:
    """The error for a file that its reader cannot read, which names the argument and the file and asks the user."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    size = path.stat().st_size if is_file(path) else 0
    return ValueError(f"`{argument}`: {path} ({size} bytes) cannot be read{question} The reader says: {reason}")


def check_no_bomb(path: Path) -> None:
    """Raise a ValueError for an archive that unpacks to far more than its size; torch saves without compression."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > 2 * path.stat().st_size + 2**20:
            msg = f"it has {path.stat().st_size} bytes and would unpack to {size}"
            raise ValueError(msg)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _host() -> str:
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


@cache  # once in every process and folder: a run writes thousands of files into one
def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(".*-*-*.part"):
        host, _, rest = path.name[1:].partition("-")
        process = rest.partition("-")[0]
        with suppress(OSError):  # another process was faster, or it is not ours to remove
            here = host == _host() and process.isdecimal()
            if not psutil.pid_exists(int(process)) if here else time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
