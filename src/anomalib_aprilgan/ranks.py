"""What the processes of one run tell each other before they gather metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import Metric

T = TypeVar("T")


def told_by_all(value: T) -> list[T]:
    """The value of every process, in the order of their ranks; of this one alone where there are no others.

    All processes must call this. Values are pickled, and should be small.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def even_out(modules: Iterable[nn.Module]) -> None:
    """Have each metric, in place, computed by all processes or by none.

    ``compute`` gathers from all processes. Where one has seen nothing of what a metric is about, it would stay away and
    the others would wait for it, or take for its part what it sends for the next metric. Here it learns from the others
    what their states look like, and takes part with empty ones.

    Args:
        modules: Metrics, or modules that hold some, the same in all processes.
    """
    metrics = [part for module in modules for part in module.modules() if isinstance(part, Metric)]
    described = zip(*told_by_all([_description(metric) for metric in metrics]), strict=True)
    for metric, told in zip(metrics, described, strict=True):
        if not any(is_updated for is_updated, _ in told):
            continue
        if not metric.update_called:
            metric._update_count, metric._computed = 1, None  # noqa: SLF001  # `update` would need data
        for name, (dtype, shape) in {name: entry for _, states in told for name, entry in states.items()}.items():
            values = getattr(metric, name)
            if not values:
                values.append(torch.empty((0, *shape), dtype=dtype, device=metric.device))


def _description(metric: Metric) -> tuple[bool, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """Whether it was updated, and the type and shape of the entries of its states that are lists and not empty."""
    states = {name: values for name, values in metric.metric_state.items() if isinstance(values, list) and values}
    return metric.update_called, {
        name: (values[0].dtype, tuple(values[0].shape[1:])) for name, values in states.items()
    }
