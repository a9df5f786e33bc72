"""The README's first run, as it is typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from anomalib_aprilgan import built_in
from anomalib_aprilgan.checkpoint import load_adapters
from anomalib_aprilgan.drawn_clip.pretrain import UNSEEN_CATEGORIES
from anomalib_aprilgan.quickstart import CATEGORY, METRICS, SHOTS, SHOWN_DEFECTS


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


def test_quickstart_detects_offline_and_leaves_pictures(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "anomalib-aprilgan-quickstart"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    written, errors = tmp_path / "stdout.txt", tmp_path / "stderr.txt"
    with written.open("w") as stdout, errors.open("w") as stderr:
        process = subprocess.Popen([command], cwd=tmp_path, env=environment, stdout=stdout, stderr=stderr)
        # This child's own usage: RUSAGE_CHILDREN would be that of the largest which the worker ever started.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen need not wait again
    assert process.returncode == 0, errors.read_text()[-3000:]
    assert "NOT ZERO-SHOT" not in written.read_text() + errors.read_text()
    assert usage.ru_maxrss < 2_000_000  # kilobytes
    table = _table(written.read_text())
    assert list(table) == [f"{k_shot}-shot" for k_shot in SHOTS]
    assert table["0-shot"]["pixel_AUROC"] > 0.85
    assert table["0-shot"]["image_AUROC"] > 0.7
    assert table["4-shot"]["pixel_AUPRO"] > table["0-shot"]["pixel_AUPRO"]
    root = tmp_path / "results" / "quickstart"
    with Image.open(root / "heatmaps.png") as picture:
        assert picture.height > 100 * len(SHOWN_DEFECTS)
    for k_shot in SHOTS:
        assert len(list((root / f"{k_shot}-shot").glob("**/images/**/*.png"))) == 84
