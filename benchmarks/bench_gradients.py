"""Forward and backward of the operators that training runs through, at kelix-tiny's sizes.

The operators keep their inputs alone, so backward computes anew what it needs. "recomputed" does so
through the plain-torch reference, which is what other dtypes and devices have. "reference" is
autograd through it, which keeps every intermediate, and "torch" its own operator, where it has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Comparison, Machine
from kelix_rt import ops
from kelix_rt.testing import randn


@dataclass(frozen=True)
class Case:
    """An operator, its reference, shapes of its tensors, other arguments, peers from torch."""

    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]
    others: dict[str, int] = field(default_factory=dict)
    peers: dict[str, Callable[..., Tensor]] = field(default_factory=dict)


def torch_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As diffusers writes it."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


CASES = {
    "rms_norm": Case(
        ops.rms_norm, ops.rms_norm_ref, [(1024, 192), (192,)],
        peers={"torch": lambda x, weight: F.rms_norm(x, (192,), weight, 1e-6)},
    ),
    "layer_norm": Case(
        ops.layer_norm, ops.layer_norm_ref, [(1024, 192), (192,), (192,)],
        peers={"torch": lambda x, weight, bias: F.layer_norm(x, (192,), weight, bias)},
    ),
    "modulate": Case(
        ops.modulate, ops.modulate_ref, [(16, 64, 192), (16, 192), (16, 192)],
        peers={"torch": torch_modulate},
    ),
    "silu_mul": Case(ops.silu_mul, ops.silu_mul_ref, [(512, 1024)]),
    "relu_linear_attention": Case(
        ops.relu_linear_attention, ops.relu_linear_attention_ref,
        [(16, 64, 576), (192,), (192,)], {"head_dim": 32},
    ),
    "depthwise_glu": Case(
        ops.depthwise_glu, ops.depthwise_glu_ref, [(16, 8, 8, 960), (960, 3, 3), (960,)]
    ),
}  # fmt: skip


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Those of all inputs, upstream being one everywhere."""
    out = function(*inputs)
    return list(torch.autograd.grad(out, inputs, torch.ones_like(out)))


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(compare: Comparison, machine: Machine, name: str) -> None:
    case = CASES[name]
    inputs = [
        randn(*shape, seed=i).to(machine.device).requires_grad_()
        for i, shape in enumerate(case.shapes)
    ]
    functions = {"reference": partial(case.reference, **case.others), **case.peers}
    op = partial(case.op, **case.others)
    mine = gradients(op, inputs)
    for function in functions.values():
        torch.testing.assert_close(gradients(function, inputs), mine, rtol=1e-3, atol=1e-3)

    def recomputed() -> list[Tensor]:
        with torch.no_grad():
            op(*inputs)
        return gradients(functions["reference"], inputs)

    calls = {name: partial(gradients, function, inputs) for name, function in functions.items()}
    ratios = compare(
        lambda: gradients(op, inputs), {"recomputed": recomputed, **calls}, graph=False
    )
    if not machine.on_gpu:  # which has no kernels of its own for these
        assert ratios["recomputed"] > 1
