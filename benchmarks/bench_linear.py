"""skinny_linear at the shapes of a mid-size backbone: eight layers of four products, 101 MB.

Floor: the weights, read once.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Comparison
from kelix_rt import ops
from kelix_rt.testing import randn

SHAPES = ((1024, 512), (512, 512), (4096, 512), (512, 2048))  # qkv, output, gate and up, down
LAYERS = 8


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.inference_mode()
def test_skinny_linear(compare: Comparison, device: str, dtype: torch.dtype, rows: int) -> None:
    weights = [
        randn(*shape, dtype=dtype, device=device, seed=seed)
        for seed in range(LAYERS)
        for shape in SHAPES
    ]
    inputs = {i: randn(rows, i, dtype=dtype, device=device) for i in {i for _, i in SHAPES}}

    def ours() -> list[Tensor]:
        return [ops.skinny_linear(inputs[w.shape[1]], w) for w in weights]

    def torch_linear() -> list[Tensor]:
        return [F.linear(inputs[w.shape[1]], w) for w in weights]

    tolerance = 1e-3 if dtype == torch.float32 else 0.5  # sums of up to 2,048 terms of size one
    for got, want in zip(ours(), torch_linear(), strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=1e-2)
    compare(
        ours,
        {"torch": torch_linear},
        {"read_once": lambda: [w.view(torch.int16).max() for w in weights]},
        num_bytes=sum(w.nbytes for w in weights),
    )
