"""The parts of a SANA block against diffusers' own: 1,024 tokens (1024 x 1024 pixels), batch 1.

Both sides hold the same weights and must give the same values. Width 512, as two CPU cores allow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.checkpoints import dit_tensors
from benchmarks.compare import Comparison
from benchmarks.peers import compiled
from kelix_rt import ops
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.dit_blocks import NORM_EPS
from kelix_rt.testing import randn
from tests.models.diffusers_dit import diffusers_model

SIDE, CONDITION = 32, 200
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the relative L2 difference


@dataclass(frozen=True)
class Pair:
    """The first block of both models, and what goes into it."""

    ours: torch.nn.Module
    theirs: torch.nn.Module
    x: Tensor
    y: Tensor
    modulation: Tensor  # [6, 1, C], table included
    table: Tensor  # [6, C]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, mid_size: Path, device: str) -> Pair:
    """Both models' first block in one dtype."""
    dtype = request.param
    dit = KelixDiT.from_pretrained(mid_size / "dit", device, dtype)
    peer = diffusers_model(dit.config, dit_tensors()).to(device, dtype)
    width = dit.config.hidden_size
    return Pair(
        dit.blocks[0],
        peer.transformer_blocks[0],
        randn(1, SIDE * SIDE, width, dtype=dtype, device=device),
        randn(1, CONDITION, width, dtype=dtype, device=device, seed=1),
        randn(6, 1, width, dtype=dtype, device=device, seed=2, scale=0.3),
        peer.transformer_blocks[0].scale_shift_table,
    )


def assert_alike(got: Tensor, want: Tensor) -> None:
    """Relative L2 difference within the dtype's tolerance."""
    difference = float((got.float() - want.float()).norm() / want.float().norm())
    assert difference <= TOLERANCES[got.dtype], f"they differ by {difference:.1e}"


@torch.inference_mode()
def test_linear_attention(compare: Comparison, pair: Pair) -> None:
    """With its projections, which are the same products on both sides."""
    ours, theirs = pair.ours.attn, pair.theirs.attn1
    assert_alike(ours(pair.x), theirs(pair.x))
    compare(
        lambda: ours(pair.x),
        {"diffusers": lambda: theirs(pair.x), "compiled": compiled(lambda: theirs(pair.x))},
        {"products": lambda: ours.proj(ours.qkv(pair.x)[..., : pair.x.shape[-1]])},
    )


@torch.inference_mode()
def test_feed_forward(compare: Comparison, pair: Pair) -> None:
    ours, theirs = pair.ours.mlp, pair.theirs.ff

    def call() -> Tensor:
        planes = pair.x.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
        return theirs(planes).flatten(2, 3).permute(0, 2, 1)

    def products() -> Tensor:
        wide = ours.expand(pair.x)
        return ours.point(wide[..., : ours.point.in_features])

    assert_alike(ours(pair.x, (SIDE, SIDE)), call())
    compare(
        lambda: ours(pair.x, (SIDE, SIDE)),
        {"diffusers": call, "compiled": compiled(call)},
        {"products": products},
    )


@torch.inference_mode()
def test_modulated_norm(compare: Comparison, pair: Pair) -> None:
    shift, scale = pair.modulation[0], pair.modulation[1]

    def call() -> Tensor:
        return pair.theirs.norm1(pair.x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    assert_alike(ops.modulate(pair.x, shift, scale, NORM_EPS), call())
    compare(
        lambda: ops.modulate(pair.x, shift, scale, NORM_EPS),
        {"diffusers": call, "compiled": compiled(call)},
        num_bytes=2 * pair.x.numel() * pair.x.element_size(),
    )


@torch.inference_mode()
def test_block(compare: Comparison, pair: Pair) -> None:
    """Keys and values of the condition are there on our side, and computed on theirs."""
    ours = pair.ours
    keys, values = ours.cross.keys_values(pair.y, None)
    time = (pair.modulation - pair.table.unsqueeze(1)).transpose(0, 1).flatten(1)

    def run() -> Tensor:
        x = pair.x.clone()  # it is overwritten
        return ours(x, pair.modulation, (SIDE, SIDE), keys, values, None, None)

    def call() -> Tensor:
        return pair.theirs(
            pair.x, encoder_hidden_states=pair.y, timestep=time, height=SIDE, width=SIDE
        )

    assert_alike(run(), call())
    compare(run, {"diffusers": call, "compiled": compiled(call)})
