"""What the processes of one run exchange with each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import Metric

T = TypeVar("T")


def all_gather_object(value: T) -> list[T]:
    """The value of every process, in the order of their ranks; of this one alone where there are no others.

    All processes must call this. Values are pickled, and should be small.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def align_metrics(modules: Iterable[nn.Module]) -> None:
    """Make each metric, in place, computable by all processes or by none.

    ``compute`` gathers states from all processes. A process whose metric was never updated would skip it: the others
    would wait for it, or receive the states of its next metric. Here such a metric gets empty states of the type and
    shape that the other processes have, and takes part in ``compute``.

    Args:
        modules: Metrics, or modules that hold some, the same in all processes.
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
