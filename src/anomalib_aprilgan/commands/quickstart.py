"""The subcommand ``quickstart``."""

from __future__ import annotations

import argparse

from ..demo.quickstart import quickstart


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Try the model on a drawn product."""
    del parser
    quickstart(given.root)
    return 0
