"""The table of decisions: a row per image, as predicted, in the order of the data."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.engine import Engine
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_aprilgan.data.multi_category import ClassImageBatch
from anomalib_aprilgan.data.reading import UnreadableImageError
from anomalib_aprilgan.results import table
from anomalib_aprilgan.results.table import DecisionsWriter, Row, in_order


def row(path: str, score: str = "0.5") -> Row:
    return Row(path, "nut", score, "good", "")


def module_of(*class_names: str, rows: Any = ()) -> Any:
    return SimpleNamespace(classes=SimpleNamespace(names=class_names), rows_of=lambda _: torch.tensor(rows))


def trainer_of(folder: Path, **options: Any) -> Any:
    values = {"default_root_dir": str(folder), "testing": True, "global_rank": 0, "test_dataloaders": None}
    values |= {"is_global_zero": not options.get("global_rank")}
    return SimpleNamespace(**(values | options))


def read(path: Path) -> list[str]:
    """The rows of a table, their fields joined by bars."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return ["|".join(fields) for fields in csv.reader(file)]


def table_of(folder: Path, *batches: Any, module: Any = None, **options: Any) -> list[str]:
    """Rows of the table of a test with these batches."""
    writer, trainer = DecisionsWriter(), trainer_of(folder, **options)
    writer.on_test_start(trainer, module or module_of("nut"))
    for number, batch in enumerate(batches):
        writer.on_test_batch_end(trainer, module or module_of("nut"), batch, batch, number)
    writer.on_test_end(trainer, module or module_of("nut"))
    return read(folder / "decisions.csv")


def batch_of(*names: str, batch_class: Any = ImageBatch, **fields: Any) -> Any:
    return batch_class(image=torch.rand(len(names), 3, 8, 8), image_path=list(names), **fields)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder of three images and a broken one."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("a", "c", "d"):
        Image.effect_noise((48, 64), 80).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"broken")
    return folder


def engine_of(folder: Path, **options: Any) -> Engine:
    return Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, **options)


def test_rows_of_a_test_have_labels(tmp_path: Path) -> None:
    batch = batch_of(
        "x.png",
        "y, z.png",
        pred_score=torch.tensor([0.1, 0.7]),
        pred_label=torch.tensor([False, True]),
        gt_label=torch.tensor([True, True]),
    )
    assert table_of(tmp_path, batch) == [
        "image_path|class_name|score|decision|label",
        "x.png|nut|0.1|good|anomalous",
        "y, z.png|nut|0.7|anomalous|anomalous",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["decisions.csv"]  # no temporary file stays


def test_scores_come_back_to_the_last_bit(tmp_path: Path) -> None:
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0))
    table_of(tmp_path, batch_of(*(f"{n}.png" for n in range(50)), pred_score=scores))
    found = pd.read_csv(tmp_path / "decisions.csv", dtype={"score": np.float32})
    np.testing.assert_array_equal(found.score, scores.numpy())


def test_the_class_is_the_one_the_model_judged_by(tmp_path: Path) -> None:
    scores = torch.tensor([0.25, 0.5])
    batch = batch_of("x.png", "y.png", pred_score=scores)
    several = table_of(tmp_path, batch, module=module_of("nut", "tile", rows=[1, 0]))
    assert several[1:] == ["x.png|tile|0.25||", "y.png|nut|0.5||"]
    told = batch_of("x.png", "y.png", batch_class=ClassImageBatch, class_name=["p", "q"], pred_score=scores)
    assert table_of(tmp_path, told)[1:] == ["x.png|p|0.25||", "y.png|q|0.5||"]


def test_without_path_and_score_there_is_an_empty_row(tmp_path: Path) -> None:
    assert table_of(tmp_path, ImageBatch(image=torch.rand(1, 3, 8, 8)), module=module_of())[1:] == ["||||"]


def test_names_that_are_no_unicode_are_written(tmp_path: Path) -> None:
    table = DecisionsWriter(tmp_path / "new" / "own.csv")
    trainer = trainer_of(tmp_path)
    batch = batch_of("\udcff.png", pred_score=torch.tensor([0.5]))
    table.on_test_batch_end(trainer, module_of("nut"), batch, batch, 0)
    table.on_test_end(trainer, module_of("nut"))
    assert b'"\xff.png","nut","0.5","",""' in (tmp_path / "new" / "own.csv").read_bytes()


