"""The README's first run, shortened to two categories."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from anomalib_aprilgan import quickstart
from anomalib_aprilgan.checkpoint import load_adapters


def test_quickstart_trains_inspects_and_leaves_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "TRAINING_CATEGORIES", ("tile", "gear"))
    monkeypatch.chdir(tmp_path)
    quickstart.main(["--root", str(tmp_path)])
    _, provenance = load_adapters(tmp_path / "adapters.safetensors")
    assert provenance.trained_on == {"DrawnInspection": ["tile", "gear"]}
    output = capsys.readouterr().out
    assert output.count("pixel_AUPRO") == 2
    assert "NOT ZERO-SHOT" not in output
    with Image.open(tmp_path / "heatmaps.png") as picture:
        assert picture.width > 500
    for setting in ("0-shot", "4-shot"):
        assert len(list((tmp_path / setting).glob("**/images/**/*.png"))) == 56
