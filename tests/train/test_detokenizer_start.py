"""The start of the image DiT: no condition at first, then each token on the code of its place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from kelix_rt import ops
from kelix_rt.models.dit_blocks import QK_EPS, Block
from kelix_rt.models.dit_positions import grid_positions, sincos_table
from kelix_rt.train.detokenizer_start import look_where_it_lies, new_dit
from tests.train.test_detokenizer import CONFIG, batch

SIDE, MARKERS = 4, 3
PLACED = replace(CONFIG, input_size=SIDE, hidden_size=64, model_max_length=SIDE * SIDE + MARKERS)


def test_a_new_dit_starts_without_condition() -> None:
    dit = new_dit(CONFIG, "cpu", seed=0)
    assert torch.equal(dit.connector_norm, torch.zeros(24))
    assert not dit.y_embedding.requires_grad
    latent, condition, mask = batch(2)
    nn.init.normal_(dit.final.weight)
    time = torch.tensor([500.0, 300.0])
    with torch.no_grad():
        out = dit.velocity(latent, time, condition, mask)
        other = dit.velocity(latent, time, condition * 3 + 1, mask)
    assert torch.equal(out, other)
    assert torch.isfinite(out).all() and float(out.std()) > 0


def told(count: int, seed: int) -> Tensor:
    """Conditions [count, L, 64]: the place of each code in two of the channels, noise in all."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(count, MARKERS + SIDE * SIDE, 64, generator=generator)
    places = grid_positions(SIDE, SIDE)
    for axis in (0, 1):
        found[:, MARKERS:, axis * SIDE : (axis + 1) * SIDE] += 3 * torch.eye(SIDE)[places[:, axis]]
    return found


def test_image_tokens_start_on_the_code_of_their_place() -> None:
    dit = new_dit(PLACED, "cpu", seed=0)
    places = torch.full((MARKERS + SIDE * SIDE, 2), -1)
    places[MARKERS:] = grid_positions(SIDE, SIDE)
    look_where_it_lies(dit, told(64, seed=1), places, seed=0)
    with torch.no_grad():
        y = dit.normalise_caption(dit.project_caption(dit.connect(told(8, seed=2))))
        table = sincos_table(SIDE, SIDE, 64, SIDE, 1.0, torch.float32, torch.device("cpu"))
        x = table + dit.x_embedder(torch.randn(8, SIDE * SIDE, 4))
        for block in dit.blocks:
            assert isinstance(block, Block) and block.cross.q_norm is not None
            keys, _ = block.cross.keys_values(y, None)
            queries = block.cross._heads(
                ops.rms_norm(block.cross.q(x), block.cross.q_norm, QK_EPS), None
            )
            shares = (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1)
            own, chance = torch.arange(SIDE * SIDE), 1 / (SIDE * SIDE + MARKERS)
            assert shares[:, :, own, own + MARKERS].mean() > 3 * chance