def test_all_fields_are_quoted_and_odd_names_come_back(tmp_path: Path) -> None:
    names = ["line\nbreak.png", 'a "quoted", one.png', "tab\t\x07.png", "=1+1.png", "part;\r.png"]
    scores = torch.tensor([0.5] * len(names))
    table_of(tmp_path, batch_of(*names, pred_score=scores), module=module_of("nut", rows=[0] * len(names)))
    text = (tmp_path / "decisions.csv").read_bytes()
    assert text.startswith(
        b'"image_path","class_name","score","decision","label"\n"line\nbreak.png","nut","0.5","",""\n'
    )
    with (tmp_path / "decisions.csv").open(newline="") as file:
        assert [row["image_path"] for row in csv.DictReader(file)] == names


def test_the_table_grows_and_an_older_one_goes_with_the_first_batch(tmp_path: Path) -> None:
    writer, trainer, path = DecisionsWriter(), trainer_of(tmp_path), tmp_path / "decisions.csv"
    path.write_text("older")
    writer.on_test_start(trainer, module_of())
    assert path.read_text() == "older"
    for number, name in enumerate(("x.png", "y.png")):
        batch = batch_of(name, pred_score=torch.tensor([0.5]))
        writer.on_test_batch_end(trainer, module_of(), batch, batch, number)
        assert read(path)[1:] == ["x.png||0.5||", "y.png||0.5||"][: number + 1]
    writer.on_test_start(trainer, module_of())  # after an interruption
    assert len(read(path)) == 3
    writer.on_test_end(trainer, module_of())
    assert read(path) == ["image_path|class_name|score|decision|label"]
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_cannot_be_read_are_in_the_growing_table(tmp_path: Path) -> None:
    loader = SimpleNamespace(unreadable=[])
    writer, trainer = DecisionsWriter(), trainer_of(tmp_path, test_dataloaders=[loader])
    writer.on_test_start(trainer, module_of())
    for number, name in enumerate(("b.png", "d.png")):
        loader.unreadable.append(UnreadableImageError.of(Path(f"{number}.png"), "broken"))
        batch = batch_of(name, pred_score=torch.tensor([0.5]))
        writer.on_test_batch_end(trainer, module_of(), batch, batch, number)
    assert read(tmp_path / "decisions.csv")[1:] == [
        "0.png|||unreadable|", "b.png||0.5||", "1.png|||unreadable|", "d.png||0.5||",
    ]  # fmt: skip


def test_a_score_that_is_not_a_number_decides_nothing(tmp_path: Path) -> None:
    scores, labels = torch.tensor([float("nan"), float("inf"), 0.25]), torch.tensor([False, True, False])
    lines = table_of(tmp_path, batch_of("x.png", "y.png", "z.png", pred_score=scores, pred_label=labels))
    assert lines[1:] == ["x.png|nut|nan|undecided|", "y.png|nut|inf|undecided|", "z.png|nut|0.25|good|"]


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{tmp_path / 'file'} cannot be written.*choose another folder"):
        DecisionsWriter(tmp_path / "file" / "own.csv").on_test_start(trainer_of(tmp_path), module_of())


def test_rows_are_put_in_the_order_of_the_data() -> None:
    rows = [row("c"), row("memory", "0.1"), row("a"), row("memory", "0.2"), row("b")]
    ordered = in_order(rows, ["a", "b", "not looked at", "c"])
    assert [(one.image_path, one.score) for one in ordered] == [
        ("a", "0.5"),
        ("b", "0.5"),
        ("c", "0.5"),
        ("memory", "0.1"),
        ("memory", "0.2"),
    ]


def test_what_a_sampler_repeats_is_left_out_and_what_the_data_repeat_is_not() -> None:
    rows = [row("a"), row("b"), row("a"), row("a")]
    assert [one.image_path for one in in_order(rows, ["a", "b"])] == ["a", "b"]
    assert [one.image_path for one in in_order(rows, ["a", "b", "a"])] == ["a", "b", "a"]


