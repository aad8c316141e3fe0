"""The plain DiT that others are compared with and timed against is the released one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.reference_dit import ReferenceSampler
from kelix_rt.parity.dit import VELOCITY
from tests.models.plain_dit import PlainDiT


def golden_model(path: Path, dtype: torch.dtype = torch.float32) -> PlainDiT:
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    return PlainDiT(config, {name: tensor.to(dtype) for name, tensor in tensors.items()})


def test_one_evaluation_of_padded_conditions(golden: Path) -> None:
    path = golden / "dit" / "tiny_release"
    data = load_file(path / "fixtures.safetensors")
    plain = golden_model(path)
    tokens = plain.connect(data["fwd.cond_embeds"].squeeze(1))
    mask = data["fwd.mask"].flatten(1)
    got = plain.velocity(data["fwd.latent"], data["fwd.timestep"], tokens, mask)
    torch.testing.assert_close(got, data["fwd.velocity"], rtol=0, atol=VELOCITY)


@pytest.mark.parametrize(
    ("dtype", "guidance", "tolerance"),
    [(torch.float32, 1.0, 1e-5), (torch.float32, 3.0, 1e-5), (torch.bfloat16, 1.0, 2e-2)],
)
def test_the_released_loop(
    golden: Path, dtype: torch.dtype, guidance: float, tolerance: float
) -> None:
    """Relative error after every step; bfloat16 against the float32 outputs."""
    path = golden / "dit" / "tiny_release"
    data = load_file(path / "fixtures.safetensors")
    sampler = ReferenceSampler(golden_model(path, dtype))
    condition, mask = data["sample.cond_embeds"].to(dtype), data["sample.mask"].flatten(1)
    want = data[f"sample.cfg{guidance:.0f}.latents"]
    latent = data["sample.latent0"].to(dtype)
    state = sampler.start(condition, mask, latent, len(want), guidance)
    for expected in want:
        sampler.step(state)
        error = (state.latent[0].float() - expected).norm() / expected.norm()
        assert error <= tolerance
