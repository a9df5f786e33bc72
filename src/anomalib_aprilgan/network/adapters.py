"""The linear map from a vision stage into CLIP's joint space: all that is ever trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class LinearAdapters(nn.Module):
    """A linear layer with bias per tapped stage, from its width ``C`` to joint width ``D`` (arXiv:2305.17382)."""

    def __init__(self, widths: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        # "fc" is the authors' name: the keys of their files are ours.
        self.fc = nn.ModuleList(nn.Linear(width, embed_dim) for width in widths)

    def forward(self, patch_tokens: Sequence[Tensor]) -> list[Tensor]:
        """Patch features ``(B, L, D)``, fp32 and not normalised, of tokens ``(B, L, C)`` of ascending stages."""
        return [
            F.linear(tokens.float(), layer.get_parameter("weight").float(), layer.get_parameter("bias").float())
            for tokens, layer in zip(patch_tokens, self.fc, strict=True)
        ]
