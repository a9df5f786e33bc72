"""What all callbacks that write results share: their place after the post-processor."""

from __future__ import annotations

from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer


class ResultWriter(Callback):
    """Base of callbacks that write the results of tests and predictions, in the same way for both.

    A subclass implements ``write_batch``, and ``start`` and ``finish`` where it needs them. Batches are
    post-processed before they come here; see ``anomalib_aprilgan.results.trainer.prepare_trainer``.
    """

    def start(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """Begin a run over these loaders."""

    def write_batch(self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch) -> None:
        """Write or collect the results of a batch of any of the loaders."""
        raise NotImplementedError

    def finish(self, trainer: Trainer, pl_module: LightningModule, loaders: object) -> None:
        """End a run that was not interrupted."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``start``."""
        self.start(trainer, pl_module, loaders_of(trainer))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: ImageBatch, *_: object, **__: object
    ) -> None:
        """Call ``write_batch``."""
        del outputs  # anomalib's steps write them into the batch
        self.write_batch(trainer, pl_module, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``finish``."""
        self.finish(trainer, pl_module, loaders_of(trainer))

    on_predict_start, on_predict_batch_end, on_predict_end = on_test_start, on_test_batch_end, on_test_end


def loaders_of(trainer: Trainer) -> object:
    """The loaders of the test or prediction that is running."""
    return trainer.test_dataloaders if trainer.testing else trainer.predict_dataloaders
