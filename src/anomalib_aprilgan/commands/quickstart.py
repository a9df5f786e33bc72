"""The subcommand ``quickstart``."""

from __future__ import annotations

import argparse

from ..demo.quickstart import quickstart
from ..plugin import register


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Try the model on a drawn product."""
    del parser
    register()
    quickstart(given.root)
    return 0
