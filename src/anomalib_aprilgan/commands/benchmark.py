"""The subcommand ``benchmark``."""

from __future__ import annotations

import argparse
from importlib import import_module

from ..evaluation.config import parser as parser_of_config


def run_command(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run a benchmark from a config; its help is that of the config's entries, printed before models are imported."""
    del parser
    if {"-h", "--help"} & set(given.words):
        parser_of_config().print_help()
    else:
        import_module("..evaluation.benchmark", __package__).main(given.words)
    return 0
