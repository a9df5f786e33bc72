"""The subcommand ``thresholds``."""

from __future__ import annotations

import argparse
import json
import sys

from ..runtime.changes import change, undo
from ..runtime.values import open_values


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print bounds and thresholds of a file, after a change where one is asked for."""
    if given.set and given.undo:
        parser.error("thresholds takes either --set or --undo.")
    if given.set:
        before, after = change(given.model, _numbers(given.set, parser), given.class_name)
    elif given.undo:
        before, after = undo(given.model)
    else:
        after = before = open_values(given.model).read()
    if given.class_name is not None and given.class_name not in after:
        parser.error(f"--class_name: there is no {given.class_name}, only {', '.join(after)}.")
    shown = {name: values for name, values in after.items() if given.class_name in {None, name}}
    if given.json:
        sys.stdout.write(json.dumps(shown, indent=1, ensure_ascii=False) + "\n")
        return 0
    for class_name, values in shown.items():
        sys.stdout.write(f"{class_name}\n")
        for name, value in values.items():
            old = before[class_name][name]
            was = "" if old == value else f" (was {old:.6g})"
            sys.stdout.write(f"  {name} {value:.6g}{was}\n")
    return 0


def _numbers(pairs: list[str], parser: argparse.ArgumentParser) -> dict[str, float]:
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            parser.error(f"--set takes NAME=NUMBER, such as image=0.62, got {pair!r}.")
    return found
