"""The measurement of the built-in model: its command runs, and what it says can be believed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.demo import built_in
from anomalib_aprilgan.demo.studies import built_in as study


def build(class_name: str, **overrides: object) -> AprilGAN:
    return AprilGAN(
        backbone=built_in.ARCHITECTURE,
        pretrained=built_in.PRETRAINED,
        image_size=built_in.IMAGE_SIZE,
        stages=built_in.STAGES,
        memory_stages=built_in.MEMORY_STAGES,
        class_name=class_name,
        **overrides,
    )


@pytest.fixture(autouse=True)
def one_number_of_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SHOTS", (4,))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture(scope="module")
def product(root: Path) -> study.Product:
    return study.load_product(root, "leather", 7)


def test_product_has_enough_good_and_bad_images(product: study.Product) -> None:
    assert product.labels.sum() == (1 - product.labels).sum() == 42
    assert torch.equal(product.masks.flatten(1).amax(dim=1), product.labels)
    assert len(product.references) == 4


def test_figures_are_those_of_scikit_learn(product: study.Product, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SHOTS", ())
    model = build("leather")
    model.setup("predict")
    with torch.no_grad():
        output = model.model(model.pre_processor(product.images))  # not by the study's own way
    figures = study.shots(build, "leather", product)["0-shot"]
    pixels, truth = output.anomaly_map.flatten().numpy(), product.masks.flatten().numpy()
    assert figures["pixel AUROC"] == pytest.approx(roc_auc_score(truth, pixels), abs=1e-5)
    assert figures["pixel AP"] == pytest.approx(average_precision_score(truth, pixels), abs=1e-5)
    assert figures["image AUROC"] == pytest.approx(roc_auc_score(product.labels, output.pred_score), abs=1e-6)
    scores = study.zero_shot_scores(model, product)["0-shot"]
    dent = np.isin(product.kinds, ["good", "dent"])
    expected = roc_auc_score(product.labels[dent], output.pred_score[dent])
    assert scores["dent"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_command_prints_tables_and_writes_every_value(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "TEST_IMAGES", 14)  # one of every kind of defect
    monkeypatch.setattr(study, "CATEGORIES", ("leather", "wood"))
    monkeypatch.setattr(study, "CAPTIONED_CATEGORIES", ("wood",))
    monkeypatch.setattr(study, "UNSEEN_CATEGORIES", ("leather",))
    out = tmp_path / "figures.json"
    study.main(["--root", str(root), "--seeds", "2", "--first-seed", "7", "--out", str(out)])
    figures = json.loads(out.read_text())["figures"]
    values = figures["leather"]["0-shot"]["AUPRO"]
    table = capsys.readouterr().out
    assert f"| 0-shot | {np.mean(figures['leather']['0-shot']['pixel AUROC']):.3f} ± " in table
    assert f"{np.mean(values):.3f} ± {np.std(values):.3f}" in table
    assert "0-shot" not in figures["wood"]  # the adapters saw wood
    assert set(figures["wood"]["text"]) == set(figures["leather"]["text"])
    # What it is for: adapters detect where untrained ones do not.
    assert np.mean(values) > np.mean(figures["leather"]["untrained adapters"]["AUPRO"])
