"""Steps of kelix-tiny's training: bfloat16 products against float32 and against autocast; memory
that stays with the process against memory that goes back to the system.

A step of the language model (512 positions, 130 of them visual and predicted) computes 11.5 GFLOP
of products, one of the DiT (16 pictures) 24; about two thirds of a float32 step are products, so no
precision of theirs can make it three times as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.compare import Comparison, Machine
from kelix_rt.models.products import are_native
from kelix_rt.testing import randn
from kelix_rt.train.allocator import keep_freed_memory
from kelix_rt.train.detokenizer import flow_loss
from kelix_rt.train.detokenizer_start import new_dit
from kelix_rt.train.language import Batch, NextBlockLoss
from kelix_rt.train.language_start import new_language_model
from kelix_rt.train.products import Bfloat16Products
from kelix_rt.train.recipe import Sizes, dit_config, language_config

LENGTHS, VISUAL = [128] * 4, 130
PICTURES = 16
GLIBC_THRESHOLD = 128 * 1024
Context = Callable[[], AbstractContextManager[Any]]
Made = Callable[[str], tuple[nn.Module, Callable[[], Tensor]]]


def language_loss(device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The language model and its loss of a batch of random blocks."""
    sizes = Sizes()
    model = new_language_model(language_config(sizes), device, seed=0)
    generator = torch.Generator().manual_seed(0)
    rows = sum(LENGTHS)
    blocks = model.expand(torch.randint(sizes.vocab, (rows,), generator=generator))
    books = torch.arange(sizes.books) * sizes.codes_per_book
    codes = torch.randint(sizes.codes_per_book, (VISUAL, sizes.books), generator=generator)
    blocks[1 : VISUAL + 1, : sizes.books] = sizes.vocab + books + codes
    batch = Batch(blocks.to(device), LENGTHS, torch.arange(1, VISUAL + 1, device=device))
    loss = NextBlockLoss(model)
    return model, lambda: loss(batch)["loss"]


def dit_loss(device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The DiT and its loss of a batch of random latents."""
    sizes = Sizes()
    dit = new_dit(dit_config(sizes), device, seed=0)
    side = sizes.drawn_side // sizes.latent_rate
    clean = randn(PICTURES, sizes.latent_channels, side, side, seed=1).to(device)
    condition = randn(PICTURES, sizes.condition_rows, sizes.width, seed=2).to(device)
    mask = torch.ones(condition.shape[:2], dtype=torch.int64, device=device)
    return dit, lambda: flow_loss(dit, clean, condition, mask, dropout=0.1)["loss"]


def training_step(
    loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, products: Context = nullcontext
) -> None:
    """As `kelix_rt.train.loop` makes one, without its checks."""
    with products():
        value = loss()
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    optimizer.step()


made = pytest.mark.parametrize("made", [language_loss, dit_loss], ids=["language", "dit"])


@made
def test_products_of_a_step(compare: Comparison, machine: Machine, made: Made) -> None:
    if not are_native(torch.bfloat16, machine.device):
        pytest.skip("the device has no bfloat16 products in hardware")
    module, loss = made(machine.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    step = partial(training_step, loss, optimizer)
    autocast = partial(torch.autocast, machine.device, torch.bfloat16)
    ratios = compare(
        partial(step, Bfloat16Products),
        {"float32": partial(step, nullcontext), "autocast": partial(step, autocast)},
        graph=False,
    )
    # On a GPU launches decide over steps this small, and conversions add some: only recorded.
    if not machine.on_gpu:
        assert ratios["float32"] > 1


@made
def test_memory_of_a_step(compare: Comparison, machine: Machine, made: Made) -> None:
    if machine.on_gpu:
        pytest.skip("a GPU's memory is torch's own")
    module, loss = made(machine.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step(largest: int) -> None:
        if not keep_freed_memory(largest):
            pytest.skip("malloc is not glibc's")
        training_step(loss, optimizer)

    compare(
        partial(step, 2**30), {"freed_to_the_system": partial(step, GLIBC_THRESHOLD)}, graph=False
    )
