"""Drawings of results: one colour range for all, the outline where the threshold is, every file its own name."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from anomalib.visualization import Visualizer
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset

from anomalib_aprilgan.data.listing import listed_files
from anomalib_aprilgan.data.pre_processing import AprilGANPreProcessor
from anomalib_aprilgan.data.references import list_references
from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor
from anomalib_aprilgan.results.drawing import CONTOUR_COLOUR, TRUTH_COLOUR, Result, draw
from anomalib_aprilgan.results.file_names import output_folders
from anomalib_aprilgan.results.visualizer import AprilGANVisualizer

SIDE = 320  # of panels that are drawn as they are
LEFT, TOP, GAP = 12, 84, 12  # where the first panel lies, and what lies between two


def panel(drawing: Image.Image, number: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray[Any, Any]:
    """One of the panels side by side."""
    height, width = size
    left = LEFT + number * (width + GAP)
    return np.asarray(drawing)[TOP : TOP + height, left : left + width]


def spot(height: float, side: int = SIDE) -> torch.Tensor:
    """A map of 0.1 with a square of some height in the middle quarter."""
    values = torch.full((side, side), 0.1)
    values[side // 4 : side // 2, side // 4 : side // 2] = height
    return values


def coloured(pixels: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    return (pixels == np.array(colour)).all(axis=-1)


def trainer_of(folder: Path, files: list[Path] | None = None, **options: Any) -> Any:
    loader = None
    if files:
        dataset = PredictDataset(files[0])
        dataset.image_filenames = files
        loader = DataLoader(dataset)
    values = {"default_root_dir": str(folder), "testing": False, "world_size": 1, "global_rank": 0}
    return SimpleNamespace(**(values | {"predict_dataloaders": loader} | options))


def module_of(post_processor: Any = None, pre_processor: Any = None) -> Any:
    return SimpleNamespace(post_processor=post_processor or AprilGANPostProcessor(), pre_processor=pre_processor)


def batch_of(number: int = 1, **fields: Any) -> ImageBatch:
    values = {"image": torch.rand(number, 3, 32, 32), "anomaly_map": torch.rand(number, 32, 32)}
    return ImageBatch(**(values | fields))


# -- drawing ----------------------------------------------------------------------------------------------------------


def test_a_good_pixel_looks_the_same_whatever_the_rest_of_the_map_holds() -> None:
    image = torch.full((3, SIDE, SIDE), 0.5)
    panels = [panel(draw(Result(image, spot(height))), 1) for height in (0.1, 0.3, 0.6, 0.99)]
    good = [shown[-1, -1].tolist() for shown in panels]
    assert all(pixel == good[0] for pixel in good)
    assert max(good[0]) < 64  # dark
    assert (panels[0] == panels[0][0, 0]).all()  # a good part is as dark everywhere
    middle = [shown[120, 120].astype(int).sum() for shown in panels]
    assert middle == sorted(middle)
    assert panels[-1][120, 120].max() > 200  # a defect shines
    assert panels[-1][120, 120, 0] > 2 * panels[-1][-1, -1, 0]


def test_a_path_is_shown_as_seen_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = torch.full((3, SIDE, SIDE), 0.5)
    near = draw(Result(image, spot(0.6), name=str(tmp_path / "parts" / "7.png")))
    assert near == draw(Result(image, spot(0.6), name="parts/7.png"))
    assert near != draw(Result(image, spot(0.6), name=str(tmp_path.parent / "7.png")))


def test_colours_of_the_map_are_those_of_the_bar() -> None:
    black = torch.zeros(3, SIDE, SIDE)
    for value in (0.0, 0.75, 1.0):
        drawing = np.asarray(draw(Result(black, torch.full((SIDE, SIDE), value))))
        bar = drawing[TOP : TOP + SIDE, LEFT + 2 * SIDE + 2 * GAP + 2]
        expected = 0.8 * bar[round((1.0 - value) * (SIDE - 1))].astype(float)
        np.testing.assert_allclose(panel(Image.fromarray(drawing), 1)[5, 5], expected, atol=4)


def test_the_outline_is_where_the_map_crosses_the_threshold() -> None:
    shown = panel(draw(Result(torch.rand(3, SIDE, SIDE), spot(0.9), pixel_threshold=0.5)), 1)
    outline = coloured(shown, CONTOUR_COLOUR)
    expected = np.zeros((SIDE, SIDE), dtype=bool)
    expected[79:161, 79:161] = True  # one pixel on either side of the edge of 80:160
    expected[81:159, 81:159] = False
    expected[[79, 79, 160, 160], [79, 160, 79, 160]] = False
    np.testing.assert_array_equal(outline, expected)


@pytest.mark.parametrize(("height", "threshold"), [(0.5, 0.5), (0.9, None), (0.6, 0.7)])
def test_without_a_pixel_above_the_threshold_there_is_no_outline(height: float, threshold: float | None) -> None:
    shown = panel(draw(Result(torch.rand(3, SIDE, SIDE), spot(height), pixel_threshold=threshold)), 1)
    assert not coloured(shown, CONTOUR_COLOUR).any()


def test_the_ground_truth_has_a_panel_of_its_own() -> None:
    image = torch.full((3, SIDE, SIDE), 0.5)
    truth = spot(1.0) > 0.5
    drawing = draw(Result(image, spot(0.2), truth=truth, pixel_threshold=0.5))
    assert not coloured(panel(drawing, 0), TRUTH_COLOUR).any()
    assert coloured(panel(drawing, 1), TRUTH_COLOUR)[79:81, 100:140].all()
    assert not coloured(panel(drawing, 2), TRUTH_COLOUR).any()
    good = draw(Result(image, spot(0.2), truth=torch.zeros(SIDE, SIDE)))
    np.testing.assert_array_equal(panel(good, 1), panel(good, 0))


def test_maps_of_any_size_lie_where_they_belong_on_images_of_any_shape() -> None:
    values = torch.zeros(16, 16)  # a square map of an upright image
    values[12:, :4] = 1.0
    shown = panel(draw(Result(torch.full((3, 640, 320), 0.5), values, pixel_threshold=0.5)), 1, (640, 320))
    rows, columns = np.nonzero(coloured(shown, CONTOUR_COLOUR))
    assert abs(rows.min() - 480) <= 2
    assert abs(columns.max() - 80) <= 2


def test_wide_images_lie_below_each_other() -> None:
    drawing = draw(Result(torch.full((3, 200, 600), 0.5), torch.zeros(32, 32)))
    assert drawing.width < 750
    assert drawing.height > 500
    assert np.asarray(drawing)[TOP + 200 + 24 + GAP + 5, LEFT + 5].tolist() == [57, 57, 57]  # 0.45 * 128


def test_large_images_are_drawn_small_and_keep_a_spot_of_one_pixel() -> None:
    values = torch.zeros(3000, 2400)
    values[1501, 1201] = 0.9
    truth = values > 0.5
    drawing = draw(Result(torch.zeros(3, 3000, 2400), values, truth=truth, pixel_threshold=0.5), max_side=300)
    assert max(drawing.size) < 1000
    for number, colour in ((1, TRUTH_COLOUR), (2, CONTOUR_COLOUR)):
        rows, columns = np.nonzero(coloured(panel(drawing, number, (300, 240)), colour))
        assert abs(rows.mean() - 150) <= 1
        assert abs(columns.mean() - 120) <= 1


def test_small_images_are_enlarged_and_keep_their_values() -> None:
    image = torch.tensor([[0.0, 1.0], [0.2, 0.6]]).repeat(3, 1, 1)
    shown = panel(draw(Result(image)))
    assert [shown[row, column, 0] for row in (0, -1) for column in (0, -1)] == [0, 255, 51, 153]
    assert set(shown.flatten().tolist()) == {0, 255, 51, 153}


def test_without_map_score_and_decision_the_image_is_still_drawn() -> None:
    pixels = torch.randint(256, (3, SIDE, SIDE))
    drawing = draw(Result(pixels / 255, name="x" * 500))
    np.testing.assert_array_equal(panel(drawing), pixels.permute(1, 2, 0).numpy())
    assert drawing.width < SIDE + 100


def test_the_decision_has_its_colour() -> None:
    image = torch.rand(3, SIDE, SIDE)
    chips = [
        draw(Result(image, score=0.7, is_anomalous=said, image_threshold=0.5)).getpixel((16, 22))
        for said in (True, False, None)
    ]
    assert chips == [(200, 40, 40), (30, 130, 60), (90, 90, 90)]


def test_a_raw_map_is_drawn_as_the_end_of_the_range() -> None:
    image = torch.rand(3, SIDE, SIDE)
    raw, scaled = (draw(Result(image, torch.full((SIDE, SIDE), value))) for value in (3.7, 1.0))
    np.testing.assert_array_equal(panel(raw, 1), panel(scaled, 1))
    assert raw != scaled  # the text below says so


def test_a_map_in_half_precision_is_drawn() -> None:
    image = torch.rand(3, SIDE, SIDE)
    whole, half = (draw(Result(image, spot(0.75).to(dtype))) for dtype in (torch.float32, torch.bfloat16))
    np.testing.assert_allclose(panel(half, 1).astype(int), panel(whole, 1).astype(int), atol=3)


def test_a_panel_too_small_to_see_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`max_side` must be at least 64 pixels, got 8\."):
        AprilGANVisualizer(max_side=8)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_16_bit_image_looks_like_its_8_bit_twin(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "eight.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    names = [str(tmp_path / f"{name}.png") for name in ("eight", "sixteen")]
    visualizer = AprilGANVisualizer()
    batch = batch_of(2, image_path=names, anomaly_map=torch.zeros(2, 32, 32))
    visualizer.on_predict_batch_end(trainer_of(tmp_path / "out"), module_of(), batch, batch, 0)
    eight, sixteen = (
        panel(Image.open(tmp_path / "out" / "images" / tmp_path.name / Path(name).name)) for name in names
    )
    np.testing.assert_array_equal(eight[..., 0], pixels)
    np.testing.assert_array_equal(sixteen, eight)


def test_names_do_not_collide(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "left" / "0.png", tmp_path / "b" / "left" / "0.png", tmp_path / "b" / "left" / "0.jpg"]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(file, quality=100)
    visualizer = AprilGANVisualizer()
    trainer = trainer_of(tmp_path / "out", files)
    visualizer.on_predict_start(trainer, module_of())
    batch = batch_of(3, image_path=[str(file) for file in files])
    visualizer.on_predict_batch_end(trainer, module_of(), batch, batch, 0)
    images = tmp_path / "out" / "images"
    drawn = {str(path.relative_to(images)) for path in images.rglob("*.*")}
    assert drawn == {"a/left/0.png", "b/left/0.png", "b/left/0.jpg.png"}
    assert panel(Image.open(images / "b" / "left" / "0.png"))[0, 0, 0] == 1


def test_folders_are_those_of_anomalib_as_long_as_they_differ() -> None:
    assert output_folders(["/d/good/0.png", "/d/bad/0.png"], None, None) == {
        Path("/d/good"): Path("good"),
        Path("/d/bad"): Path("bad"),
    }
    bottle = "/data/MVTecAD/bottle/test/good"
    assert output_folders([f"{bottle}/0.png"], "MVTecAD", "bottle") == {Path(bottle): Path("test/good")}
    several = ["/d/bottle/test/good/0.png", "/d/nut/test/good/0.png", "/d/0.png"]
    assert output_folders(several, "MultiCategoryData", None) == {
        Path("/d/bottle/test/good"): Path("bottle/test/good"),
        Path("/d/nut/test/good"): Path("nut/test/good"),
        Path("/d"): Path(),
    }
    assert output_folders([], None, None) == {}


def test_images_without_a_path_are_numbered_and_drawn_as_they_were(tmp_path: Path) -> None:
    image = torch.full((2, 3, 32, 32), 0.4)
    pre_processor = AprilGANPreProcessor((32, 32))
    batch = batch_of(2, image=pre_processor(image))
    visualizer = AprilGANVisualizer(output_dir=tmp_path / "elsewhere")
    trainer = trainer_of(tmp_path, world_size=2, global_rank=1)
    for _ in range(2):
        visualizer.on_predict_batch_end(trainer, module_of(pre_processor=pre_processor), batch, batch, 0)
    names = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert names == ["000001.png", "000003.png", "000005.png", "000007.png"]
    assert (panel(Image.open(tmp_path / "elsewhere" / names[0])) == 102).all()


def test_a_name_that_is_no_file_is_drawn_from_the_batch(tmp_path: Path) -> None:
    batch = batch_of(image=torch.full((1, 3, 32, 32), 0.4), image_path=["camera/7"])
    AprilGANVisualizer().on_test_batch_end(trainer_of(tmp_path), module_of(), batch, batch, 0)
    assert (panel(Image.open(tmp_path / "images" / "camera" / "7.png")) == 102).all()


def test_tiled_images_are_not_read_again(tmp_path: Path) -> None:
    batch = batch_of(image=torch.full((1, 3, 32, 32), 0.4), image_path=[str(tmp_path / "none.png")])
    pre_processor = AprilGANPreProcessor((16, 16), tiled=True)
    AprilGANVisualizer().on_test_batch_end(trainer_of(tmp_path), module_of(None, pre_processor), batch, batch, 0)
    (path,) = (tmp_path / "images").rglob("*.png")
    assert (panel(Image.open(path)) == 102).all()


@pytest.mark.parametrize("sensitivity", [0.5, 0.2])
def test_the_outline_follows_the_sensitivity(tmp_path: Path, sensitivity: float) -> None:
    post_processor = AprilGANPostProcessor(pixel_sensitivity=sensitivity)
    batch = batch_of(image=torch.rand(1, 3, SIDE, SIDE), anomaly_map=spot(0.7)[None])
    AprilGANVisualizer().on_predict_batch_end(trainer_of(tmp_path), module_of(post_processor), batch, batch, 0)
    shown = panel(Image.open(tmp_path / "images" / "000000.png"), 1)
    assert coloured(shown, CONTOUR_COLOUR).any() == (sensitivity == 0.5)  # 0.7 is below 1 - 0.2


class ThresholdsOfTwoClasses(PostProcessor):
    normalized_image_threshold = torch.tensor([0.25, 0.75])
    normalized_pixel_threshold = torch.tensor([0.5, 0.8])


def test_the_outline_of_an_image_is_at_the_threshold_of_its_class(tmp_path: Path) -> None:
    module = module_of(ThresholdsOfTwoClasses())
    module.rows_of = lambda _: torch.tensor([1, 0])
    results: list[Result] = []
    visualizer = AprilGANVisualizer()
    visualizer.visualize = lambda result: results.append(result) or draw(result)
    batch = batch_of(2, anomaly_map=spot(0.7).expand(2, -1, -1))
    visualizer.on_test_batch_end(trainer_of(tmp_path), module, batch, batch, 0)
    assert [result.image_threshold for result in results] == [0.75, 0.25]
    outlined = [
        coloured(panel(Image.open(tmp_path / "images" / f"00000{number}.png"), 1), CONTOUR_COLOUR).any()
        for number in range(2)
    ]
    assert outlined == [False, True]


def test_files_of_all_kinds_of_data_are_listed(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    data = PredictDataset(tmp_path)
    both = ConcatDataset([Subset(data, [2, 0]), data])
    names = [Path(file).stem for file in listed_files([DataLoader(both), DataLoader(torch.arange(3))])]
    assert names == ["c", "a", "a", "b", "c"]
    assert listed_files(None) == []


# -- in the model -----------------------------------------------------------------------------------------------------


def test_it_is_the_default_and_every_run_has_its_folder(tmp_path: Path, april_gan: Any) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    Image.effect_noise((48, 64), 80).save(folder / "0.png")
    model = april_gan()
    assert type(model.visualizer) is AprilGANVisualizer
    assert isinstance(model.visualizer, Visualizer)
    for run in ("one", "two"):
        engine = Engine(default_root_dir=tmp_path / run, accelerator="cpu", enable_progress_bar=False)
        engine.predict(model, data_path=folder)
        (path,) = (tmp_path / run).glob("AprilGAN/latest/images/**/*.png")
        assert path.parts[-2:] == ("parts", "0.png")
        assert Image.open(path).height == TOP + SIDE + 24 + LEFT


# -- what must not end a run ------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in "ab":
        Image.effect_noise((32, 32), 80).save(folder / f"{name}.png")
    return folder


def engine_of(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, logger=False)


@pytest.fixture
def odd_parts(tmp_path: Path) -> list[Path]:
    """Images under names that are hard to draw, to write or to print."""
    folder = tmp_path / "parts"
    folder.mkdir()
    names = [b"line\nbreak.png", b"bell\x07.jpg", b"x" * 251 + b".png", b"y" * 251 + b".jpg", b"\xff.png", b"plain.png"]
    paths = [folder / os.fsdecode(name) for name in names]
    for path in paths:
        Image.effect_noise((32, 32), 80).save(path)
    return paths


def test_odd_names_are_drawn_and_decided(tmp_path: Path, odd_parts: list[Path], april_gan: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is no drawing")
        batches = engine_of(tmp_path).predict(april_gan(), data_path=odd_parts[0].parent)
    assert {name for batch in batches for name in batch.image_path} == set(map(str, odd_parts))
    (table,) = tmp_path.rglob("decisions.csv")
    with table.open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert {row["image_path"] for row in rows} == set(map(str, odd_parts))
    assert {row["decision"] for row in rows} <= {"good", "anomalous"}
    drawings = {path.name for path in tmp_path.rglob("images/**/*.png")}
    assert len(drawings) == len(odd_parts)
    assert {"line\nbreak.png", "bell\x07.jpg.png", "plain.png"} <= drawings


def test_a_drawing_that_fails_is_a_warning_that_names_the_image(
    tmp_path: Path, parts: Path, april_gan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: AprilGANVisualizer, result: Result) -> Image.Image:
        if result.name.endswith("a.png"):
            msg = "no font for this"
            raise OSError(msg)
        return draw(result, 64)

    monkeypatch.setattr(AprilGANVisualizer, "visualize", fail)
    with pytest.warns(UserWarning, match=r"There is no drawing of '.*a\.png': no font for this"):
        engine_of(tmp_path).predict(april_gan(), data_path=parts)
    (table,) = tmp_path.rglob("decisions.csv")
    names = [Path(line.split('"')[1]).name for line in table.read_text().splitlines()[1:]]
    assert names == sorted(path.name for path in parts.iterdir())
    assert {path.name for path in tmp_path.rglob("images/**/*.png")} == set(names) - {"a.png"}


def test_drawings_of_earlier_runs_are_not_inspected(
    tmp_path: Path, parts: Path, april_gan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parts)
    counts = []
    for _ in range(2):
        batches = engine_of(parts / "results").predict(april_gan(), data_path=parts)
        counts.append(len(batches))
        drawings = list(parts.rglob("images/**/*.png"))
        assert drawings
    assert counts == [2, 2]
    assert list_references(parts) == sorted(parts.glob("*.png"))
    # What is asked for by its own path is inspected; a folder of drawings alone is an error.
    assert len(engine_of(tmp_path / "one").predict(april_gan(), data_path=drawings[0])) == 1
    with pytest.raises(ValueError, match=r"`data` holds only drawings of earlier results, such as"):
        engine_of(tmp_path / "all").predict(april_gan(), data_path=drawings[0].parent)
