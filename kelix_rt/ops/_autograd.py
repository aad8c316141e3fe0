"""Gradients of the operators that mutate nothing.

The backward pass is the vector-Jacobian product of the plain-torch reference, computed anew from
the saved inputs: one rule for all of them, and the gradient belongs to the documented formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reference = Callable[..., Tensor]


def differentiate(name: str, reference: Reference) -> None:
    """Registers the gradient of the operator `kelix::<name>`, whose formula is `reference`.

    Gradients reach every floating tensor among the inputs that requires them. They can be taken
    once; a second derivative raises. Under torch.autocast the operator runs in float32, as torch's
    own norms do: its inputs would otherwise differ in dtype.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if other is None else other[0] for other in ctx.others]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for i in wanted:
                inputs[i] = inputs[i].detach().requires_grad_()
            output = reference(*inputs)
        found = torch.autograd.grad(output, [inputs[i] for i in wanted], grad)
        grads: list[Tensor | None] = [None] * len(inputs)
        for i, own in zip(wanted, found, strict=True):
            grads[i] = own
        return tuple(grads)

    torch.library.register_autograd(f"kelix::{name}", backward, setup_context=setup_context)
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"kelix::{name}", device, torch.float32)
