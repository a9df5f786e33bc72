"""What a model asks of its trainer: post-processors first, whole checkpoints, no predictions for nobody."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.post_processing import PostProcessor
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from anomalib_aprilgan.decision.post_processing import AprilGANPostProcessor
from anomalib_aprilgan.results.trainer import prepare_trainer


def test_post_processors_move_to_the_front_and_the_others_keep_their_order() -> None:
    others = [Callback(), Callback(), Callback()]
    ours, theirs, checkpoint = AprilGANPostProcessor(), PostProcessor(), ModelCheckpoint()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.callbacks[:] = [others[0], ours, others[1], theirs, others[2], checkpoint]
    callbacks = trainer.callbacks
    prepare_trainer(trainer)
    assert trainer.callbacks is callbacks
    assert callbacks == [ours, theirs, *others, checkpoint]


def test_predictions_are_kept_for_a_caller_and_not_for_a_command_line() -> None:
    for own, kept in (([], True), ([SaveConfigCallback(None, None)], False)):
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=own)
        trainer.predict_loop.return_predictions = None
        prepare_trainer(trainer)
        assert trainer.predict_loop.return_predictions is kept


def test_a_checkpoint_is_written_beside_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    prepare_trainer(trainer)
    written: list[Path] = []
    monkeypatch.setattr(tempfile, "mkstemp", lambda *_, **__: pytest.fail("a file in the folder for temporary ones"))

    def save(content: object, file: Any) -> None:
        written.append(Path(file.name))
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    target = tmp_path / "new" / "model.ckpt"
    with pytest.raises(OSError, match=f"{target} cannot be written.*Make room there"):
        trainer.strategy.checkpoint_io.save_checkpoint({}, target)
    assert [path.parent for path in written] == [target.parent]
    assert list(target.parent.iterdir()) == []


def test_a_users_way_of_writing_checkpoints_stays() -> None:
    class Own(TorchCheckpointIO):
        pass

    own = Own()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[own])
    prepare_trainer(trainer)
    assert trainer.strategy.checkpoint_io is own
