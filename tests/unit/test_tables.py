"""Tables and plots of made-up results."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_aprilgan.evaluation import plots, tables
from anomalib_aprilgan.evaluation.cells import COLUMNS, DONE, FAILED, FULL, METRICS, Cell, CellResult, Results
from anomalib_aprilgan.evaluation.published import DATASETS, method_of, official_code, report_table


def result(model: str, dataset: str, category: str, k_shot: int, seed: int, **metrics: float) -> CellResult:
    values = dict.fromkeys(METRICS, 0.5) | metrics
    cell = Cell(model, dataset, category, k_shot, seed)
    return CellResult(cell, n_images=2, n_anomalous=1, metrics=values, datamodule=dataset, evaluation_size="8 x 8")


def frame_of(*results: CellResult) -> pd.DataFrame:
    return pd.DataFrame([one.row() for one in results], columns=list(COLUMNS))


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def lines_of(text: str, *beginning: str) -> list[list[str]]:
    rows = [cells_of(line) for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[: len(beginning)] == list(beginning)]


class TestSummary:
    def test_mean_over_categories_and_deviation_of_it_over_seeds(self) -> None:
        values = {("a", 0): 0.80, ("b", 0): 0.90, ("a", 1): 0.60, ("b", 1): 0.80}
        rows = [result("M", "D", category, 1, seed, image_auroc=v) for (category, seed), v in values.items()]
        text = tables.summary(frame_of(*rows))
        assert "## D (2 categories, 2 seeds" in text
        ((_, _, *figures),) = lines_of(text, "1-shot", "M")
        assert figures[tables.PAPER.index("image_auroc")] == "77.5 ± 7.5"  # of 85 and 70; population
        assert figures[tables.PAPER.index("pixel_ap")] == "50.0 ± 0.0"

    def test_rows_rise_with_shots_and_all_images_come_last(self) -> None:
        rows = [result("M", "D", "a", k_shot, 0) for k_shot in (FULL, 4, 0, 10, 1)]
        settings = [row[0] for row in lines_of(tables.summary(frame_of(*rows)))[2:]]
        assert settings == ["zero-shot", "1-shot", "4-shot", "10-shot", "all images"]

    def test_says_what_a_mean_leaves_out(self) -> None:
        rows = [result("M", "D", "a", 0, 0, image_auroc=0.7), result("M", "D", "b", 0, 0, image_auroc=math.nan)]
        rows += [result("N", "D", "a", 0, 0, image_auroc=0.6), CellResult(Cell("N", "D", "b", 0, 0), FAILED, "why")]
        text = tables.summary(frame_of(*rows))
        column = 2 + tables.PAPER.index("image_auroc")
        assert lines_of(text, "zero-shot", "M [1]")[0][column] == "70.0"
        assert lines_of(text, "zero-shot", "N [2]")[0][column] == "60.0"
        assert "[1] image AUROC does not exist for b" in text
        assert "[2] no results, or not of every seed, for b" in text

    def test_what_exists_nowhere_is_no_number(self) -> None:
        text = tables.summary(frame_of(result("M", "D", "a", 0, 0, aupro=math.nan)))
        assert lines_of(text, "zero-shot", "M")[0][2 + tables.PAPER.index("aupro")] == "\N{EN DASH}"

    def test_nothing_done_is_no_table(self) -> None:
        assert tables.summary(frame_of(CellResult(Cell("M", "D", "a", 0, 0), FAILED, "why"))) == ""


class TestLabelled:
    def test_cells_with_other_test_images_are_never_in_one_table(self) -> None:
        def of(model: str, category: str, files: str) -> CellResult:
            return replace(result(model, "D", category, 0, 0), test_files=files)

        same = [of("M", "a", "1"), of("M", "b", "2"), of("N", "a", "1")]
        frame = tables.labelled(frame_of(*same, of("N", "b", "3"), of("O", "b", "3")))
        assert list(frame.dataset) == ["D", "D", "D", "D, other test images (2)", "D, other test images (2)"]
        first, second = tables.summary(frame).split("## ")[1:]
        assert [row[1] for row in lines_of(first)[2:]] == ["M", "N [1]"]
        assert [row[1] for row in lines_of(second)[2:]] == ["N", "O"]
        assert "no results, or not of every seed, for b" in first

    def test_accelerators_are_told_apart(self) -> None:
        cells = [CellResult(Cell("M", "D", "a", 0, 0, name), metrics={}) for name in ("cpu", "cuda")]
        assert list(tables.labelled(frame_of(*cells)).model) == ["M on cpu", "M on cuda"]
        assert list(tables.labelled(frame_of(cells[0])).model) == ["M"]


class TestComparison:
    @pytest.mark.parametrize("dataset", DATASETS)
    def test_published_figures_themselves_are_not_flagged(self, dataset: str) -> None:
        official = official_code(dataset, 0)
        assert official is not None
        rows = [
            result("AprilGAN", dataset, category, 0, 0, **line[list(tables.PAPER)].to_dict())
            for category, line in official.iterrows()
        ]
        text = tables.comparison(frame_of(*rows), 0.01)
        assert text.count("\N{WARNING SIGN}") == 2  # the two explanations of the sign
        assert len(lines_of(text, "zero-shot", "AprilGAN")) == 1 + len(official)

    def test_flags_what_is_further_off_than_the_tolerance_and_two_deviations(self) -> None:
        official = official_code("MVTecAD", 0)
        assert official is not None
        line = report_table("MVTecAD").loc[(1, "PatchCore")]
        assert line.image_auroc == pytest.approx(0.863)
        assert line.image_auroc_std == pytest.approx(0.033)
        off = {"image_auroc": line.image_auroc + 0.06, "pixel_auroc": line.pixel_auroc - 0.02}
        rows = [result("Patchcore", "MVTecAD", category, 1, 0, **off) for category in official.index]
        (found,) = lines_of(tables.comparison(frame_of(*rows), 0.01), "1-shot", "Patchcore")
        assert found[2 + tables.PAPER.index("image_auroc")] == "92.3 / 86.3 (+6.0)"
        assert found[2 + tables.PAPER.index("pixel_auroc")] == "91.3 / 93.3 (-2.0) \N{WARNING SIGN}"
        assert found[2 + tables.PAPER.index("pixel_ap")] == "50.0 / \N{EN DASH}"

    def test_means_over_some_categories_are_not_compared(self) -> None:
        text = tables.comparison(frame_of(result("WinClip", "Visa", "candle", 0, 0)), 0.01)
        assert "left out" in text
        assert not lines_of(text, "zero-shot", "WinClip")

    def test_other_models_and_other_data_are_not_compared(self) -> None:
        rows = [result("AprilGAN", "Folder", "candle", 0, 0), result("PaDiM, untrained", "Visa", "candle", 1, 0)]
        assert tables.comparison(frame_of(*rows), 0.01) == ""


def test_per_category_and_failures_escape_what_markdown_reads() -> None:
    failed = CellResult(Cell("M", "D", "x|y", 1, 3), FAILED, "ValueError: a | b\nc")
    frame = frame_of(result("M", "D", "x|y", 0, 0, aupro=0.123), failed)
    assert "| x\\|y | M |" in tables.per_category(frame)
    assert "12.3" in tables.per_category(frame)
    assert "| M | D | x\\|y | 1-shot | 3 | ValueError: a \\| b c |" in tables.failures(frame)
    assert tables.failures(frame[frame.status == DONE]) == ""


class TestPublished:
    def test_tables_of_the_report(self) -> None:
        table = report_table("MVTecAD")
        assert table.loc[(0, "APRIL-GAN"), "image_auroc"] == pytest.approx(0.861)
        assert table.loc[(4, "WinCLIP"), "image_auroc_std"] == pytest.approx(0.013)
        assert np.isnan(table.loc[(0, "WinCLIP"), "pixel_ap"])

    @pytest.mark.parametrize(("dataset", "categories"), [("MVTecAD", 15), ("Visa", 12)])
    def test_the_rerun_agrees_with_the_report(self, dataset: str, categories: int) -> None:
        for k_shot in (0, 4):
            rerun = official_code(dataset, k_shot)
            assert rerun is not None
            assert len(rerun) == categories
            difference = (
                rerun[list(tables.PAPER)].mean() - report_table(dataset).loc[(k_shot, "APRIL-GAN"), tables.PAPER]
            )
            assert difference.abs().max() < 0.008
        assert official_code(dataset, 1) is None

    @pytest.mark.parametrize(
        ("name", "method"),
        [
            ("AprilGAN", "APRIL-GAN"),
            ("WinClip", "WinCLIP"),
            ("Patchcore", "PatchCore"),
            ("padim", "PaDiM"),
            ("A", None),
        ],
    )
    def test_names(self, name: str, method: str | None) -> None:
        assert method_of(name) == method


class TestResults:
    def test_a_result_survives_its_file(self, tmp_path: Path) -> None:
        results = Results(tmp_path / "r", {"seed": 0})
        one = result("M / x", "D", "a b", FULL, 0, aupro=math.nan)
        assert results.load(one.cell) is None
        results.save(one)
        loaded = results.load(one.cell)
        assert loaded is not None
        assert loaded.cell == one.cell
        assert math.isnan(loaded.metrics["aupro"])
        assert {k: v for k, v in loaded.metrics.items() if k != "aupro"} == {
            k: v for k, v in one.metrics.items() if k != "aupro"
        }
        assert results.is_done(one.cell)

    def test_names_that_differ_in_odd_signs_alone_keep_their_own_files(self, tmp_path: Path) -> None:
        results = Results(tmp_path / "r", {"seed": 0})
        first, second = result("M", "D", "a/b", 0, 0, aupro=0.1), result("M", "D", "a b", 0, 0, aupro=0.2)
        for one in (first, second):
            results.save(one)
        loaded = [results.load(one.cell) for one in (first, second)]
        assert [one and (one.cell, one.metrics) for one in loaded] == [
            (one.cell, one.metrics) for one in (first, second)
        ]


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (15, 2)])
def test_plots_show_every_model_and_bear_what_does_not_exist(tmp_path: Path, shape: tuple[int, int]) -> None:
    categories, models = shape
    rng = np.random.default_rng(0)
    rows = [
        result(f"M{model}", "D", f"category_{category}", k_shot, 0, aupro=rng.uniform(0.5, 1.0))
        for model in range(models)
        for category in range(categories)
        for k_shot in (0, 1, FULL)
    ]
    rows.append(result("M0", "E", "without", 0, 0, aupro=math.nan))
    plots.category_bars(frame_of(*rows), "aupro", tmp_path / "bars.png")
    plots.shots_curve(frame_of(*rows), ["aupro", "pixel_ap"], tmp_path / "shots.png")
    for name in ("bars", "shots"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or []}
        wanted = [tuple(int(code[place : place + 2], 16) for place in (1, 3, 5)) for code in plots.COLOURS[:models]]
        assert set(wanted) <= colours
