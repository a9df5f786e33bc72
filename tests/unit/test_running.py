"""What a model's trainer is doing, where there is one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch, MVTecAD
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from torchvision.tv_tensors import Image

from anomalib_aprilgan.running import (
    datamodule_of,
    is_fitting,
    is_running,
    plain_images,
    precision_of,
    running_loaders,
)


def module_with(**trainer: Any) -> LightningModule:
    module = LightningModule()
    module._trainer = SimpleNamespace(**trainer)
    return module


def state(status: TrainerStatus, fn: TrainerFn | None = None) -> Any:
    return SimpleNamespace(status=status, fn=fn)


def test_without_a_trainer() -> None:
    module = LightningModule()
    assert datamodule_of(module) is None
    assert not is_running(module)
    assert not is_fitting(module)
    name, context = precision_of(module)
    assert name == "32-true"
    with context:
        assert not torch.is_autocast_enabled("cpu")


def test_datamodules_are_anomalibs() -> None:
    datamodule = MVTecAD()
    assert datamodule_of(module_with(datamodule=datamodule)) is datamodule
    assert datamodule_of(module_with(datamodule=object())) is None
    assert datamodule_of(module_with()) is None


@pytest.mark.parametrize(
    ("status", "fn", "running", "fitting"),
    [
        (TrainerStatus.INITIALIZING, None, False, False),
        (TrainerStatus.RUNNING, TrainerFn.FITTING, True, True),
        (TrainerStatus.RUNNING, TrainerFn.TESTING, True, False),
        (TrainerStatus.FINISHED, TrainerFn.FITTING, False, False),
    ],
)
def test_running_and_fitting(status: TrainerStatus, fn: TrainerFn | None, running: bool, fitting: bool) -> None:
    module = module_with(state=state(status, fn))
    assert (is_running(module), is_fitting(module)) == (running, fitting)


def test_precision_is_that_of_the_running_trainer() -> None:
    trainer = Trainer(accelerator="cpu", precision="bf16-mixed", barebones=True)
    module = LightningModule()
    module._trainer = trainer
    assert precision_of(module)[0] == "32-true"  # after the run, or before it
    trainer.state.status = TrainerStatus.RUNNING
    name, context = precision_of(module)
    assert name == "bf16-mixed"
    with context:
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("loop", ["predict", "test", "val", "train"])
def test_loaders_are_those_of_the_loop(loop: str) -> None:
    trainer: Any = SimpleNamespace(
        predicting=loop == "predict",
        testing=loop == "test",
        validating=loop == "val",
        predict_dataloaders="predict",
        test_dataloaders="test",
        val_dataloaders="val",
        train_dataloader="train",
    )
    assert running_loaders(trainer) == loop


def test_plain_images_share_the_values() -> None:
    image = Image(torch.rand(1, 3, 4, 4))
    plain = plain_images(ImageBatch(image=image))
    assert type(plain) is Tensor
    assert plain.data_ptr() == image.data_ptr()