def test_the_first_process_writes_the_rows_of_all(tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, c, d = (str(parts / f"{name}.png") for name in "acd")
    (parts / "b.png").unlink()
    loader = DataLoader(PredictDataset(parts))
    other = [Row(c, "nut", "0.9", "anomalous", ""), Row(a, "nut", "0.25", "good", "")]  # padded with the first
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def all_gather_object(of_rank: list[Any], own: Any) -> None:
        of_rank[:] = [own, other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    own = batch_of(a, d, pred_score=torch.tensor([0.25, 0.5]))
    lines = table_of(tmp_path, own, test_dataloaders=loader)
    assert lines[1:] == [f"{a}|nut|0.25||", f"{c}|nut|0.9|anomalous|", f"{d}|nut|0.5||"]
    # The others have tables of their own until the run ends.
    writer, second = DecisionsWriter(), trainer_of(tmp_path, test_dataloaders=loader, global_rank=1)
    writer.on_test_start(second, module_of("nut"))
    writer.on_test_batch_end(second, module_of("nut"), own, own, 0)
    assert read(tmp_path / "decisions.rank1.csv")[1:] == [f"{a}|nut|0.25||", f"{d}|nut|0.5||"]
    writer.on_test_end(second, module_of("nut"))
    assert [path.name for path in tmp_path.glob("*.csv")] == ["decisions.csv"]
    assert read(tmp_path / "decisions.csv") == lines


# -- in the model -----------------------------------------------------------------------------------------------------


def test_a_prediction_leaves_a_table(
    tmp_path: Path, parts: Path, april_gan: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = april_gan(class_name="metal nut", visualizer=False)
    with caplog.at_level(logging.INFO, logger=table.rank_zero_info.__module__):
        batches = engine_of(tmp_path).predict(model, data_path=parts)
    (path,) = tmp_path.rglob("decisions.csv")
    assert path.parent == (tmp_path / "AprilGAN" / "latest").resolve()
    lines = read(path)
    assert lines[0] == "image_path|class_name|score|decision"
    assert lines[2] == f"{parts / 'b.png'}|||unreadable"
    predicted = pd.read_csv(path, dtype={"score": np.float32}).drop(index=1)
    assert predicted.image_path.tolist() == [name for batch in batches for name in batch.image_path]
    np.testing.assert_array_equal(predicted.score, torch.cat([batch.pred_score for batch in batches]).numpy())
    words = ["anomalous" if batch.pred_label.item() else "good" for batch in batches]
    assert predicted.decision.tolist() == words
    assert set(predicted.class_name) == {"metal nut"}


def test_without_a_post_processor_scores_are_raw_and_nothing_is_decided(
    tmp_path: Path, parts: Path, april_gan: Any
) -> None:
    model = april_gan(post_processor=False, visualizer=False)
    batches = engine_of(tmp_path).predict(model, data_path=parts / "a.png")
    (path,) = tmp_path.rglob("decisions.csv")
    assert read(path)[1] == f"{parts / 'a.png'}|object|{batches[0].pred_score.numpy()[0]!s}|"


def test_a_writer_of_the_trainer_takes_the_place_of_the_default(tmp_path: Path, parts: Path, april_gan: Any) -> None:
    own = DecisionsWriter(tmp_path / "own.csv")
    model = april_gan(visualizer=False)
    engine = engine_of(tmp_path, callbacks=[own])
    batches = engine.predict(model, data_path=parts / "a.png")
    assert [path.name for path in tmp_path.rglob("*.csv")] == ["own.csv"]
    # The trainer has it before the model's callbacks, and its scores are post-processed.
    assert pd.read_csv(own.path, dtype={"score": np.float32}).score.item() == batches[0].pred_score.item()
    callbacks = engine.trainer.callbacks
    assert [callback for callback in callbacks if isinstance(callback, DecisionsWriter)] == [own]


def test_a_model_without_a_trainer_has_its_callbacks(april_gan: Any) -> None:
    model = april_gan()
    assert isinstance(model.configure_callbacks()[0], DecisionsWriter)  # a row before the drawing
    model._trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert sum(isinstance(callback, DecisionsWriter) for callback in model.configure_callbacks()) == 1
