"""The comparison of masks, labels and good parts, on a smaller scale."""

import json
from pathlib import Path

import pytest

from anomalib_aprilgan.demo.studies import supervision


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "TRAINED_CATEGORIES", ("wood",))
    monkeypatch.setattr(supervision, "UNSEEN_CATEGORIES", ("leather",))
    monkeypatch.setattr(supervision, "LEARNING_PICTURES", 22)


def test_users_have_what_they_are_said_to_have_and_as_much_of_it(few_pictures: None, tmp_path: Path) -> None:
    for name in supervision.SUPERVISION:
        data = supervision.folders(tmp_path, name, seed=0)
        data.setup()
        items = [data.train_data[index] for index in range(len(data.train_data))]
        assert len(items) == 22
        assert data.class_names == ("wood",)
        real = [item for item in items if "good" not in Path(item.image_path).parts]
        assert len(real) == (0 if name == "good parts" else 11)
        assert all((item.gt_mask is not None) == (name == "masks") for item in real)
        assert any(item.gt_label for item in items)


@pytest.mark.slow
def test_table_and_file(few_pictures: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    supervision.main(["--root", str(tmp_path / "drawn"), "--out", str(out), "--seeds", "1", "--epochs", "1"])
    figures = json.loads(out.read_text())["figures"]["leather"]
    assert set(figures) == {supervision.UNTRAINED, *supervision.SUPERVISION}
    printed = capsys.readouterr().out
    for name, values in figures.items():
        cells = " | ".join(f"{values[metric][0]:.3f} ± 0.000" for metric in supervision.PIXEL_METRICS)
        assert f"| {name} | {cells} |" in printed
    assert len({values["pixel AUROC"][0] for values in figures.values()}) == 4
