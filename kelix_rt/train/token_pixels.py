"""What a token looks like, for the auxiliary head of the tokenizer's training."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PixelHead(nn.Module):
    """A token's pixels at half resolution, as a linear map of its scaled fused embedding.

    A fourth channel says where something is drawn: the outlines, whatever their colours.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4 * patch**2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, fused: Tensor, wanted: Tensor) -> Tensor:
        """Mean squared error; fused [T, O], wanted [T, 4 * P * P] in -1..1."""
        return F.mse_loss(self.linear(fused).float(), wanted)


def token_pixels(patches: Tensor, merge_order: Tensor) -> Tensor:
    """Patches [n, C, P, P] -> the 2x2 patches of every token at half resolution, [n / 4, C P P]."""
    half = F.avg_pool2d(patches.float(), 2)
    return half[merge_order].reshape(len(patches) // 4, -1)
