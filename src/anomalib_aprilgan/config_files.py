"""The configs that come with the package: ``anomalib-aprilgan config`` prints where one is."""

from __future__ import annotations

from pathlib import Path

_SUFFIX = ".yaml"


def folder() -> Path:
    """Where they are: in the installed package, or beside ``src`` in a repository that is installed as it is."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def names() -> list[str]:
    """Of all of them, such as ``train/visa``."""
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob(f"*{_SUFFIX}"))


def path_of(name: str) -> Path:
    """The file of a config.

    Raises:
        FileNotFoundError: There is none of this name.
    """
    known = names()
    if name not in known:
        msg = f"There is no config {name!r} in {folder()}, but {', '.join(known)}."
        raise FileNotFoundError(msg)
    return (folder() / name).with_suffix(_SUFFIX)
