"""The page of a run's results, in a real browser, and the files that it is made from."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from playwright.sync_api import Page, Request, sync_playwright

from anomalib_aprilgan import AprilGAN
from anomalib_aprilgan.command import main
from anomalib_aprilgan.csv_text import as_csv
from anomalib_aprilgan.data import MultiCategoryData
from anomalib_aprilgan.data.corrections import read_corrections
from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor
from anomalib_aprilgan.decision.values import values_of_images
from anomalib_aprilgan.results.report import write_report
from anomalib_aprilgan.results.run_files import InspectedImage, RunFiles

from ..conftest import DATASET
from .runs import category, engine

Build = Callable[..., AprilGAN]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
HOSTILE = [
    "<script>window.hacked=1<&script>.png",
    "a \"quoted\" 'one'.png",
    "line\nbreak.png",
    "=cmd()|'x'!A1.png",
    "ü 木.png",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Page]]:
    """Opens a page in a browser that is offline; at the end, nothing may have been asked of any network."""
    requests: list[str] = []
    errors: list[str] = []
    contexts = []

    def note(request: Request) -> None:
        requests.append(request.url)

    def open_page(path: Path, **options: Any) -> Page:
        context = browser.new_context(offline=True, accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(path.resolve().as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert errors == []


def count(page: Page, name: str) -> int:
    found = page.locator(f"[data-count={name}] b")
    return int(found.inner_text()) if found.count() else 0


def cards(page: Page) -> list[str]:
    return page.locator(".card .caption span:first-child").all_inner_texts()


def drawn_run(folder: Path, number: int, *, labelled: bool = True, names: list[str] | None = None) -> RunFiles:
    """Files of a run on invented images."""
    rng = np.random.default_rng(0)
    (folder / "in").mkdir(parents=True)
    (folder / "maps").mkdir()
    rows, regions, maps = [], [], []
    for place in range(number):
        name = names[place] if names else f"{place:05d}.png"
        path = folder / "in" / name
        score = float(rng.random())
        if place < 60:
            pixels = (rng.random((48, 64, 3)) * 80 + 100).astype(np.uint8)
            Image.fromarray(pixels).save(path)
            level = (np.outer(np.hanning(24), np.hanning(32)) * score * 65535).astype(np.uint16)
            Image.fromarray(level).save(folder / "maps" / f"{place}.png")
            maps.append([str(path), f"maps/{place}.png"])
        label = ("anomalous" if score + rng.normal() * 0.2 > 0.5 else "good") if labelled else ""
        rows.append([str(path), "nut", repr(score), "anomalous" if score > 0.5 else "good", label])
        if score > 0.5:
            regions.append([str(path), "nut", 1, 10, 8, 20, 16, 320, 20.0, 16.0, score, score / 2])
    header = ["image_path", "class_name", "score", "decision", "label"]
    (folder / "decisions.csv").write_bytes(as_csv([header, *rows]))
    fields = ["left", "top", "width", "height", "area", "centroid_x", "centroid_y", "peak", "mean"]
    (folder / "regions.csv").write_bytes(as_csv([["image_path", "class_name", "region", *fields], *regions]))
    (folder / "maps.csv").write_bytes(as_csv([["image_path", "map"], *maps]))
    return RunFiles.read(folder)


@in_browser
class TestPage:
    def test_the_slider_counts_as_a_rerun_with_set_values(
        self, april_gan: Build, tmp_path: Path, opened: Callable[..., Page]
    ) -> None:
        data = MultiCategoryData("mvtec", DATASET, ["bottle", "tile"], num_workers=0, eval_batch_size=5)
        model = april_gan(class_name=["bottle", "tile"], outputs=["report"], k_shot=1)
        engine(tmp_path / "first").test(model, datamodule=data, verbose=False)
        page = opened(next((tmp_path / "first").rglob("report.html")))
        assert count(page, "images") == len(data.test_data)
        for cut in (0.2, 0.45, 0.613):
            page.select_option("#class", label="tile")
            page.fill("#threshold", str(cut))
            page.locator("#threshold").blur()
            shown = {name: count(page, name) for name in ("anomalous", "good")}
            line = page.locator("#python").text_content() or ""
            assert line.startswith('model.post_processor.of_class("tile").set_values(image_threshold=')
            again = april_gan(class_name=["bottle", "tile"], k_shot=1)
            engine(tmp_path / f"set {cut}").validate(again, datamodule=data, verbose=False)
            exec(line, {"model": again})  # noqa: S102  # what the page tells a user to type
            engine(tmp_path / f"again {cut}").test(again, datamodule=data, verbose=False)
            (table,) = (tmp_path / f"again {cut}").rglob("decisions.csv")
            rows = pd.read_csv(table, keep_default_na=False)
            of_class = rows[rows.class_name == "tile"].decision.value_counts()
            assert shown == {name: of_class.get(name, 0) for name in ("anomalous", "good")}
        page.click("#reset")
        first = pd.read_csv(next((tmp_path / "first").rglob("decisions.csv")))
        assert count(page, "anomalous") == ((first.class_name == "tile") & (first.decision == "anomalous")).sum()

    def test_the_yaml_sets_what_the_slider_shows(
        self, april_gan: Build, tmp_path: Path, opened: Callable[..., Page]
    ) -> None:
        model = april_gan(class_name="bottle", outputs=["report"])
        engine(tmp_path / "first").test(model, datamodule=category("bottle"), verbose=False)
        page = opened(next((tmp_path / "first").rglob("report.html")))
        page.fill("#threshold", "0.3")
        page.locator("#threshold").blur()
        shown = count(page, "anomalous")
        sensitivity = float((page.locator("#yaml").text_content() or "").rsplit(":", 1)[1])
        again = april_gan(class_name="bottle", post_processor=AprilGANPostProcessor(image_sensitivity=sensitivity))
        engine(tmp_path / "again").test(again, datamodule=category("bottle"), verbose=False)
        rows = pd.read_csv(next((tmp_path / "again").rglob("decisions.csv")))
        assert shown == (rows.decision == "anomalous").sum()

    def test_filters_order_and_pages(self, tmp_path: Path, opened: Callable[..., Page]) -> None:
        run = drawn_run(tmp_path, 150)
        page = opened(write_report(tmp_path, run))
        scores = sorted((one.score for one in run.images), reverse=True)
        assert cards(page) == [f"{'anomalous' if score > 0.5 else 'good'} · {score:.3f}" for score in scores[:60]]
        page.click("#after")
        assert cards(page)[0].endswith(f"{scores[60]:.3f}")
        page.select_option("#decision", "good")
        good = [score for score in scores if score <= 0.5]
        assert page.inner_text("#shown") == f"{len(good)} of 150 images"
        page.select_option("#order", "up")
        assert cards(page)[0].endswith(f"{scores[-1]:.3f}")
        page.select_option("#decision", "")
        page.select_option("#label", "anomalous")
        labelled = sum(one.label == "anomalous" for one in run.images)
        assert page.inner_text("#shown") == f"{labelled} of 150 images"
        page.select_option("#label", "")
        page.check("#look")
        doubtful = [one for one in run.images if abs(one.score - 0.5) <= 0.05 or one.label != one.decision]
        assert page.inner_text("#shown") == f"{len(doubtful)} of 150 images"
        page.uncheck("#look")
        page.fill("#name", "00007")
        assert page.inner_text("#shown") == "1 of 150 images"

    def test_against_labels(self, tmp_path: Path, opened: Callable[..., Page]) -> None:
        from sklearn.metrics import average_precision_score, roc_auc_score

        run = drawn_run(tmp_path, 80)
        page = opened(write_report(tmp_path, run))
        truth = [one.label == "anomalous" for one in run.images]
        scores = [one.score for one in run.images]
        assert page.inner_text("#auroc") == f"AUROC {roc_auc_score(truth, scores):.4f}"
        assert page.inner_text("#ap") == f"average precision {average_precision_score(truth, scores):.4f}"
        table = [int(text) for text in page.locator("#confusion td").all_inner_texts()]
        pairs = [(label, decided) for label in ("good", "anomalous") for decided in ("good", "anomalous")]
        assert table == [sum((one.label, one.decision) == pair for one in run.images) for pair in pairs]

    def test_without_labels_nothing_is_said_of_them(self, tmp_path: Path, opened: Callable[..., Page]) -> None:
        page = opened(write_report(tmp_path, drawn_run(tmp_path, 5, labelled=False)))
        assert not page.is_visible("#labelled")
        assert not page.is_visible("#label")

    def test_keys_and_marks_and_what_is_downloaded(self, tmp_path: Path, opened: Callable[..., Page]) -> None:
        run = drawn_run(tmp_path, 8)
        page = opened(write_report(tmp_path, run))
        ordered = [one.image_path for one in sorted(run.images, key=lambda one: -(one.score or 0.0))]
        page.locator(".card").first.focus()
        page.keyboard.press("Enter")
        assert page.inner_text("#large-path") == ordered[0]
        page.keyboard.press("g")
        assert page.get_attribute("#good", "aria-pressed") == "true"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("B")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("g")
        page.keyboard.press("u")
        assert page.inner_text("#large-path") == ordered[2]
        assert page.locator("#large-view .heat").count() == page.locator("#large-view svg").count() == 1
        page.keyboard.press("h")
        page.keyboard.press("r")
        assert page.locator("#large-view .heat").count() == page.locator("#large-view svg").count() == 0
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#large-path") == ordered[1]
        page.keyboard.press("Escape")
        assert not page.is_visible("#large")
        assert page.inner_text("#marked") == "2 marked"
        page.select_option("#mark", "bad")
        assert page.inner_text("#shown") == "1 of 8 images"
        page.reload()
        assert page.inner_text("#marked") == "2 marked"  # kept by the browser
        with page.expect_download() as download:
            page.click("#download")
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        assert path.name == "corrections.csv"
        assert read_corrections(path, "good") == {"nut": [ordered[0]]}
        assert read_corrections(path, "bad", "nut") == {"nut": [ordered[1]]}

    def test_hostile_names_are_text(
        self, tmp_path: Path, opened: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        names = [*HOSTILE, "</script><script>alert(1)<&script>.png".replace("/", "&")]
        drawn_run(tmp_path, len(names), names=names)
        rows = list(csv.reader(io.StringIO((tmp_path / "decisions.csv").read_text(), newline="")))
        for row in rows[1:]:
            row[0] = Path(row[0]).name  # relative, as a run in the folder itself has them
            row[1] = "=HYPERLINK()"
        rows[1][0] = "</script><img src=x onerror=window.hacked=1>"
        (tmp_path / "decisions.csv").write_bytes(as_csv(rows))
        page = opened(write_report(tmp_path, RunFiles.read(tmp_path), title="<b>bold</b>"))
        assert page.inner_text("h1") == "<b>bold</b>"
        wanted = {row[0] for row in rows[1:]}
        page.locator(".card").first.click()
        seen = set()
        for number in range(len(wanted)):
            seen.add(page.locator("#large-path").text_content())
            page.keyboard.press("b" if number % 2 else "g")
            page.keyboard.press("ArrowRight")
        assert seen == wanted
        assert page.evaluate("window.hacked") is None
        page.keyboard.press("Escape")
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "corrections.csv")
        with (tmp_path / "corrections.csv").open(newline="", encoding="utf-8") as file:
            fields = [field for row in list(csv.reader(file))[1:] for field in row]
        assert not [field for field in fields if field.startswith(("=", "+", "-", "@"))]
        marked = [read_corrections(tmp_path / "corrections.csv", mark)["=HYPERLINK()"] for mark in ("good", "bad")]
        assert {path.removeprefix("./") for paths in marked for path in paths} == wanted

    def test_many_images_lie_beside_the_page(self, tmp_path: Path, opened: Callable[..., Page]) -> None:
        run = drawn_run(tmp_path, 60)
        many = [*run.images, *(InspectedImage(f"gone/{place}.png", "nut", 0.0001 * place) for place in range(1200))]
        (tmp_path / "report_files" / "older").mkdir(parents=True)
        path = write_report(tmp_path, RunFiles(many))
        (folder,) = (tmp_path / "report_files").iterdir()
        assert [file.name for file in sorted(folder.iterdir())] == ["0.js", "1.js", "2.js"]
        page = opened(path)
        page.wait_for_selector(".card img")
        first = sorted(many, key=lambda one: -(one.score or 0.0))[:60]
        assert page.locator(".card img:not(.heat)").count() == sum(one in run.images for one in first) > 40
        for _ in range(20):
            page.click("#after")
        assert page.inner_text("#page") == "21 of 21"
        page.wait_for_selector(".card .missing")

    def test_a_run_without_images_or_with_none_that_could_be_read(
        self, tmp_path: Path, opened: Callable[..., Page]
    ) -> None:
        page = opened(write_report(tmp_path / "empty", RunFiles([])))
        assert count(page, "images") == 0
        assert page.inner_text("#shown") == "0 of 0 images"
        images = [
            InspectedImage("gone.png", decision="unreadable"),
            InspectedImage("nan.png", "nut", float("nan"), "undecided"),
        ]
        page = opened(write_report(tmp_path / "none", RunFiles(images)))
        assert {name: count(page, name) for name in ("good", "anomalous", "undecided", "unreadable")} == {
            "good": 0,
            "anomalous": 0,
            "undecided": 1,
            "unreadable": 1,
        }
        page.check("#look")
        assert page.inner_text("#shown") == "2 of 2 images"
        page.locator(".card").first.click()
        assert "cannot be read" in page.inner_text("#large-view") or "gone" in page.inner_text("#large-view")

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [360, 1280])
    def test_text_can_be_read_and_nothing_is_wider_than_the_screen(
        self, tmp_path: Path, opened: Callable[..., Page], scheme: Any, width: int
    ) -> None:
        long = ["x" * 120 + f"{place}.png" for place in range(12)]
        page = opened(
            write_report(tmp_path, drawn_run(tmp_path, 12, names=long)),
            color_scheme=scheme,
            viewport={"width": width, "height": 800},
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ink, ground = (
            page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
        )
        assert contrast(ink, ground) >= 7.0
        for kind in (".anomalous", ".good", ".faint"):
            assert (
                contrast(page.evaluate(f"getComputedStyle(document.querySelector('.card {kind}')).color"), ground)
                >= 4.5
            )
        page.locator(".card").first.click()
        assert page.evaluate("document.getElementById('large').scrollWidth") <= width


def contrast(*colours: str) -> float:
    """Contrast of two colours as WCAG 2 has it."""
    lights = []
    for colour in colours:
        levels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [level / 12.92 if level <= 0.03928 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


class TestFiles:
    def test_a_thousand_images_of_noise_take_less_than_50_megabytes(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        rng, images = np.random.default_rng(0), []
        for place in range(4):
            Image.fromarray(rng.integers(0, 256, (400, 400, 3)).astype(np.uint8)).save(tmp_path / f"in/{place}.png")
            noise = rng.integers(0, 65536, (400, 400)).astype(np.uint16)
            Image.fromarray(noise).save(tmp_path / f"in/map{place}.png")
            images.append(
                InspectedImage(str(tmp_path / f"in/{place}.png"), score=0.5, map_file=tmp_path / f"in/map{place}.png")
            )
        path = write_report(tmp_path, RunFiles(images))
        assert path.stat().st_size / 4 * 1000 < 50e6

    def test_the_command_makes_a_page_of_the_files_of_a_run(self, tmp_path: Path, capsys: Any) -> None:
        drawn_run(tmp_path, 3)
        assert main(["report", str(tmp_path), "--title", "nuts & bolts"]) == 0
        text = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "<h1>nuts &amp; bolts</h1>" in text
        assert "3 images" in capsys.readouterr().out
        data = json.loads(text.split('id="data">')[1].split("</script>")[0])
        assert len(data["images"]) == len(data["copies"]) == 3
        assert all(copy.startswith("data:image/webp") for pair in data["copies"] for copy in pair)

    @pytest.mark.parametrize(
        ("name", "content", "text"),
        [
            ("decisions.csv", None, "There is no .*decisions.csv: give the folder of a run"),
            ("decisions.csv", b'"image_path","score"\n"x.png","1"\n', "has no column class_name, decision"),
            ("decisions.csv", b'"image_path","class_name","score","decision"\n"x.png"\n', "no whole table of CSV"),
            (
                "decisions.csv",
                b'"image_path","class_name","score","decision"\n"x","","high",""\n',
                "score must be a number",
            ),
            ("regions.csv", b'"image_path","left"\n"x.png","1"\n', "has no column top"),
            ("thresholds.json", b"{", "is no JSON"),
            ("thresholds.json", b"{}", "must hold a list"),
            ("thresholds.json", b'[{"name": "x", "image_cut": "a", "knots": []}]', "the entry 'image_cut' must be"),
        ],
    )
    def test_bad_files_are_named(
        self, tmp_path: Path, name: str, content: bytes | None, text: str, capsys: Any
    ) -> None:
        drawn_run(tmp_path, 2)
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            main(["report", str(tmp_path)])
        assert ended.value.code == 2
        assert re.search(text, capsys.readouterr().err)
        assert not (tmp_path / "report.html").exists()

    def test_a_map_elsewhere_is_not_read(self, tmp_path: Path) -> None:
        run = drawn_run(tmp_path / "run", 1)
        path = run.images[0].image_path
        shutil.copy(tmp_path / "run/maps/0.png", tmp_path / "secret.png")
        (tmp_path / "run/maps.csv").write_bytes(as_csv([["image_path", "map"], [path, "../secret.png"]]))
        assert RunFiles.read(tmp_path / "run").images[0].map_file is None

    def test_knots_are_the_scale(self, april_gan: Build, tmp_path: Path) -> None:
        model = april_gan(class_name="bottle", outputs=["report"], k_shot=1)
        engine(tmp_path).test(model, datamodule=category("bottle"), verbose=False)
        (one,) = RunFiles.read(next(tmp_path.rglob("decisions.csv")).parent).thresholds
        raw = torch.linspace(one.knots[0][0], one.knots[-1][0], 50)
        scaled_here = np.interp(raw.numpy(), *zip(*one.knots, strict=True))
        post = model.post_processor
        floor, ceiling = (end for end in post.fusion.range(post.map_ceiling))
        expected = post._decide("image", raw, floor, ceiling, values_of_images(post, None, len(raw)))[0]
        assert np.abs(scaled_here - expected.numpy()).max() < 1e-5
        assert one.image_cut == 0.5
