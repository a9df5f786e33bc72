"""The area under the per-region overlap, also over maps of different sizes."""

from __future__ import annotations

import torch
from anomalib.metrics import AnomalibMetric
from anomalib.metrics.aupro import _AUPRO
from anomalib.utils.cv import connected_components_cpu
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat


class _AnySizeAUPRO(_AUPRO):
    shapes: list[Tensor]

    def __init__(self, *, fpr_limit: float = 0.3) -> None:
        super().__init__(fpr_limit=fpr_limit)
        self.add_state("shapes", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take maps and masks ``(B, H, W)``, and keep their pixels in a row."""
        super().update(preds.flatten(), target.flatten())
        self.shapes.append(torch.tensor([target.shape], device=target.device))

    def perform_cca(self) -> Tensor:
        """For every pixel ``(N,)`` of all masks the number of its region, 0 for none."""
        shapes, masks = dim_zero_cat(self.shapes), dim_zero_cat(self.target)
        found, highest = [], 0
        for shape, flat in zip(shapes.tolist(), torch.split(masks, shapes.prod(dim=1).tolist()), strict=True):
            regions = connected_components_cpu(flat.reshape(shape).unsqueeze(1).float().cpu()).flatten()
            found.append(torch.where(regions > 0, regions + highest, 0))
            highest = max(highest, int(found[-1].max()))
        return torch.cat(found).to(masks.device)


class AUPRO(AnomalibMetric, _AnySizeAUPRO):  # type: ignore[misc]  # as anomalib makes its own
    """anomalib's AUPRO, whose maps ``(B, H, W)`` may be of another size in every batch."""

    default_fields = ("anomaly_map", "gt_mask")
