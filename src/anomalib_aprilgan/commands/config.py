"""The subcommand ``config``."""

from __future__ import annotations

import argparse

from ..config_files import names, path_of
from .printing import say


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print the path of a config, or the names of all."""
    del parser
    say("\n".join(names()) if given.name is None else str(path_of(given.name)))
    return 0
