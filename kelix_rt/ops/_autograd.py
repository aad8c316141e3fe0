"""Gradients of the operators that mutate nothing, and the guard of those that do.

The backward pass is the vector-Jacobian product of the plain-torch reference, computed anew from
the saved inputs: the gradient belongs to the documented formula. On a CPU float32 has kernels of
its own for those that training spends its time in (`_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reference = Callable[..., Tensor]
Native = Callable[..., tuple[Tensor | None, ...]]


def differentiate(
    name: str, reference: Reference, native: Native | None = None, *, autocast: bool = True
) -> None:
    """Registers the gradient of the operator `kelix::<name>`, whose formula is `reference`.

    native: takes the upstream gradient and the operator's inputs, and gives the gradients of the
    tensors, which are its first inputs; called where all are float32 on the CPU.

    Gradients reach every floating tensor among the inputs that requires them. They can be taken
    once; a second derivative raises. Under torch.autocast the operator runs in float32, as torch's
    own norms do: its inputs would otherwise differ in dtype. autocast: False for one whose only
    floating input is a table that must not be copied for every call.
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
        grads: list[Tensor | None] = [None] * len(inputs)
        if not grad.numel():  # torch has no convolution of nothing
            for i in wanted:
                grads[i] = torch.zeros_like(inputs[i])
            return tuple(grads)
        if native is not None and all(map(_is_plain, ctx.saved_tensors)):
            for i, own in enumerate(native(grad, *inputs)):
                grads[i] = own if ctx.needs_input_grad[i] else None
            return tuple(grads)
        # Of the operator's own precision, also where backward is called inside an autocast block.
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            for i in wanted:
                inputs[i] = inputs[i].detach().requires_grad_()
            output = reference(*inputs)
            found = torch.autograd.grad(output, [inputs[i] for i in wanted], grad)
        for i, own in zip(wanted, found, strict=True):
            grads[i] = own
        return tuple(grads)

    torch.library.register_autograd(f"kelix::{name}", backward, setup_context=setup_context)
    for device in ("cpu", "cuda") if autocast else ():
        torch.library.register_autocast(f"kelix::{name}", device, torch.float32)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def writes(name: str, targets: Sequence[Tensor], *read: Tensor | None) -> None:
    """To be called before an operator that writes `targets` in place, which autograd cannot see.

    Raises RuntimeError where a gradient is wanted of what it writes or reads; and lets torch know
    that the targets change, so that a graph which kept one of them raises instead of being wrong.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    tensors = [tensor for tensor in (*targets, *read) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{name}: writes in place and has no gradient, but an input requires one; call it "
            f"under torch.no_grad(), or use {name}_ref"
        )
    for target in targets:
        if not target.is_inference():
            torch.autograd.graph.increment_version(target)
