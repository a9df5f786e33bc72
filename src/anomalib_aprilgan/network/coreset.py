"""Which patches stand for all of a memory bank (PatchCore, arXiv:2106.08265, sec. 3.2)."""

from __future__ import annotations

import torch
from anomalib.models.components import KCenterGreedy
from torch import Tensor

from ..running import seeded


class _KCenterGreedy(KCenterGreedy):
    """anomalib's, with distances by a matrix product.

    anomalib subtracts the centre from all patches: a copy of them in every step. Below 32 MB such copies fragment the
    heap of a common allocator, so that they take the memory of all steps together: 20 GB were seen for 6 MB of patches.
    """

    _squares: Tensor

    def update_distances(self, cluster_center: int | Tensor | None) -> None:
        """Update the distance of each patch to the nearest centre by a new centre."""
        if cluster_center is None:
            return
        if self.min_distances is None:
            self._squares = self.features.square().sum(dim=1)
        centre = self.features[cluster_center].reshape(-1)
        squared = self._squares + centre.square().sum() - 2.0 * (self.features @ centre)
        distances = squared.clamp(min=0.0).sqrt()[:, None]
        self.min_distances = distances if self.min_distances is None else torch.minimum(self.min_distances, distances)


def coreset_indices(patches: Tensor, size: int, seed: int) -> Tensor:
    """Indices ``(size,)`` of patches ``(N, C)`` that lie as far apart as can be: anomalib's k-center greedy.

    They are on the device of the patches, in ascending order. The same seed gives the same choice. A ValueError where
    there are fewer patches.
    """
    if size > len(patches):
        msg = (
            f"`memory_size` must be at most the {len(patches)} patches that the references have at a stage, got "
            f"{size}. Ask for fewer, give more references, or leave it out to keep all."
        )
        raise ValueError(msg)
    if size == len(patches):
        return torch.arange(size, device=patches.device)
    with seeded(seed):
        # Half a patch more, so that no rounding takes one away.
        sampler = _KCenterGreedy(patches.float().cpu(), (size + 0.5) / len(patches))
        sampler.model.random_state = seed  # its own generator
        chosen = sampler.select_coreset_idxs()
    return torch.tensor(sorted(chosen), device=patches.device)
