"""The classes of a model: names, words, and the row of each in everything that is per class."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch
from torchvision.tv_tensors import Image

from anomalib_aprilgan.classes import (
    Classes,
    class_of_file,
    images_of_row,
    names_of,
    rows_of,
    rows_of_batch,
    words_by_name,
)
from anomalib_aprilgan.data.multi_category import ClassImageBatch

NAMES = ("bolt", "nut", "pill")
CLASSES = Classes.of({"bolt": "bolt", "nut": "metal nut", "pill": "pill"})
WITH_DEFAULT = Classes.of({"bolt": "bolt", "nut": "metal nut", "pill": "pill"}, "nut")
ONE = Classes.of({"nut": "metal nut"})
CPU = torch.device("cpu")


def batch(*paths: str, class_name: list[str] | None = None) -> Any:
    image = Image(torch.rand(len(paths) or len(class_name or ()), 3, 8, 8))
    if class_name is not None:
        return ClassImageBatch(image=image, class_name=class_name)
    return ImageBatch(image=image, image_path=list(paths))


class TestRows:
    def test_the_place_of_a_class_is_its_row(self) -> None:
        assert (CLASSES.names, CLASSES.words, len(CLASSES)) == (NAMES, ("bolt", "metal nut", "pill"), 3)
        assert CLASSES.rows(["pill", "bolt", "pill", "nut"]) == [2, 0, 2, 1]
        assert CLASSES.rows([]) == []

    def test_words_are_no_names(self) -> None:
        with pytest.raises(ValueError, match="metal nut belongs to none of the classes"):
            CLASSES.rows(["metal nut"])

    def test_unknown_class(self) -> None:
        text = (
            r"gear belongs to none of the classes \('bolt', 'nut', 'pill'\)\. Name the folder .* or set `default_class`"
        )
        with pytest.raises(ValueError, match=text):
            CLASSES.rows(["nut", "rod", "gear"])
        assert WITH_DEFAULT.rows(["nut", "rod", "pill"]) == [1, 1, 2]

    def test_by_name_or_row(self) -> None:
        assert [CLASSES.row(name) for name in ("pill", 0)] == [2, 0]
        for name in ("gear", 3, -1):
            with pytest.raises(ValueError, match=rf"`name` must be one of bolt, nut, pill, got {name!r}\."):
                CLASSES.row(name)

    def test_for_the_names_that_a_caller_gives(self) -> None:
        assert CLASSES.rows_for("pill", 3, CPU).tolist() == [2, 2, 2]
        assert CLASSES.rows_for(["pill", "bolt"], 2, CPU).tolist() == [2, 0]
        assert WITH_DEFAULT.rows_for(None, 2, CPU).tolist() == [1, 1]
        assert ONE.rows_for(None, 2, CPU).tolist() == [0, 0]
        assert ONE.rows_for("nut", 0, CPU).dtype == torch.long

    def test_a_name_is_needed_to_choose(self) -> None:
        text = r"`class_name` is needed to choose among the classes .*'pill'\), got None"
        with pytest.raises(ValueError, match=text):
            CLASSES.rows_for(None, 2, CPU)

    @pytest.mark.parametrize("classes", [CLASSES, ONE])
    def test_a_caller_names_an_unknown_class(self, classes: Classes) -> None:
        with pytest.raises(ValueError, match="no such class belongs to none of the classes"):
            classes.rows_for("no such class", 2, CPU)

    @pytest.mark.parametrize("classes", [CLASSES, ONE])
    @pytest.mark.parametrize("number", [1, 3])
    def test_a_caller_names_a_class_for_each_image_or_one_for_all(self, classes: Classes, number: int) -> None:
        with pytest.raises(ValueError, match=r"`class_name`"):
            classes.rows_for(["nut", "nut"], number, CPU)

    def test_of_an_export(self) -> None:
        assert (ONE.default_row(), WITH_DEFAULT.default_row()) == (0, 1)
        with pytest.raises(ValueError, match=r"one class: set `default_class` to one of \('bolt', 'nut', 'pill'\)"):
            CLASSES.default_row()

    def test_one_alone(self) -> None:
        assert WITH_DEFAULT.of_row(1) == ONE


class TestKept:
    def test_a_class_stays_the_same_under_its_name(self) -> None:
        others = Classes.of({"pill": "tablet", "gear": "gear", "bolt": "bolt"})
        assert CLASSES.kept_in(others) == [2, None, 0]
        assert Classes().kept_in(others) == [None, None, None]

    def test_the_only_class_stays_the_same_under_another_name(self) -> None:
        assert ONE.kept_in(Classes.of({"gear": "gear"})) == [0]
        assert CLASSES.kept_in(Classes.of({"gear": "gear"})) == [None]
        assert ONE.kept_in(CLASSES) == [None, 0, None]


class TestWordsByName:
    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (None, None),
            ("metal nut", {"metal nut": "metal nut"}),
            (["nut", "bolt"], {"nut": "nut", "bolt": "bolt"}),
            ({"pcb1": "circuit board", "pcb2": "board"}, {"pcb1": "circuit board", "pcb2": "board"}),
        ],
    )
    def test_forms(self, given: Any, words: dict[str, str] | None) -> None:
        assert words_by_name(given) == words

    @pytest.mark.parametrize(
        ("given", "text"),
        [
            ([], r"`class_name` must name at least one class, got none\."),
            ({}, r"`class_name` must name at least one class, got none\."),
            (["nut", "nut"], r"`class_name` must not repeat a name, got \['nut', 'nut'\]\."),
            ({"a": "Nut", "b": "nut "}, r"`class_name` has the same words 'Nut' for a and b\. Give each its own\."),
        ],
    )
    def test_unusable(self, given: Any, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            words_by_name(given)


class TestClassOfFile:
    def test_is_the_nearest_folder_of_that_name(self) -> None:
        assert class_of_file("/data/nut/test/bolt/good/1.png", NAMES, Path("/data")) == "bolt"
        assert class_of_file("/data/nut/1.png", NAMES, Path("/data/nut")) == "nut"

    def test_folders_above_the_data_say_nothing(self) -> None:
        assert class_of_file("/home/nut/data/1.png", NAMES, Path("/home/nut/data")) == "/home/nut/data/1.png"
        assert class_of_file("/home/nut/data/bolt/1.png", NAMES, Path("/home/nut/data")) == "bolt"

    def test_the_name_of_the_file_says_nothing(self) -> None:
        assert class_of_file("/data/nut", NAMES, Path("/data")) == "/data/nut"

    def test_where_the_data_lie_is_not_known(self) -> None:
        assert class_of_file("/data/nut/good/1.png", NAMES, None) == "nut"

    def test_relative_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert class_of_file("nut/1.png", NAMES, tmp_path) == "nut"


class TestBatches:
    def test_the_batch_tells(self) -> None:
        given = batch(class_name=["pill", "bolt"])
        assert rows_of_batch(CLASSES, given, "nut", None).tolist() == [2, 0]

    def test_the_data_tell(self) -> None:
        assert rows_of_batch(CLASSES, batch("/d/pill/1.png", "/d/2.png"), "nut", Path("/d")).tolist() == [1, 1]

    def test_a_folder_tells(self) -> None:
        given = batch("/d/pill/1.png", "/d/bolt/good/2.png")
        for category in (None, "gear"):
            assert rows_of_batch(CLASSES, given, category, Path("/d")).tolist() == [2, 0]

    def test_nothing_tells(self) -> None:
        for given in (batch("/nut/d/1.png"), ImageBatch(image=Image(torch.rand(1, 3, 8, 8)))):
            with pytest.raises(ValueError, match="belongs to none of the classes"):
                rows_of_batch(CLASSES, given, None, Path("/nut/d"))
            assert rows_of_batch(WITH_DEFAULT, given, None, Path("/nut/d")).tolist() == [1]

    def test_where_images_were_read_from_is_not_the_folder_of_the_program(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "pill" / "work").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "pill" / "work")
        given = ImageBatch(image=Image(torch.rand(1, 3, 8, 8)))  # from memory: no path
        assert rows_of_batch(WITH_DEFAULT, given, None, None).tolist() == [1]

    @pytest.mark.parametrize("classes", [ONE, Classes()])
    def test_one_class_needs_no_telling(self, classes: Classes) -> None:
        rows = rows_of_batch(classes, batch("/d/gear/1.png", "/d/2.png"), None, None)
        assert (rows.tolist(), rows.dtype) == ([0, 0], torch.long)

    def test_models_without_classes_are_of_one(self) -> None:
        given = batch("a.png", "b.png")
        assert rows_of(SimpleNamespace(), given).tolist() == [0, 0]
        assert rows_of(SimpleNamespace(rows_of=lambda _: torch.tensor([1, 0])), given).tolist() == [1, 0]
        assert names_of(SimpleNamespace()) == names_of(None) == ()
        assert names_of(SimpleNamespace(classes=CLASSES)) == NAMES


def test_images_of_a_row_have_the_fields_of_the_batch() -> None:
    given = ClassImageBatch(
        image=Image(torch.rand(4, 3, 8, 8)),
        gt_label=torch.tensor([0, 1, 1, 0]),
        pred_score=torch.tensor([0.1, 0.2, 0.3, 0.4]),
        class_name=["tile", "nut", "tile", "nut"],
    )
    part = images_of_row(given, torch.tensor([2, 0, 2, 0]), 0)
    torch.testing.assert_close(part.pred_score, torch.tensor([0.2, 0.4]))
    assert part.gt_label.tolist() == [1, 0]
    assert part.gt_mask is part.anomaly_map is None
    assert images_of_row(given, torch.tensor([2, 0, 2, 0]), 1).pred_score.shape == (0,)
