"""What runs a model: its trainer and datamodule, where there is one, and the processes that share a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from anomalib.data import AnomalibDataModule, ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn
from torchmetrics import Metric

T = TypeVar("T")


def datamodule_of(module: LightningModule) -> AnomalibDataModule | None:
    """The datamodule of the trainer's last run, if it is anomalib's."""
    datamodule = getattr(module._trainer, "datamodule", None)  # noqa: SLF001  # `trainer` raises where there is none
    return datamodule if isinstance(datamodule, AnomalibDataModule) else None


def callbacks_of(module: LightningModule) -> list[Callback]:
    """The callbacks of the trainer that runs a model; none without one."""
    trainer = module._trainer  # noqa: SLF001  # `trainer` raises where there is none
    return [] if trainer is None else list(vars(trainer)["callbacks"])


def is_running(module: LightningModule) -> bool:
    """Whether a trainer is running the model."""
    return module._trainer is not None and module.trainer.state.status == TrainerStatus.RUNNING  # noqa: SLF001


def is_fitting(module: LightningModule) -> bool:
    """Whether a trainer is training the model, or validating it in between."""
    return is_running(module) and module.trainer.state.fn == TrainerFn.FITTING


def precision_of(module: LightningModule) -> tuple[str, AbstractContextManager[Any]]:
    """Name and context of the precision in which the trainer's steps run."""
    if not is_running(module):
        return "32-true", nullcontext()
    return str(module.trainer.precision), module.trainer.precision_plugin.forward_context()


def running_loaders(trainer: Trainer) -> object:
    """The loaders of the loop that is running."""
    if trainer.predicting:
        return trainer.predict_dataloaders
    if trainer.testing:
        return trainer.test_dataloaders
    return trainer.val_dataloaders if trainer.validating else trainer.train_dataloader


def plain_images(batch: ImageBatch) -> Tensor:
    """``(B, 3, H, W)`` images without torchvision's subclass, which would go through every operation."""
    images: Any = batch.image
    plain: Tensor = images.as_subclass(Tensor)
    return plain


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context in which everything on a tensor's device is computed in fp32, whatever the trainer's precision.

    A half-precision logit near 25 has steps of 1/64 to 1/8: scores would tie and maps band.
    """
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class FullPrecision(nn.Module):
    """Base of modules whose buffers stay in fp32 where a trainer's precision converts a model (``bf16-true``)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        apply: Any = super()._apply
        apply(move, recurse)
        return self


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context in which torch's generator on the CPU starts from a seed; afterwards it is as it was.

    ``torch.manual_seed`` would seed the generators of accelerators too, and they would stay so.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def all_gather_object(value: T) -> list[T]:
    """The small value of every process, by rank; all processes must call this, where there are others."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def align_metrics(modules: Iterable[nn.Module]) -> None:
    """Make each metric, in place, computable by all processes or by none.

    ``compute`` gathers states from all processes. A process whose metric was never updated would skip it: the others
    would wait for it, or receive the states of its next metric. Here such a metric gets empty states of the type and
    shape that the other processes have, and takes part in ``compute``. Modules that hold metrics will do.
    """
    metrics = [part for module in modules for part in module.modules() if isinstance(part, Metric)]
    by_metric = zip(*all_gather_object([_list_states(metric) for metric in metrics]), strict=True)
    for metric, by_rank in zip(metrics, by_metric, strict=True):
        if not any(is_updated for is_updated, _ in by_rank):
            continue
        if not metric.update_called:
            metric._update_count, metric._computed = 1, None  # noqa: SLF001  # `update` would need data
        for name, (dtype, shape) in {name: entry for _, states in by_rank for name, entry in states.items()}.items():
            values = getattr(metric, name)
            if not values:
                values.append(torch.empty((0, *shape), dtype=dtype, device=metric.device))


def _list_states(metric: Metric) -> tuple[bool, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Whether it was updated, and the type and shape of the entries of its states that are lists and not empty."""
    states = {name: values for name, values in metric.metric_state.items() if isinstance(values, list) and values}
    return metric.update_called, {
        name: (values[0].dtype, tuple(values[0].shape[1:])) for name, values in states.items()
    }
