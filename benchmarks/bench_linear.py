"""skinny_linear at the shapes of a backbone: eight layers of four products, 31.5 M weights.

Floor: the weights, read once.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Comparison
from kelix_rt import ops
from kelix_rt.models.products import Float32Products, are_native, product
from kelix_rt.quantization import dequantize_int8, quantize_int8
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


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.inference_mode()
def test_skinny_linear_int8(
    compare: Comparison, device: str, dtype: torch.dtype, rows: int
) -> None:
    """int8 weights against the same in float32 and bfloat16, activations in `dtype`."""
    full = [randn(*s, device=device, seed=seed) for seed in range(LAYERS) for s in SHAPES]
    weights = [quantize_int8(weight) for weight in full]
    wide = {t: [w.to(t) for w in full] for t in (torch.float32, torch.bfloat16)}
    inputs = {
        t: {i: randn(rows, i, dtype=t, device=device) for i in {i for _, i in SHAPES}} for t in wide
    }

    def ours() -> list[Tensor]:
        return [ops.skinny_linear_int8(inputs[dtype][w.shape[1]], w, s) for w, s in weights]

    def skinny(kind: torch.dtype) -> list[Tensor]:
        return [ops.skinny_linear(inputs[kind][w.shape[1]], w) for w in wide[kind]]

    tolerance = 1e-3 if dtype == torch.float32 else 1.0  # sums of up to 2,048 terms of size one
    for got, (w, s) in zip(ours(), weights, strict=True):
        want = F.linear(inputs[dtype][w.shape[1]], dequantize_int8(w, s, dtype))
        torch.testing.assert_close(got, want, atol=tolerance, rtol=1e-2)
    num_bytes = sum(w.nbytes + s.nbytes for w, s in weights)
    compare(
        ours,
        {
            "float32": lambda: skinny(torch.float32),
            "bfloat16": lambda: skinny(torch.bfloat16),
        },
        {"read_once": lambda: [w.view(torch.int16).max() for w, _ in weights]},
        num_bytes=num_bytes,
    )
    milliseconds = compare.benchmark.extra_info["ms"]
    compare.record({"gb_per_second": round(num_bytes / milliseconds / 1e6, 1)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@torch.inference_mode()
def test_product_of_many_rows(compare: Comparison, device: str, dtype: torch.dtype) -> None:
    """16-bit factors on a CPU that multiplies float32 only: the tokens of a small picture."""
    if are_native(dtype, device):
        pytest.skip("the device multiplies this dtype")
    x, weight = randn(64, 512, dtype=dtype), randn(2048, 512, dtype=dtype)
    wide = x.float(), weight.float()
    compare(
        lambda: product(x, weight),
        {"torch": lambda: F.linear(x, weight)},
        {"float32": lambda: F.linear(*wide)},
        flops=2 * x.numel() * len(weight),
    )


@torch.inference_mode()
def test_convolution_of_a_foreign_model(compare: Comparison, device: str) -> None:
    """A 3x3 convolution of the autoencoder in bfloat16, on such a CPU."""
    if are_native(torch.bfloat16, device):
        pytest.skip("the device multiplies this dtype")
    x = randn(1, 64, 64, 64, dtype=torch.bfloat16)
    weight = randn(32, 64, 3, 3, dtype=torch.bfloat16)

    def ours() -> Tensor:
        with Float32Products():
            return F.conv2d(x, weight, padding=1)

    wide = x.float(), weight.float()
    compare(
        ours,
        {"torch": lambda: F.conv2d(x, weight, padding=1)},
        {"float32": lambda: F.conv2d(*wide, padding=1)},
    )
