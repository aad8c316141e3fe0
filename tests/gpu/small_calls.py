"""One small call of every operator on the GPU, for compute-sanitizer.

The sizes are odd on purpose (partial tiles, partial warps, empty requests) and small, because the
sanitizer slows kernels down a thousandfold.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from kelix_rt import ops
from kelix_rt.ops._codes_forms import forms_for
from kelix_rt.quantization import quantize_int8
from kelix_rt.testing import randn


def norms(device: str) -> None:
    """norm and activation stems."""
    x, weight = randn(5, 77, device=device), randn(77, device=device)
    ops.rms_norm(x, weight)
    ops.add_rms_norm(x.clone(), x, weight)
    ops.layer_norm(x, weight, weight)
    ops.silu_mul(randn(5, 78, device=device))
    ops.skinny_linear(randn(5, 78, device=device), randn(9, 78, device=device))
    for rows, inputs in ((1, 78), (3, 528), (11, 528)):  # single weights and words of them
        codes_, scale = quantize_int8(randn(9, inputs, device=device))
        ops.skinny_linear_int8(randn(rows, inputs, device=device), codes_, scale)


def attention(device: str) -> None:
    """attention stem: a decoding request, a prefill chunk and an idle request; split contexts."""
    cache = randn(9, 2, 4, 24, device=device), randn(9, 2, 4, 24, device=device, seed=1)
    tokens = 6
    q = ops.rope_store_kv(
        randn(tokens, 8 * 24, device=device),
        randn(24, device=device),
        None,
        randn(16, 24, device=device),
        torch.arange(tokens, dtype=torch.int32, device=device),
        torch.tensor([0, 5, 7, -1, 20, 35], device=device),
        *cache,
        4,
    )
    pages = torch.tensor([[0, 1, 2], [3, 8, 0], [0, 0, 0]], dtype=torch.int32, device=device)
    lengths = torch.tensor([10, 7, 0], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1, 6, 6], dtype=torch.int32, device=device)
    ops.paged_attention(q, *cache, pages, lengths, starts, 0.2)
    long_cache = randn(40, 2, 16, 72, device=device), randn(40, 2, 16, 72, device=device, seed=1)
    pages = torch.arange(40, dtype=torch.int32, device=device).view(2, 20)
    lengths = torch.tensor([311, 77], dtype=torch.int32, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in ([0, 1, 2], [0, 1, 9]):  # decoding alone, and beside a prefill chunk
            starts = torch.tensor(rows, dtype=torch.int32, device=device)
            q = randn(rows[-1], 10, 72, device=device, dtype=dtype)
            ops.paged_attention(q, *(c.to(dtype) for c in long_cache), pages, lengths, starts, 0.2)
    # A table too narrow for two splits: four steps of decoding, whose ring has three stages.
    pages = torch.arange(30, dtype=torch.int32, device=device).view(2, 15)
    lengths = torch.tensor([231, 77], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    q = randn(2, 10, 72, device=device, dtype=torch.bfloat16)
    ops.paged_attention(q, *(c.bfloat16() for c in long_cache), pages, lengths, starts, 0.2)


def codes(device: str) -> None:
    """codes stem, both modes."""
    for dtype in (torch.float32, torch.bfloat16):  # plain kernel and tensor cores
        z = randn(7, 2, 24, dtype=dtype, device=device)
        books = randn(2, 75, 24, dtype=dtype, device=device, seed=1)
        gain = torch.ones(2, 24, dtype=dtype, device=device)
        for reference in (False, True):
            norms_ = ops.codebook_norms(books, reference)
            for form in forms_for(books).values():
                form(z, books, norms_, gain, gain, 1e-5, reference)
    # Five tiles of codes in each CTA, whose ring has four stages (tests/ops/test_codes.py).
    z = randn(70, 1, 24, dtype=torch.bfloat16, device=device)
    books = randn(1, 16_600, 24, dtype=torch.bfloat16, device=device, seed=1)
    ops.nearest_codes(z, books, ops.codebook_norms(books))
    ids = torch.tensor([[3, 9, 9], [12, 15, 9], [9, 9, 9]], device=device)
    ops.block_embed(ids, randn(18, 33, device=device), 10, 9)


def sampling(device: str) -> None:
    """sampling stem: greedy, filtered and reference rows, narrow and shared by several CTAs."""
    params = torch.tensor([[0.0, 0, 1, 0], [1.0, 5, 0.9, 0.0], [0.7, 0, 0.8, 0.1]], device=device)
    keys = torch.arange(3, device=device)
    for width in (301, 16501):
        logits = randn(3, width, device=device)
        for reference in (False, True):
            ops.sample_blocks(logits, params, keys, keys, keys, 0, reference)


def block_decoder(device: str) -> None:
    """block_decoder stem: N = 3 codes, two layers, greedy and drawn rows; one launch for two
    rows, a launch per step for ten."""
    shape = ops.BlockDecoderShape(
        d_model=20, num_heads=2, num_layers=2, ffn=28, input_dim=36, num_slots=4
    )
    weights = randn(shape.packed_size, device=device, scale=0.1)
    table, head = randn(70, 36, device=device), randn(70, 36, device=device, seed=1)
    params = torch.tensor([[0.0, 0, 1, 0], [1.0, 5, 0.9, 0.0]], device=device)
    for times in (1, 5):
        keys = torch.arange(2 * times, device=device)
        for own, scale in ((head, None), quantize_int8(head)):
            ops.block_decode(
                randn(2 * times, 36, device=device), weights, table, randn(36, device=device), own,
                params.unsqueeze(1).repeat(times, 4, 1), keys, keys, 3, 40, 39, 7, 20, 2, 2, 28,
                head_scale=scale,
            )  # fmt: skip


def diffusion(device: str) -> None:
    """diffusion stem."""
    x = randn(2, 15, 40, device=device)
    row = randn(2, 40, device=device, seed=1)
    ops.modulate(x, row, row)
    ops.gated_residual(x, row, x.clone())
    gain = torch.ones(40, device=device)
    ops.relu_linear_attention(randn(2, 15, 120, device=device), gain, gain, 8)
    ops.depthwise_glu(
        randn(2, 3, 5, 34, device=device), randn(34, 3, 3, device=device), randn(34, device=device)
    )
    latent = randn(2, 4, 3, 5, device=device)
    step = torch.full((2,), -0.1, device=device)
    ops.euler_step(latent, latent.clone(), latent.clone(), step, step)


STEMS = (norms, attention, codes, sampling, block_decoder, diffusion)
CALLS = {call.__name__: call for call in STEMS}


def main(device: str = "cuda", names: Sequence[str] = ()) -> None:
    """Run the named ones, or all, and wait for the device."""
    for name in names or CALLS:
        CALLS[name](device)
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: ran")


if __name__ == "__main__":
    main(names=sys.argv[1:])
