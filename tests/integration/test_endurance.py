"""Predictions that are ended: nothing that was finished is lost, and what was half-written goes with the next run."""

from __future__ import annotations

from pathlib import Path

import pytest

from anomalib_aprilgan.demo.studies import endurance


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endurance.write_images(tmp_path_factory.mktemp("endurance") / "images", 400, 96)


@pytest.mark.parametrize(
    "number", [0, pytest.param(1, marks=pytest.mark.slow), 2], ids=[found.name for found in endurance._SIGNALS]
)
def test_an_ended_prediction_keeps_every_finished_image(images: Path, tmp_path: Path, number: int) -> None:
    found = endurance.interrupt(images, tmp_path / "run", number, seed=0)
    assert found.finished > 0
    assert found.missing == 0
    assert found.finished <= found.in_table <= 400
    (table,) = tmp_path.rglob("decisions.csv")
    assert table.read_bytes().endswith(b'"\n')
    drawn = {path.name for path in tmp_path.rglob("images/**/*.png")}
    assert drawn <= {Path(row["image_path"]).name for row in endurance._rows(table)}


@pytest.mark.slow
def test_on_the_command_line_memory_does_not_grow_with_the_images(images: Path, tmp_path: Path) -> None:
    endurance.predict(images, tmp_path, tmp_path / "log")
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 399  # the last is finished after the last start of a batch
    settled, most = endurance.growth(tmp_path / "log")
    assert most - settled < 15e6  # kept maps alone would be 30 MB
