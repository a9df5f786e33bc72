"""The linear map from a vision stage into CLIP's joint space: all that is ever trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class LinearAdapters(nn.Module):
    """One linear layer with bias per tapped stage (arXiv:2305.17382, sec. 2.1).

    Args:
        num_stages: Number of tapped stages ``S``.
        width: Width ``C`` of the vision tower.
        embed_dim: Width ``D`` of the joint space.
    """

    def __init__(self, num_stages: int, width: int, embed_dim: int) -> None:
        super().__init__()
        # "fc" is the authors' name: the keys of their files are ours.
        self.fc = nn.ModuleList(nn.Linear(width, embed_dim) for _ in range(num_stages))

    def forward(self, patch_tokens: Sequence[Tensor]) -> list[Tensor]:
        """Patch features of every stage, computed in fp32.

        Args:
            patch_tokens: Per stage ``(B, L, C)``, in ascending order of stages.

        Returns:
            Per stage ``(B, L, D)``, not normalised.
        """
        return [
            F.linear(tokens.float(), layer.get_parameter("weight").float(), layer.get_parameter("bias").float())
            for tokens, layer in zip(patch_tokens, self.fc, strict=True)
        ]
