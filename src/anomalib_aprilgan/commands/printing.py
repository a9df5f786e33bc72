"""How subcommands print: text as it is, on lines as long as they are."""

from __future__ import annotations

from rich.console import Console


def say(text: str) -> None:
    """Print text without marking anything in it."""
    Console(soft_wrap=True, highlight=False, markup=False, emoji=False).print(text)
