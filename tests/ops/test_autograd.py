"""The gradients of the operators against autograd through their references in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kelix_rt import ops
from kelix_rt.testing import assert_as_accurate_as_torch, randn

IDS = torch.tensor([[3, 9, 9], [5, 6, 9], [5, 9, 9], [9, 9, 9], [3, 4, 9]])

# Operator, its reference, tensor inputs (None where optional and left out), other inputs.
CASES: dict[
    str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Any], tuple[Any, ...]]
] = {
    "rms_norm": (ops.rms_norm, ops.rms_norm_ref, [(5, 16), (16,)], (1e-6,)),
    "rms_norm of one row": (ops.rms_norm, ops.rms_norm_ref, [(16,), (16,)], (1e-6,)),
    "layer_norm": (ops.layer_norm, ops.layer_norm_ref, [(5, 16), (16,), (16,)], (1e-5,)),
    "layer_norm plain": (ops.layer_norm, ops.layer_norm_ref, [(5, 16), None, None], (1e-5,)),
    "layer_norm by row": (
        ops.layer_norm,
        ops.layer_norm_ref,
        [(5, 3, 16), (3, 16), (3, 16)],
        (1e-5,),
    ),
    "rms_norm of many rows": (ops.rms_norm, ops.rms_norm_ref, [(3, 67, 40), (40,)], (1e-6,)),
    "modulate many tokens": (
        ops.modulate,
        ops.modulate_ref,
        [(2, 130, 24), (2, 24), (2, 24)],
        (1e-6,),
    ),
    "silu_mul": (ops.silu_mul, ops.silu_mul_ref, [(3, 5, 16)], ()),
    "silu_mul of one row": (ops.silu_mul, ops.silu_mul_ref, [(16,)], ()),
    "modulate": (ops.modulate, ops.modulate_ref, [(2, 5, 16), (2, 16), (2, 16)], (1e-6,)),
    "relu_linear_attention": (
        ops.relu_linear_attention,
        ops.relu_linear_attention_ref,
        [(2, 7, 48), (16,), (16,)],
        (8,),
    ),
    "depthwise_glu": (
        ops.depthwise_glu,
        ops.depthwise_glu_ref,
        [(2, 4, 5, 12), (12, 3, 3), (12,)],
        (1, 2),
    ),
    "depthwise_glu the other way": (
        ops.depthwise_glu,
        ops.depthwise_glu_ref,
        [(3, 5, 1, 300), (300, 3, 3), (300,)],
        (2, 1),
    ),
    "depthwise_glu of a plain convolution": (
        ops.depthwise_glu,
        ops.depthwise_glu_ref,
        [(1, 1, 4, 6), (6, 3, 3), (6,)],
        (0, 0),
    ),
    "depthwise_glu of more pictures than workers": (
        ops.depthwise_glu,
        ops.depthwise_glu_ref,
        [(70, 2, 3, 4), (4, 3, 3), (4,)],
        (1, 1),
    ),
    "relu_linear_attention of more heads than workers": (
        ops.relu_linear_attention,
        ops.relu_linear_attention_ref,
        [(35, 5, 48), (16,), (16,)],
        (8,),
    ),
    "relu_linear_attention of plain q and k": (
        ops.relu_linear_attention,
        ops.relu_linear_attention_ref,
        [(1, 37, 240), None, None],
        (40,),
    ),
}


def make_inputs(shapes: list[Any], dtype: torch.dtype) -> list[Tensor | None]:
    return [
        None if shape is None else randn(*shape, dtype=dtype, seed=i).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def gradients(
    function: Callable[..., Tensor], inputs: list[Tensor | None], others: tuple[Any, ...]
) -> list[Tensor]:
    out = function(*inputs, *others)
    upstream = randn(*out.shape, seed=99).to(out.dtype)
    return list(torch.autograd.grad(out, [t for t in inputs if t is not None], upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    op, reference, shapes, others = CASES[name]
    inputs = make_inputs(shapes, dtype)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    for got, plain, want in zip(
        gradients(op, inputs, others),
        gradients(reference, inputs, others),
        gradients(reference, exact, others),
        strict=True,
    ):
        assert want.abs().max() > 0
        assert_as_accurate_as_torch(got, plain, want)


@pytest.mark.parametrize("name", CASES)
def test_opcheck_with_gradients(name: str) -> None:
    op, _, shapes, others = CASES[name]
    overload = getattr(torch.ops.kelix, op.__name__).default
    torch.library.opcheck(overload, (*make_inputs(shapes, torch.float32), *others))


def test_block_embed_gives_every_id_its_share() -> None:
    table = randn(10, 4).requires_grad_()
    ops.block_embed(IDS, table, 5, 9).sum().backward()
    assert table.grad is not None
    # Row 0 is text 3 once, row 1 codes 5 and 6, row 2 the code 5 alone, row 4 text 3 twice.
    assert table.grad[:, 0].tolist() == [0, 0, 0, 3, 0, 2, 1, 0, 0, 0]
    torch.library.opcheck(torch.ops.kelix.block_embed.default, (IDS, table, 5, 9))


def test_only_the_wanted_gradients_are_computed() -> None:
    x, weight = randn(3, 8).requires_grad_(), randn(8)
    ops.rms_norm(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_a_second_derivative_is_refused() -> None:
    x, weight = randn(3, 8).requires_grad_(), torch.ones(8)
    (first,) = torch.autograd.grad(ops.rms_norm(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def written() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """The operators that write their first input in place, and inputs of theirs."""
    x, y, gate = randn(2, 3, 8), randn(2, 3, 8, seed=1), randn(2, 8, seed=2)
    return {
        "add_rms_norm": (ops.add_rms_norm, [x[0], y[0], gate[0]]),
        "gated_residual": (ops.gated_residual, [x, gate, y]),
        "euler_step": (
            lambda latent, velocity, dt: ops.euler_step(latent, velocity, None, dt, None),
            [x, y, randn(2, seed=3)],
        ),
    }


@pytest.mark.parametrize("name", written())
def test_writing_in_place_has_no_gradient_and_says_so(name: str) -> None:
    op, inputs = written()[name]
    for number in range(2):
        own = [tensor.clone() for tensor in inputs]
        own[number].requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name}: writes in place and has no gradient"):
            op(*own)
        with torch.no_grad():
            op(*own)
        with torch.inference_mode():
            op(*(tensor.clone() for tensor in inputs))


def test_a_graph_that_kept_what_is_written_raises() -> None:
    """As after torch's own in-place functions; without, the gradient would be of other values."""
    x, weight = randn(2, 8).requires_grad_(), torch.ones(8)
    hidden = x * 1
    normed = ops.rms_norm(hidden, weight)
    with torch.no_grad():
        ops.add_rms_norm(hidden, randn(2, 8, seed=1), weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()


def test_ids_behind_the_end_have_no_gradient_and_no_bounds() -> None:
    table = randn(6, 4).requires_grad_()
    ops.block_embed(torch.tensor([[4, 1, 77, 1]]), table, 3, 1).sum().backward()
    assert table.grad is not None
    assert table.grad[:, 0].tolist() == [0, 0, 0, 0, 1, 0]


def test_nothing_has_a_gradient_of_nothing() -> None:
    x, weight, bias = torch.zeros(1, 0, 3, 4), randn(4, 3, 3), randn(4)
    weight.requires_grad_()
    ops.depthwise_glu(x, weight, bias, 1, 2).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_gradients_have_the_precision_of_the_operator_under_autocast() -> None:
    x, weight, grad = randn(3, 64), randn(5, 64, seed=1), randn(3, 5, seed=2)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (ops.skinny_linear(x, weight) * grad).sum().backward()
    torch.testing.assert_close(x.grad, grad @ weight)


def test_a_table_is_not_copied_under_autocast() -> None:
    table = randn(10, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.block_embed(IDS, table, 5, 9).dtype == torch.bfloat16


def test_a_tensor_without_memory_is_refused() -> None:
    weight = torch.ones(8, device="meta")
    with pytest.raises(RuntimeError, match="rms_norm: all tensors must be on one device, got cpu"):
        ops.rms_norm(randn(2, 8), weight)
    residual = randn(2, 8)
    with pytest.raises(RuntimeError, match="one on meta has no values"):
        ops.add_rms_norm(residual, randn(2, 8), weight)
    assert ops.rms_norm(randn(2, 8).to("meta"), weight).shape == (2, 8)
