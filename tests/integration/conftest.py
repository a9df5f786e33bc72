"""anomalib's command line without a process of its own: importing torch and anomalib takes ten seconds each time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI


@pytest.fixture
def anomalib(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., str]:
    """Runs an anomalib command in ``tmp_path``, offline; returns what it printed, logged and warned of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    caplog.set_level(logging.INFO)

    def run(*arguments: str) -> str:
        caplog.clear()
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            AnomalibCLI(args=arguments)
        printed = capsys.readouterr()
        return "\n".join([printed.out, printed.err, caplog.text, *(str(warning.message) for warning in warned)])

    return run
