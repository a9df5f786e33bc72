"""What processes exchange, with the others played by a list."""

from typing import Any

import pytest
import torch
from anomalib.metrics import AUPRO, AUROC, F1Max
from torch import nn

from anomalib_aprilgan import running
from anomalib_aprilgan.running import align_metrics, all_gather_object


def metrics() -> nn.ModuleList:
    image: dict[str, Any] = {"fields": ["pred_score", "gt_label"]}
    pixel: dict[str, Any] = {"fields": ["anomaly_map", "gt_mask"], "strict": False}
    return nn.ModuleList([AUROC(**image), F1Max(**image), AUROC(**pixel), AUPRO(**pixel)])


class Images:
    pred_score = torch.tensor([0.1, 0.7, 0.4])
    gt_label = torch.tensor([0, 1, 1])
    anomaly_map = torch.rand(3, 6, 5)
    gt_mask = (torch.rand(3, 6, 5) > 0.5).int()


def test_one_process_gathers_its_own_value() -> None:
    assert all_gather_object({"a": 1}) == [{"a": 1}]


def test_one_process_changes_nothing() -> None:
    updated, fresh = metrics(), metrics()
    for metric in updated:
        metric.update(Images())
    before = [metric.compute() for metric in updated]
    align_metrics([updated, fresh])
    assert [metric.compute() for metric in updated] == before
    assert not any(metric.update_called for metric in fresh)


def test_a_process_without_images_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, idle, unused = metrics(), metrics(), metrics()
    for metric in busy:
        metric.update(Images())
    gathered: list[Any] = []
    monkeypatch.setattr(running, "all_gather_object", lambda value: gathered.append(value) or [value])
    align_metrics([busy, unused])
    monkeypatch.setattr(running, "all_gather_object", lambda value: [gathered[0], value])
    align_metrics([idle, unused])
    assert all(metric.update_called for metric in idle)
    assert not any(metric.update_called for metric in unused)
    inner = idle[1].precision_recall_curve
    assert [state.shape for state in (*inner.preds, *inner.target)] == [(0,), (0,)]
    assert [state.shape for state in (*idle[3].preds, *idle[3].target)] == [(0, 6, 5), (0, 6, 5)]
    assert idle[3].target[0].dtype == torch.int32
    before = [metric.compute() for metric in busy]
    for ours, theirs in zip(busy, idle, strict=True):  # what gathering does
        for part, empty in zip(ours.modules(), theirs.modules(), strict=True):
            for name, state in part.metric_state.items():
                setattr(part, name, [torch.cat([*state, *getattr(empty, name)])])
            part._computed = None
    assert [metric.compute() for metric in busy] == before
