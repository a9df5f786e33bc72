"""What MkDocs asks for while it builds the site: help texts of the commands as they are printed, and the notebooks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

_HELP = re.compile(r"^\{\{ help of (\S+(?: \S+)?) \}\}$", re.MULTILINE)


def help_of(command: str) -> str:
    """What ``command --help`` prints, as a code block."""
    program, *subcommand = command.split()
    words = [Path(sys.executable).with_name(program), *subcommand, "--help"]
    environment = {**os.environ, "COLUMNS": "80"}
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout  # noqa: S603
    if command not in printed:
        msg = f"{command} --help printed nothing of itself."
        raise ValueError(msg)
    return f"```text\n{printed.strip()}\n```"


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs' hook: fill help texts in."""
    return _HELP.sub(lambda match: help_of(match[1]), markdown)


def on_pre_build(config: MkDocsConfig) -> None:
    """MkDocs' hook: the notebooks beside ``docs`` are its tutorials. Only pages within ``docs`` can be rendered."""
    folder = Path(config.docs_dir) / "tutorials"
    folder.mkdir(exist_ok=True)
    for notebook in (folder.parents[1] / "notebooks").glob("*.ipynb"):
        copy, content = folder / notebook.name, notebook.read_bytes()
        if not copy.is_file() or copy.read_bytes() != content:  # or `mkdocs serve` would never come to rest
            copy.write_bytes(content)
