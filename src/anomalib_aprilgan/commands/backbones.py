"""The subcommand ``backbones``: the CLIPs that can be used."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.progress import track
from rich.table import Table

from ..clip import library
from ..clip.catalogue import Backbone, backbones
from ..clip.columns import COLUMNS

# So many architectures are listed with the names of their weights.
_FEW = 20
# Columns of a console in which every line has room.
_UNBOUND = 10_000
_TITLES = {"image_size": "pixels", "embed_dim": "joint width", "parameters": "parameters (M)", "gflops": "GFLOPs"}


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print them."""
    unknown = sorted(set(given.names) - set(library.model_names()))
    if unknown:
        parser.error(f"names must be architectures of open_clip, got {', '.join(unknown)}.")
    if given.image_size is not None and given.image_size < 1:
        parser.error(f"--image_size must be a side in pixels above 0, got {given.image_size}.")
    names = given.names or library.model_names()
    progress = track(backbones(given.image_size, names), "Backbones", len(names), console=Console(stderr=True))
    # Those without a figure come last.
    found = sorted(progress, key=lambda one: (getattr(one, given.sort) is None, getattr(one, given.sort)))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if given.json:
        console.print(json.dumps([one.to_dict() for one in found], indent=1))
    elif given.markdown:
        console.print(markdown(found))
    else:
        _print_table(found, console)
    return 0


def _print_table(found: Sequence[Backbone], console: Console) -> None:
    """A line each, as wide as the longest needs, and below the table what would widen it."""
    table = Table(*(_TITLES.get(column, column) for column in COLUMNS), "weights", box=SIMPLE)
    for column in table.columns:
        column.no_wrap = True
    for one in found:
        table.add_row(*(_cell(one, column) for column in COLUMNS), str(len(one.weights)))
    unbound = Console(width=_UNBOUND)
    needed = Measurement.get(unbound, unbound.options, table).maximum
    Console(highlight=False, width=max(console.width, needed)).print(table)
    if len(found) <= _FEW:
        for one in found:
            console.print(f"{one.name}: {', '.join(one.weights) or 'no weights'}")
    console.print("\n".join(_counted(found)))


def markdown(found: Sequence[Backbone]) -> str:
    """A Markdown table of backbones, with a line that counts them."""
    columns = [_TITLES.get(column, column) for column in COLUMNS]
    counted, *refused = _counted(found)
    lines = [
        counted,
        "",
        f"| {' | '.join([*columns, 'weights'])} |",
        f"|{'---|' * (len(columns) + 1)}",
        *(
            f"| {' | '.join([*(_cell(one, column) for column in COLUMNS), ', '.join(one.weights) or 'none'])} |"
            for one in found
        ),
    ]
    return "\n".join([*lines, *refused])


def _counted(found: Sequence[Backbone]) -> list[str]:
    """Lines that count what can be used and name what cannot, by the reason."""
    usable = [one for one in found if not one.refused]
    counted = (
        f"{len(usable)} of {len(found)} architectures and {_weights(usable)} of {_weights(found)} weights can be used."
    )
    reasons: dict[str, list[str]] = {}
    for one in found:
        if one.refused:
            reasons.setdefault(one.refused, []).append(one.name)
    refused = [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return [counted, *(["", "Refused here:", "", *refused] if refused else [])]


def _weights(found: Sequence[Backbone]) -> int:
    return sum(len(one.weights) for one in found)


def _cell(one: Backbone, column: str) -> str:
    value = getattr(one, column)
    if column == "image_size" and value is not None:
        return str(value[0]) if value[0] == value[1] else f"{value[0]} x {value[1]}"
    return "" if value is None else str(value)
