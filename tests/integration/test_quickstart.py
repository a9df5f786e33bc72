"""The README's first run, as it is typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from anomalib_aprilgan.demo import built_in
from anomalib_aprilgan.demo.drawn_clip.pretrain import UNSEEN_CATEGORIES
from anomalib_aprilgan.demo.quickstart import CATEGORY, METRICS, SHOTS, SHOWN_DEFECTS
from anomalib_aprilgan.provenance import load_adapters

# Runs a command and writes its peak memory in kilobytes. From a small process of its own: Linux counts for a child what
# its parent had at the fork, and a worker that has run other tests may have more than the command ever takes.
MEASURED = """
import pathlib, resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
pathlib.Path("peak.txt").write_text(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def _table(output: str) -> dict[str, dict[str, float]]:
    rows = (line.split("│") for line in output.splitlines() if line.startswith("│"))
    return {
        name.strip(): dict(zip(METRICS, map(float, values[: len(METRICS)]), strict=True))
        for _, name, *values in rows
        if name.strip().endswith("-shot")
    }


def test_inspected_category_was_shown_to_nobody() -> None:
    assert CATEGORY in UNSEEN_CATEGORIES
    assert CATEGORY not in load_adapters(built_in.ADAPTERS)[1].trained_on["DrawnInspection"]


@pytest.mark.thorough
def test_quickstart_detects_offline_and_leaves_pictures(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "anomalib-aprilgan-quickstart"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    measured = [sys.executable, "-c", MEASURED, str(command)]
    process = subprocess.run(measured, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "NOT ZERO-SHOT" not in process.stdout + process.stderr
    assert int((tmp_path / "peak.txt").read_text()) < 2_000_000
    table = _table(process.stdout)
    assert list(table) == [f"{k_shot}-shot" for k_shot in SHOTS]
    assert table["0-shot"]["pixel_AUROC"] > 0.85
    assert table["0-shot"]["image_AUROC"] > 0.7
    assert table["4-shot"]["pixel_AUPRO"] > table["0-shot"]["pixel_AUPRO"]
    root = tmp_path / "results" / "quickstart"
    with Image.open(root / "heatmaps.png") as picture:
        assert picture.height > 100 * len(SHOWN_DEFECTS)
    for k_shot in SHOTS:
        assert len(list((root / f"{k_shot}-shot").glob("**/images/**/*.png"))) == 84
