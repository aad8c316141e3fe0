"""The non-GEMM operators of the linear diffusion transformer against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kelix_rt import ops
from tests.ops.helpers import DEVICES, DTYPES, assert_as_accurate_as_torch, opcheck, randn

# [B, N, C]
SHAPES = [(1, 1, 1), (2, 5, 33), (3, 40, 64), (1, 70, 2240), (2, 0, 8), (0, 3, 8)]
# Longer than the part of a row that a CUDA kernel keeps in registers, in 16-byte pieces and odd.
LONG_ROWS = [(2, 1, 24584), (1, 2, 3075)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + LONG_ROWS)
def test_modulate(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    batch, _, width = shape
    x = randn(*shape, dtype=dtype, device=device) + 2
    shift = randn(batch, width, dtype=dtype, device=device, seed=1)
    scale = randn(batch, width, dtype=dtype, device=device, seed=2)
    exact = ops.modulate_ref(x.double(), shift.double(), scale.double())
    got = ops.modulate(x, shift, scale)
    assert_as_accurate_as_torch(got, ops.modulate_ref(x, shift, scale), exact)


def test_modulate_eps_matters_on_quiet_rows() -> None:
    x, zero = randn(1, 4, 64, scale=1e-3), torch.zeros(1, 64)
    near, far = ops.modulate(x, zero, zero, 1e-6), ops.modulate(x, zero, zero, 1e-5)
    assert (near - far).abs().max() > 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + LONG_ROWS)
def test_gated_residual(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    batch, _, width = shape
    x = randn(*shape, dtype=dtype, device=device)
    gate = randn(batch, width, dtype=dtype, device=device, seed=1)
    y = randn(*shape, dtype=dtype, device=device, seed=2)
    mine, theirs, exact = x.clone(), x.clone(), x.double()
    ops.gated_residual(mine, gate, y)
    ops.gated_residual_ref(theirs, gate, y)
    ops.gated_residual_ref(exact, gate.double(), y.double())
    assert_as_accurate_as_torch(mine, theirs, exact)


# (B, N, C, head_dim): tiles cut in tokens and channels, wide and tiny heads, two batches.
ATTENTION = [
    (1, 1, 4, 4),
    (2, 33, 24, 8),
    (1, 70, 96, 32),
    (2, 64, 60, 20),
    (1, 37, 80, 40),
    (1, 45, 256, 256),
    (1, 9, 3, 1),
    (1, 270, 24, 8),
    (2, 0, 8, 4),
    (0, 5, 8, 4),
]
# (B, N, heads) of the release's heads of 32 bfloat16 channels: tokens of one warp, of two warps and
# of two CTAs, all cut.
WIDE_HEADS = [(1, 1, 1), (2, 43, 3), (1, 300, 2), (2, 257, 1)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION)
@pytest.mark.parametrize("normed", [True, False])
def test_relu_linear_attention(
    normed: bool, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    check_attention(*shape, dtype, device, normed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", WIDE_HEADS)
@pytest.mark.parametrize("normed", [True, False])
def test_heads_of_32_channels(normed: bool, shape: tuple[int, int, int], device: str) -> None:
    batch, tokens, heads = shape
    check_attention(batch, tokens, 32 * heads, 32, torch.bfloat16, device, normed)


def check_attention(
    batch: int,
    tokens: int,
    width: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    normed: bool,
) -> None:
    # A positive mean keeps the divisor away from zero, where any rounding of q and k explodes.
    qkv = randn(batch, tokens, 3 * width, dtype=dtype, device=device) + 0.5
    q_norm = 1 + 0.1 * randn(width, device=device, seed=1) if normed else None
    k_norm = 1 + 0.1 * randn(width, device=device, seed=2) if normed else None
    weights = [None if t is None else t.to(dtype) for t in (q_norm, k_norm)]
    double = [None if t is None else t.double() for t in weights]
    exact = ops.relu_linear_attention_ref(qkv.double(), double[0], double[1], head_dim)
    plain = ops.relu_linear_attention_ref(qkv, weights[0], weights[1], head_dim)
    got = ops.relu_linear_attention(qkv, weights[0], weights[1], head_dim)
    assert_as_accurate_as_torch(got, plain, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32])
def test_queries_without_a_positive_channel_give_zero(
    head_dim: int, dtype: torch.dtype, device: str
) -> None:
    width = 2 * head_dim
    qkv = randn(1, 40, 3 * width, dtype=dtype, device=device) + 0.5
    qkv[0, 7, :head_dim] = -1  # head 0 of two
    qkv[0, 9, :width] = 0
    weight = torch.ones(width, dtype=dtype, device=device)
    for norm in (weight, None):
        got = ops.relu_linear_attention(qkv, norm, norm, head_dim)
        assert (got[0, 7, :head_dim] == 0).all()
        assert (got[0, 7, head_dim:] != 0).any()
        assert (got[0, 9] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_query_stays_in_its_head(dtype: torch.dtype) -> None:
    qkv = randn(1, 20, 3 * 64, dtype=dtype)
    clean = ops.relu_linear_attention(qkv, None, None, 32)
    qkv[0, 5, 3] = float("nan")
    got = ops.relu_linear_attention(qkv, None, None, 32)
    assert got[0, 5, :32].isnan().all()
    got[0, 5, :32] = clean[0, 5, :32]
    assert torch.equal(got, clean)


def test_norm_is_over_all_heads() -> None:
    qkv = randn(1, 12, 3 * 32).abs()
    qkv[..., :16] *= 100  # one loud head quietens the other
    one = torch.ones(32)
    together = ops.relu_linear_attention(qkv, one, one, 16, 1e-5, 1e-3)
    exact = ops.relu_linear_attention_ref(qkv.double(), one.double(), one.double(), 16, 1e-5, 1e-3)
    torch.testing.assert_close(together.double(), exact, rtol=1e-5, atol=1e-6)


def test_attention_eps_and_norm_eps_reach_the_kernel() -> None:
    qkv = randn(1, 12, 3 * 16, scale=1e-3).abs()
    one = torch.ones(16)
    base = ops.relu_linear_attention(qkv, one, one, 8)
    for norm_eps, eps in [(1e-2, 1e-8), (1e-5, 1.0)]:
        got = ops.relu_linear_attention(qkv, one, one, 8, norm_eps, eps)
        plain = ops.relu_linear_attention_ref(qkv, one, one, 8, norm_eps, eps)
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-8)
        if eps == 1.0:
            assert (got - base).abs().max() > 0.1 * base.abs().max()


@pytest.mark.parametrize(("head_dim", "dtype"), [(8, torch.float32), (32, torch.bfloat16)])
def test_attention_does_not_depend_on_the_batch(head_dim: int, dtype: torch.dtype) -> None:
    qkv = randn(3, 50, 9 * head_dim, dtype=dtype)
    whole = ops.relu_linear_attention(qkv, None, None, head_dim)
    for row in range(3):
        alone = ops.relu_linear_attention(qkv[row : row + 1], None, None, head_dim)
        assert torch.equal(alone[0], whole[row])


# (B, H, W, M)
IMAGES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (1, 37, 4, 40),
    (1, 33, 1, 3),
    (1, 1, 9, 64),
    (2, 8, 8, 33),
    (1, 0, 4, 4),
    (0, 4, 4, 4),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("acts", [(1, 1), (0, 2), (2, 0)])
def test_depthwise_glu(
    acts: tuple[int, int], shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    check_depthwise_glu(acts, shape, dtype, device)


# Wider and higher than the tile of one CTA, with and without 16-byte pieces.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 70, 8), (1, 35, 33, 40), (2, 17, 34, 9)])
def test_depthwise_glu_of_several_tiles(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    check_depthwise_glu((1, 1), shape, dtype, device)


def check_depthwise_glu(
    acts: tuple[int, int], shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    batch, height, width, channels = shape
    x = randn(batch, height, width, 2 * channels, dtype=dtype, device=device, scale=2.0)
    weight = randn(2 * channels, 3, 3, dtype=dtype, device=device, seed=1)
    bias = randn(2 * channels, dtype=dtype, device=device, seed=2)
    got = ops.depthwise_glu(x, weight, bias, *acts)
    if got.numel() == 0:
        assert got.shape == shape and got.dtype == dtype
        return
    exact = ops.depthwise_glu_ref(x.double(), weight.double(), bias.double(), *acts)
    assert_as_accurate_as_torch(got, ops.depthwise_glu_ref(x, weight, bias, *acts), exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", [0, 1, 2])
def test_every_activation_over_its_range(act: int, device: str) -> None:
    """Only the centre tap and one half count: checked value by value, not against the maximum."""
    values = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-8, -200, 300])))
    x = torch.stack((values, values), dim=-1).view(1, 1, -1, 2).to(device)
    exact = values.double()
    exact = [exact, exact * exact.sigmoid(), torch.nn.functional.gelu(exact)][act]
    for half in range(2):
        weight, bias = torch.zeros(2, 3, 3, device=device), torch.ones(2, device=device)
        weight[half, 1, 1], bias[half] = 1, 0
        pre_act, gate_act = (act, 0) if half == 0 else (0, act)
        got = ops.depthwise_glu(x, weight, bias, pre_act, gate_act).flatten().cpu()
        torch.testing.assert_close(got.double(), exact, rtol=5e-7, atol=5e-7)


def test_nan_stays_in_its_neighbourhood() -> None:
    x = randn(1, 9, 9, 8)
    weight, bias = randn(8, 3, 3, seed=1), randn(8, seed=2)
    clean = ops.depthwise_glu(x, weight, bias)
    x[0, 4, 4, 1] = float("nan")
    got = ops.depthwise_glu(x, weight, bias)
    assert got[0, 3:6, 3:6, 1].isnan().all()
    clean[0, 3:6, 3:6, 1] = float("nan")
    torch.testing.assert_close(got, clean, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4, 5, 7), (2, 32, 32, 32), (2,), (0, 4), (2, 0)])
def test_euler_step(shape: tuple[int, ...], guided: bool, dtype: torch.dtype, device: str) -> None:
    latent = randn(*shape, device=device)
    velocity = randn(*shape, dtype=dtype, device=device, seed=1)
    uncond = randn(*shape, dtype=dtype, device=device, seed=2) if guided else None
    dt = -randn(shape[0], device=device, seed=3).abs()
    guidance = 1 + randn(shape[0], device=device, seed=4).abs() if guided else None
    mine, theirs, exact = latent.clone(), latent.clone(), latent.double()
    ops.euler_step(mine, velocity, uncond, dt, guidance)
    ops.euler_step_ref(theirs, velocity, uncond, dt, guidance)
    double = [None if t is None else t.double() for t in (velocity, uncond, dt, guidance)]
    ops.euler_step_ref(exact, *double)  # type: ignore[arg-type]
    assert_as_accurate_as_torch(mine, theirs, exact)


def test_non_contiguous_input() -> None:
    x = randn(2, 16, 6).transpose(1, 2)
    gate = randn(16, 2, seed=1).T
    assert torch.equal(
        ops.modulate(x, gate, gate), ops.modulate(dense(x), dense(gate), dense(gate))
    )
    mine, theirs = dense(x).clone(), dense(x).clone()
    ops.gated_residual(mine, gate, x)
    ops.gated_residual(theirs, dense(gate), dense(x))
    assert torch.equal(mine, theirs)
    qkv = randn(2, 24, 6).transpose(1, 2)
    got = ops.relu_linear_attention(qkv, None, None, 4)
    assert torch.equal(got, ops.relu_linear_attention(dense(qkv), None, None, 4))
    planes = randn(1, 8, 4, 5).permute(0, 2, 3, 1)
    weight, bias = randn(3, 3, 8).permute(2, 0, 1), randn(16)[::2]
    got = ops.depthwise_glu(planes, weight, bias)
    assert torch.equal(got, ops.depthwise_glu(dense(planes), dense(weight), dense(bias)))


def dense(x: Tensor) -> Tensor:
    return x.contiguous()


def shifted(x: Tensor) -> Tensor:
    """The same values in memory that is aligned to one element only."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_aligned_to_one_element(dtype: torch.dtype) -> None:
    x, y = randn(2, 5, 64, dtype=dtype), randn(2, 5, 64, dtype=dtype, seed=1)
    row, other = randn(2, 64, dtype=dtype, seed=2), randn(2, 64, dtype=dtype, seed=3)
    exact = ops.modulate_ref(x.double(), row.double(), other.double())
    plain = ops.modulate_ref(x, row, other)
    for inputs in [(shifted(x), row, other), (x, shifted(row), other), (x, row, shifted(other))]:
        assert_as_accurate_as_torch(ops.modulate(*inputs), plain, exact)
    straight, moved = x.clone(), shifted(x)
    ops.gated_residual(straight, row, y)
    ops.gated_residual(moved, row, y)
    assert torch.equal(moved, straight)
    latent, dt = randn(2, 64, seed=4), randn(2, seed=5)
    straight, moved = latent.clone(), latent.clone()
    ops.euler_step(straight, row, None, dt, None)
    ops.euler_step(moved, shifted(row), None, dt, None)
    assert torch.equal(moved, straight)
    qkv, norm = randn(1, 33, 3 * 64, dtype=dtype) + 0.5, 1 + 0.1 * row[0]
    exact = ops.relu_linear_attention_ref(qkv.double(), norm.double(), norm.double(), 32)
    plain = ops.relu_linear_attention_ref(qkv, norm, norm, 32)
    for source, weight in [(shifted(qkv), norm), (qkv, shifted(norm))]:
        got = ops.relu_linear_attention(source, weight, weight, 32)
        assert_as_accurate_as_torch(got, plain, exact)
    image, taps = randn(1, 4, 5, 32, dtype=dtype), randn(32, 3, 3, dtype=dtype, seed=6)
    bias = randn(32, dtype=dtype, seed=7)
    got = ops.depthwise_glu(shifted(image), taps, bias)
    assert torch.equal(got, ops.depthwise_glu(image, taps, bias))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.modulate(randn(2, 3, 8), randn(2, 8), randn(3, 8)),
            r"modulate: scale must have shape \[B=2, C=8\], got \[3, 8\]",
        ),
        (
            lambda: ops.gated_residual(randn(2, 8, 3).transpose(1, 2), randn(2, 8), randn(2, 3, 8)),
            "gated_residual: x must be contiguous",
        ),
        (
            lambda: ops.relu_linear_attention(randn(1, 2, 30), None, None, 4),
            "relu_linear_attention: head_dim must divide C=10, got 4",
        ),
        (
            lambda: ops.relu_linear_attention(randn(1, 2, 30), None, None, 0),
            "relu_linear_attention: head_dim must divide C=10, got 0",
        ),
        (
            lambda: ops.relu_linear_attention(randn(1, 2, 32), None, None, 4),
            "relu_linear_attention: qkv must hold q, k and v in its last dimension",
        ),
        (
            lambda: ops.relu_linear_attention(randn(1, 2, 3 * 320), None, None, 320),
            "relu_linear_attention: head_dim must be at most 256, got 320",
        ),
        (
            lambda: ops.relu_linear_attention(randn(1, 2, 30), randn(10), None, 5),
            "relu_linear_attention: q_norm and k_norm must both be given or both be None",
        ),
        (
            lambda: ops.depthwise_glu(randn(1, 2, 2, 8), randn(8, 3, 3), randn(8), 3),
            r"depthwise_glu: pre_act must be 0 \(none\), 1 \(SiLU\) or 2 \(GELU\), got 3",
        ),
        (
            lambda: ops.depthwise_glu(randn(1, 2, 2, 8), randn(8, 3, 3), randn(8), 0, -1),
            "depthwise_glu: gate_act must be 0",
        ),
        (
            lambda: ops.depthwise_glu(randn(1, 2, 2, 7), randn(7, 3, 3), randn(7)),
            "depthwise_glu: x must have an even last dimension",
        ),
        (
            lambda: ops.depthwise_glu(randn(1, 2, 2, 8), randn(8, 1, 3, 3), randn(8)),
            r"depthwise_glu: weight must have shape \[2M=8, 3, 3\], got \[8, 1, 3, 3\]",
        ),
        (
            lambda: ops.euler_step(randn(2, 4), randn(2, 4), randn(2, 4), randn(2), None),
            "euler_step: uncond and guidance must both be given or both be None, got uncond only",
        ),
        (
            lambda: ops.euler_step(randn(2, 4), randn(2, 5), None, randn(2), None),
            r"euler_step: velocity must have the shape of latent \[2, 4\], got \[2, 5\]",
        ),
        (
            lambda: ops.euler_step(randn(2, 4).half(), randn(2, 4), None, randn(2), None),
            "euler_step: latent must be float32, got float16",
        ),
    ],
)
def test_errors_name_the_rule(call: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()  # type: ignore[operator]


def test_opcheck() -> None:
    kelix = torch.ops.kelix
    x, row = randn(2, 3, 8), randn(2, 8)
    opcheck(kelix.modulate.default, x, row, row, 1e-6)
    opcheck(kelix.gated_residual.default, x, row, randn(2, 3, 8))
    opcheck(kelix.relu_linear_attention.default, randn(2, 3, 24), randn(8), randn(8), 4, 1e-5, 1e-8)
    opcheck(kelix.depthwise_glu.default, randn(1, 3, 3, 8), randn(8, 3, 3), randn(8), 1, 1)
    opcheck(kelix.euler_step.default, randn(2, 4), randn(2, 4), randn(2, 4), randn(2), randn(2))
