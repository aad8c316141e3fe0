"""The operators give the same result with any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kelix_rt import ops
from kelix_rt.testing import randn


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attention() -> Tensor:
    pages = torch.arange(64, dtype=torch.int32).view(4, 16)
    return ops.paged_attention(
        randn(4, 16, 64),
        randn(64, 4, 16, 64, seed=1),
        randn(64, 4, 16, 64, seed=2),
        pages,
        torch.tensor([256, 100, 31, 200], dtype=torch.int32),
        torch.arange(5, dtype=torch.int32),
        0.125,
    )


def codes() -> Tensor:
    books = randn(4, 700, 32, seed=1)
    return ops.nearest_codes(randn(150, 4, 32), books, ops.codebook_norms(books))


def sampling() -> Tensor:
    keys = torch.arange(40)
    params = torch.tensor([0.9, 50.0, 0.9, 0.0]).expand(40, 4)
    return ops.sample_blocks(randn(40, 5000), params, keys, keys, keys)[0]


def linear_attention() -> Tensor:
    return ops.relu_linear_attention(randn(2, 300, 3 * 96), randn(96), randn(96, seed=1), 32)


def depthwise() -> Tensor:
    return ops.depthwise_glu(randn(2, 16, 17, 96), randn(96, 3, 3, seed=1), randn(96, seed=2))


def gradients(op: Callable[..., Tensor], *shapes: tuple[int, ...], **others: int) -> Tensor:
    """The gradients of an operator's tensors, end to end."""
    inputs = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    out = op(*inputs, **others)
    found = torch.autograd.grad(out, inputs, randn(*out.shape, seed=9))
    return torch.cat([grad.flatten() for grad in found])


CALLS: list[Callable[[], Tensor]] = [
    attention,
    codes,
    sampling,
    linear_attention,
    depthwise,
    lambda: ops.rms_norm(randn(500, 512), randn(512, seed=1)),
    lambda: ops.silu_mul(randn(300, 1024)),
    lambda: gradients(ops.rms_norm, (500, 192), (192,)),
    lambda: gradients(ops.modulate, (3, 300, 96), (3, 96), (3, 96)),
    lambda: gradients(ops.silu_mul, (300, 256)),
    lambda: gradients(ops.relu_linear_attention, (5, 70, 288), (96,), (96,), head_dim=32),
    lambda: gradients(ops.depthwise_glu, (5, 8, 7, 600), (600, 3, 3), (600,)),
]


@pytest.mark.parametrize("call", CALLS)
def test_threads_change_nothing(call: Callable[[], Tensor]) -> None:
    torch.set_num_threads(1)
    alone = call()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(call(), alone)
