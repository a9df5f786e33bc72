"""What writers of results share: their place among the callbacks, both stages alike, and the classes of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch

from anomalib_aprilgan.classes import names_of, rows_of
from anomalib_aprilgan.results.callback import ResultWriter


class Writer(ResultWriter):
    """Notes what is called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def start(self, trainer: Any, pl_module: Any, loaders: object) -> None:
        del trainer, pl_module
        self.calls.append(("start", loaders))

    def write_batch(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        del trainer, pl_module
        self.calls.append(batch)

    def finish(self, trainer: Any, pl_module: Any, loaders: object) -> None:
        del trainer, pl_module
        self.calls.append(("finish", loaders))


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_writer_does_the_same_in_tests_and_predictions(stage: str) -> None:
    trainer: Any = SimpleNamespace(
        test_dataloaders="of test", predict_dataloaders="of predict", testing=stage == "test"
    )
    writer = Writer()
    getattr(writer, f"on_{stage}_start")(trainer, None)
    for arguments in ((0,), (1, 1)):  # of several loaders Lightning tells the number
        getattr(writer, f"on_{stage}_batch_end")(trainer, None, None, f"batch {arguments[0]}", *arguments)
    getattr(writer, f"on_{stage}_end")(trainer, None)
    assert writer.calls == [("start", f"of {stage}"), "batch 0", "batch 1", ("finish", f"of {stage}")]


def test_only_write_batch_must_be_implemented() -> None:
    class Counter(ResultWriter):
        count = 0

        def write_batch(self, *_: Any) -> None:
            self.count += 1

    trainer: Any = SimpleNamespace(test_dataloaders=None, testing=True)
    counter, model = Counter(), SimpleNamespace()
    counter.on_test_start(trainer, model)
    counter.on_test_batch_end(trainer, model, None, None, 0)
    counter.on_test_end(trainer, model)
    assert counter.count == 1
    with pytest.raises(NotImplementedError):
        ResultWriter().on_test_batch_end(trainer, model, None, None, 0)


def test_classes_of_a_batch() -> None:
    batch = ImageBatch(image=torch.rand(3, 3, 4, 4))
    nobody: Any = SimpleNamespace()
    assert names_of(nobody) == ()
    assert rows_of(nobody, batch).tolist() == [0, 0, 0]
    rows = torch.tensor([1, 0, 1])
    known: Any = SimpleNamespace(classes=SimpleNamespace(names=("nut", "tile")), rows_of=lambda _: rows)
    assert names_of(known) == ("nut", "tile")
    assert rows_of(known, batch) is rows
