"""What a token looks like, for the auxiliary heads of the tokenizer's training."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

LEAST_COVERED = 0.04  # share of a token below which it shows no colour worth learning


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


class PaintHead(nn.Module):
    """The colour of what is drawn in a token, as a linear map of its scaled fused embedding.

    A fused embedding is a sum over the sub-codebooks, so colour becomes a sum over codes whatever
    the shape; the classes of `LabelHead` are content with knowing every pair of the two by heart.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, fused: Tensor, paint: Tensor, there: Tensor) -> Tensor:
        """Mean squared error over the tokens that are `there`, 0 without any; fused [T, O], the
        rest as `token_paint` gives it."""
        errors = (self.linear(fused).float() - paint).square().mean(1) * there
        return errors.sum() / there.sum().clamp(min=1)


def token_paint(patches: Tensor, covered: Tensor, merge_order: Tensor) -> tuple[Tensor, Tensor]:
    """Mean colour of what covers a token, [n / 4, 3] in -1..1, and whether enough does: [n / 4].

    patches: [n, 3, P, P]. covered: [n, 1, P, P], 1 where something is drawn and -1 elsewhere.
    """
    share = (covered.float() + 1) / 2
    area = _by_token(share, merge_order)
    paint = _by_token(patches.float() * share, merge_order) / area.clamp(min=LEAST_COVERED)
    return paint, area[:, 0] > LEAST_COVERED


def _by_token(patches: Tensor, merge_order: Tensor) -> Tensor:
    """Means [n / 4, C] over the pixels of every token."""
    means = patches.mean((2, 3))[merge_order]
    return means.view(len(patches) // 4, 4, -1).mean(1)
