"""What a model asks of the trainer that runs it: order of callbacks, whole checkpoints, no unwanted predictions."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from ..checkpoint import check_file
from ..files import write_atomically
from .metric_inputs import BatchAsBefore, MetricInputs

# What comes before all other callbacks.
_ORDER = (PostProcessor, MetricInputs, Evaluator, BatchAsBefore)


class WholeCheckpointIO(AnomalibCheckpointIO):
    """anomalib's, but a checkpoint is written beside its target and then renamed.

    Lightning writes it into the folder for temporary files. Where that is on another file system, the file is copied
    from there, and a process that is killed meanwhile leaves half of it.
    """

    def load_checkpoint(self, path: _PATH, *args: object, **kwargs: object) -> dict[str, Any]:
        """Read a checkpoint; a ValueError names the file where it is damaged or something else."""
        check_file(path)
        parent: Any = super()
        content: dict[str, Any] = parent.load_checkpoint(path, *args, **kwargs)
        return content

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: object = None) -> None:
        """Write a checkpoint; an OSError names the path and the remedy where it cannot be written."""
        if storage_options is not None or "://" in str(path):  # not a local file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_atomically(Path(path), partial(torch.save, checkpoint))


def prepare_trainer(trainer: Trainer) -> None:
    """Have a trainer run post-processors and evaluators first, write whole checkpoints, keep no unwanted predictions.

    To be called in ``setup`` of the model: callbacks are complete by then, and no hook is being run over them.
    """
    # Lightning runs the trainer's callbacks before those of the model, which would let them see raw scores.
    trainer.callbacks.sort(key=_place)  # type: ignore[attr-defined]
    given = trainer.strategy.checkpoint_io
    if type(given) in {TorchCheckpointIO, AnomalibCheckpointIO}:  # another one is the user's choice
        trainer.strategy.checkpoint_io = WholeCheckpointIO(getattr(given, "extra_safe_globals", ()))
    _link_latest(trainer)
    callbacks = vars(trainer)["callbacks"]
    if any(isinstance(callback, SaveConfigCallback) for callback in callbacks):  # run by a command line
        trainer.predict_loop.return_predictions = False


def _place(callback: Callback) -> int:
    wants_raw = getattr(callback, "wants_raw", False)
    return next(
        (place for place, kind in enumerate(_ORDER) if isinstance(callback, kind) and not wants_raw), len(_ORDER)
    )


def _link_latest(trainer: Trainer) -> None:
    """Give results without a training a version of their own, to which ``latest`` is a link, as to a training's.

    anomalib's Engine writes them into a folder ``latest``, and the next training fails to put its link there.
    """
    root = Path(trainer.default_root_dir)
    if trainer.is_global_zero and root.name == "latest" and not root.is_symlink():
        root.parent.mkdir(parents=True, exist_ok=True)
        version = next(path for number in count() if not (path := root.with_name(f"v{number}")).exists())
        with suppress(OSError):  # a system without links: as it was
            root.rename(version) if root.is_dir() else version.mkdir()
            root.symlink_to(version.name, target_is_directory=True)
    trainer.strategy.barrier()
