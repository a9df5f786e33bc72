"""The start-up hook: quick, quiet, off when told so, and never in the way of another Python program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

HOOK = "_anomalib_aprilgan_startup"

FIRST = ("anomalib.models", "anomalib_aprilgan", "anomalib.engine")
# A fresh Python for each import; what anomalib itself imports is loaded once, before they part.
FORKS = f"""
import os, sys
import lightning.pytorch, open_clip, torchmetrics, torchvision
for first in sys.argv[1:]:
    if not (child := os.fork()):
        __import__(first)
        import anomalib.models, anomalib.data
        hooked = any(getattr(finder, "__module__", "") == "{HOOK}" for finder in sys.meta_path)
        print(first, anomalib.models.AprilGAN.__module__, anomalib.data.AuxiliaryData.__name__, hooked, flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


def stand_ins(folder: Path, package: str) -> str:
    """Folder with an empty ``anomalib.models`` and this source as ``anomalib_aprilgan``: the real ones take seconds."""
    for name, source in (("anomalib", ""), ("anomalib/models", ""), ("anomalib_aprilgan", package)):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    return str(folder)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


def test_a_python_that_never_imports_anomalib_pays_milliseconds() -> None:
    microseconds = []
    for _ in range(5):
        report = python("-X", "importtime", "-c", "import json").stderr
        (line,) = [line for line in report.splitlines() if HOOK in line]
        microseconds.append(int(re.findall(r"(\d+) \|", line)[-1]))
    assert sorted(microseconds)[2] < 5000


def test_nothing_is_loaded_until_anomalib_is() -> None:
    script = (
        "import sys, json; print([name for name in ('torch', 'anomalib', 'anomalib_aprilgan') if name in sys.modules])"
    )
    assert python("-c", script).stdout.strip() == "[]"


def test_anomalibs_models_bring_ours_in_whichever_comes_first() -> None:
    for first, output in zip(FIRST, python("-W", "ignore", "-c", FORKS, *FIRST).stdout.splitlines(), strict=True):
        assert output.split() == [first, "anomalib_aprilgan.lightning_model", "AuxiliaryData", "False"]


def test_the_variable_turns_it_off(tmp_path: Path) -> None:
    script = "import sys, anomalib.models; print('anomalib_aprilgan' in sys.modules)"
    folder = stand_ins(tmp_path, "")
    for variable, loaded in (("0", "True"), ("1", "False")):
        process = python("-c", script, PYTHONPATH=folder, ANOMALIB_APRILGAN_NO_AUTOLOAD=variable)
        assert process.stdout.strip() == loaded


def test_a_package_that_cannot_be_imported_is_a_warning(tmp_path: Path) -> None:
    folder = stand_ins(tmp_path, "raise RuntimeError('a broken install')")
    process = python("-c", "import anomalib.models; print('alive')", PYTHONPATH=folder)
    assert process.stdout.strip() == "alive"
    assert "anomalib_aprilgan could not be loaded into anomalib: RuntimeError('a broken install')" in process.stderr


def test_uninstalling_takes_the_hook_along() -> None:
    """pip removes what the package's record lists."""
    recorded = {file.name for file in files("anomalib-aprilgan") or []}
    assert {"anomalib_aprilgan.pth", f"{HOOK}.py"} <= recorded
