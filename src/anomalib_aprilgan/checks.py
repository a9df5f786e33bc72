"""Checks of what a user gives: a TypeError or ValueError names the argument, what is expected, and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence

SEED_LIMIT = 2**63  # of torch's generators


def check_int(argument: str, value: object, low: int, high: float = math.inf, hint: str = "") -> int:
    """An int in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"`{argument}` must be an int, got {shown(value)}."
        raise TypeError(msg)
    if not low <= value <= high:
        span = f"at least {low}" if high == math.inf else f"from {low} to {high:g}"
        msg = f"`{argument}` must be {span}{hint}, got {shown(value)}."
        raise ValueError(msg)
    return value


def check_number(argument: str, value: object, expected: str) -> float:
    """A finite int or float; what is ``expected``, its range included, goes into the error."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"`{argument}` must be {expected}, got {shown(value)}."
        raise TypeError(msg)
    if not math.isfinite(value):
        msg = f"`{argument}` must be {expected}, got {value}."
        raise ValueError(msg)
    return value


def check_bool(argument: str, value: object) -> bool:
    """True or False, and nothing that only counts as such: ``"false"`` is true to Python."""
    if not isinstance(value, bool):
        msg = f"`{argument}` must be true or false, got {shown(value)}."
        raise TypeError(msg)
    return value


def check_text(argument: str, value: object, what: str) -> str:
    """Text, or a path, that says something and has no control characters."""
    if not isinstance(value, (str, os.PathLike)):
        msg = f"`{argument}` must be {what}, got {shown(value)}."
        raise TypeError(msg)
    text = os.fspath(value)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        msg = f"`{argument}` must be {what}, got {shown(text)}."
        raise ValueError(msg)
    return text


def check_choice(argument: str, value: object, known: Collection[str]) -> str:
    """One of some names."""
    if not isinstance(value, str) or value not in known:
        msg = f"`{argument}` must be one of {', '.join(known)}, got {shown(value)}."
        raise ValueError(msg)
    return value


def check_list(argument: str, value: object, what: str) -> list[object]:
    """The entries of a list or tuple, or of what behaves like one."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        msg = f"`{argument}` must be {what}, got {shown(value)}."
        raise TypeError(msg)
    return list(value)


def check_share(argument: str, value: object) -> float:
    """A number in ``[0, 1]``."""
    expected = "a number in [0, 1]"
    number = check_number(argument, value, expected)
    if not 0.0 <= number <= 1.0:
        msg = f"`{argument}` must lie in [0, 1], got {value}."
        raise ValueError(msg)
    return number


def check_loaders(*, num_workers: int, **batch_sizes: int) -> None:
    """Raise an error unless batch sizes, by argument, and a number of worker processes can be had."""
    for argument, size in batch_sizes.items():
        check_int(argument, size, 1, 2**20)
    check_int("num_workers", num_workers, 0, 1024)


def check_optional(argument: str, value: object, kind: type, what: str) -> None:
    """Raise a TypeError unless a part is ``None`` or of a kind."""
    if value is not None and not isinstance(value, kind):
        msg = f"`{argument}` must be {what}, got {shown(value)}."
        raise TypeError(msg)


def check_kind(argument: str, value: object, kind: type, what: str) -> None:
    """Raise a TypeError unless a part is true, false or of a kind."""
    if not isinstance(value, (bool, kind)):
        msg = f"`{argument}` must be {what}, or true or false, got {shown(value)}."
        raise TypeError(msg)


def is_like(value: object, pattern: object) -> bool:
    """Whether plain data from a file have a pattern.

    A type stands for values of that very type, ``[pattern]`` for a list, ``{str: pattern}`` for a mapping, a tuple of
    patterns for any of them, and everything else for itself.
    """
    if isinstance(pattern, tuple):
        return any(is_like(value, one) for one in pattern)
    if isinstance(pattern, list):
        return isinstance(value, (list, tuple)) and all(is_like(entry, pattern[0]) for entry in value)
    if isinstance(pattern, dict):
        ((of_key, of_value),) = pattern.items()
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(is_like(key, of_key) and is_like(one, of_value) for key, one in pairs)
    return type(value) is pattern if isinstance(pattern, type) else value is pattern


def check_entries(argument: str, content: object, patterns: Mapping[str, object]) -> None:
    """Raise a ValueError that names the entry of a mapping from a file that has not its pattern."""
    if not isinstance(content, Mapping):
        msg = f"`{argument}` must hold a mapping, got {shown(content)}."
        raise ValueError(msg)
    for name, pattern in patterns.items():
        if name not in content:
            msg = f"`{argument}` lacks the entry {name!r}: it is damaged, or something else wrote it."
            raise ValueError(msg)
        if not is_like(content[name], pattern):
            msg = f"`{argument}`: the entry {name!r} must be like {pattern}, got {shown(content[name])}."
            raise ValueError(msg)


def shown(value: object, longest: int = 80) -> str:
    """A value as an error shows it: on one line, and not longer than so many characters."""
    try:
        text = repr(value)
    except Exception:  # whatever a user's object does
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
