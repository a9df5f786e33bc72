"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it when the block ends, and removed after an error.

    The folder is created. The tempfile module is not used: its files are readable by their owner alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill an open file under a temporary name, renamed to ``path`` when it is complete."""
    with temporary_beside(path) as temporary, temporary.open("xb") as file:
        write(file)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
