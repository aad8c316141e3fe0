"""KelixDiT against golden outputs, diffusers, and plain torch for options without goldens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kelix_rt.errors import ConfigError, InputError, WeightError
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.dit_blocks import LinearSelfAttention
from kelix_rt.models.dit_condition import merge_conditions
from kelix_rt.parity import dit as parity
from kelix_rt.parity.report import failures
from kelix_rt.testing import randn
from tests.models.diffusers_dit import diffusers_model
from tests.models.plain_dit import PlainDiT, options, random_tensors, write

LENGTHS = (9, 4)
TIMES = (874.99994, 31.7)


@pytest.mark.parametrize("name", ["tiny_release", "tiny_alt"])
def test_golden_outputs(golden: Path, name: str) -> None:
    checks = parity.run(golden / "dit" / name)
    assert {"fwd.velocity", "sample.cfg1.latents"} <= {check.name for check in checks}
    assert not failures(checks)


@pytest.mark.parametrize("name", ["tiny_release", "tiny_alt"])
def test_golden_outputs_in_bfloat16(golden: Path, name: str) -> None:
    assert not failures(parity.run(golden / "dit" / name, dtype=torch.bfloat16))


def inputs(config: dict[str, Any], height: int = 6, width: int = 12) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    channels = config["connector_channels"] or config["caption_channels"]
    latent = torch.randn(2, config["in_channels"], height, width, generator=generator)
    condition = torch.randn(2, 11, channels, generator=generator)
    mask = (torch.arange(11) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    return latent, torch.tensor(TIMES), condition, mask


def build(tmp_path: Path, config: dict[str, Any]) -> tuple[KelixDiT, PlainDiT]:
    tensors = random_tensors(config)
    return KelixDiT.from_pretrained(write(tmp_path, config, tensors)), PlainDiT(config, tensors)


OPTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "no norms": {"qk_norm": False, "cross_norm": False},
    "unequal norms": {"qk_norm": False},
    "softmax": {"attn_type": "flash"},
    "softmax without norm": {"attn_type": "flash", "qk_norm": False},
    "mlp": {"ffn_type": "mlp"},
    "pred_sigma": {"pred_sigma": True},
    "patch 2": {"patch_size": 2},
    "patch 3": {"patch_size": 3},
    "patch 2 pred_sigma": {"patch_size": 2, "pred_sigma": True},
    "no connector": {"use_connector": False},
    "no y_norm": {"y_norm": False},
    "cross_attn_x_norm": {"cross_attn_x_norm": True},
    "activations": {"mlp_acts": ["gelu", None, "silu"]},
    "gelu gate": {"mlp_acts": [None, "gelu", "gelu"]},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_equal_plain_torch(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = options(**changes)
    model, plain = build(tmp_path, config)
    latent, times, condition, mask = inputs(config)
    got = model.velocity(latent, times, condition, mask)
    for row, (length, time) in enumerate(zip(LENGTHS, TIMES, strict=True)):
        tokens = plain.connect(condition[row, None, :length])
        want = plain.velocity(latent[row, None], torch.tensor([time]), tokens)
        torch.testing.assert_close(got[row], want[0], rtol=2e-5, atol=2e-5)


def test_diffusers_agrees(golden: Path) -> None:
    path = golden / "dit" / "tiny_release"
    model = KelixDiT.from_pretrained(path)
    oracle = diffusers_model(model.config, load_file(path / "model.safetensors"))
    data = load_file(path / "fixtures.safetensors")
    mask = data["fwd.mask"][:, 0, 0]
    got = model.velocity(data["fwd.latent"], data["fwd.timestep"], data["fwd.cond_embeds"], mask)
    want = oracle(
        data["fwd.latent"],
        encoder_hidden_states=model.connect(data["fwd.cond_embeds"]),
        timestep=data["fwd.timestep"].long(),
        encoder_attention_mask=mask,
    ).sample
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_rows_equal_each_row_alone(tmp_path: Path) -> None:
    config = options(use_cross_attn_rope=True)
    model, _ = build(tmp_path, config)
    latent, times, condition, mask = inputs(config)
    together = model.velocity(latent, times, condition, mask, grid_length=9)
    for row in range(2):
        one = slice(row, row + 1)
        alone = model.velocity(latent[one], times[one], condition[one], mask[one], grid_length=9)
        torch.testing.assert_close(together[one], alone, rtol=2e-5, atol=2e-5)


GAPS = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]])


def test_masked_tokens_are_as_if_absent(tmp_path: Path) -> None:
    """A mask with gaps: what lies under it does not matter, NaN included."""
    config = options()
    model, _ = build(tmp_path, config)
    latent, times, condition, _ = inputs(config)
    spoiled = condition.masked_fill(GAPS.unsqueeze(-1) == 0, float("nan"))
    got = model.velocity(latent, times, spoiled.unsqueeze(1), GAPS.view(2, 1, 1, 11))
    for row in range(2):
        one = slice(row, row + 1)
        alone = model.velocity(latent[one], times[one], condition[one, GAPS[row].bool()])
        torch.testing.assert_close(got[one], alone, rtol=2e-5, atol=2e-5)


def test_tokens_behind_gaps_keep_their_positions(tmp_path: Path) -> None:
    config = options(use_cross_attn_rope=True)
    model, _ = build(tmp_path, config)
    condition = inputs(config)[2]
    full = model.prepare_condition(condition, grid_length=11)
    packed = model.prepare_condition(condition, GAPS, grid_length=11)
    for row in range(2):
        kept = GAPS[row].bool()
        got = packed.keys[0][row, :, : int(kept.sum())]
        torch.testing.assert_close(got, full.keys[0][row][:, kept], rtol=2e-5, atol=2e-5)


def test_merged_caches_equal_one_batch(tmp_path: Path) -> None:
    config = options()
    model, _ = build(tmp_path, config)
    latent, times, condition, mask = inputs(config)
    parts = [model.prepare_condition(condition[i : i + 1], mask[i : i + 1]) for i in range(2)]
    merged = merge_conditions(parts)
    assert merged.lengths == LENGTHS and merged.batch == 2
    got = model.forward_cached(latent, model.prepare_modulation(times), merged)
    torch.testing.assert_close(got, model.velocity(latent, times, condition, mask))


def test_unconditional_reads_the_embedding_without_connector(tmp_path: Path) -> None:
    config = options()
    model, plain = build(tmp_path, config)
    latent, times, _, _ = inputs(config)
    embedding = plain.tensors["y_embedder.y_embedding"]
    for capacity, used in ((None, 16), (7, 7), (50, 16)):
        cache = model.unconditional(2, capacity)
        assert cache.lengths == (used, used)
        got = model.forward_cached(latent, model.prepare_modulation(times), cache)
        want = plain.velocity(latent, times, embedding[:used].expand(2, -1, -1))
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_linear_attention_divides_by_the_sum_plus_1e_8() -> None:
    """Features so small that the epsilon decides: 1e-15 or 1e-6 would be far off."""
    attention = LinearSelfAttention(width=8, head_dim=4, normed=False)
    weight = torch.cat((1e-4 * torch.eye(8), 1e-5 * torch.eye(8), torch.eye(8)))
    attention.qkv.weight = torch.nn.Parameter(weight, requires_grad=False)
    attention.proj.weight = torch.nn.Parameter(torch.eye(8), requires_grad=False)
    attention.proj.bias = torch.nn.Parameter(torch.zeros(8), requires_grad=False)
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
    x[:, 2] = -1  # all features zero: the output must be zero, not NaN
    heads = x.double().unflatten(-1, (2, 4)).transpose(1, 2)
    scores = 1e-9 * heads.relu() @ heads.relu().transpose(-1, -2)
    want = (scores @ heads) / (scores.sum(-1, keepdim=True) + 1e-8)
    got = attention(x)
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(2).float(), rtol=1e-5, atol=1e-6)
    assert not got[:, 2].any()


def test_timesteps_are_truncated(tmp_path: Path) -> None:
    model, _ = build(tmp_path, options())
    fractional = model.prepare_modulation(torch.tensor([874.99994]))
    assert torch.equal(fractional, model.prepare_modulation(torch.tensor([874.0])))
    assert not torch.equal(fractional, model.prepare_modulation(torch.tensor([875.0])))


def test_sizes_are_not_confused(tmp_path: Path) -> None:
    """Position tables of 4 x 9 and 9 x 4 have the same number of rows."""
    config = options(use_pe=True, use_cross_attn_rope=True)
    model, _ = build(tmp_path, config)
    wide = inputs(config, 4, 9)
    expected = model.velocity(*wide)
    model.velocity(*inputs(config, 9, 4))
    assert torch.equal(model.velocity(*wide), expected)


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": False},
    "cross_norm": {"cross_norm": False},
    "y_norm": {"y_norm": False},
    "attn_type": {"attn_type": "flash"},
    "ffn_type": {"ffn_type": "mlp"},
    "use_connector": {"use_connector": False, "connector_channels": None},
    "depth": {"depth": 1},
}


@pytest.mark.parametrize("option", CONTRADICTIONS)
def test_config_that_contradicts_tensors(tmp_path: Path, option: str) -> None:
    tensors = random_tensors(options())
    path = write(tmp_path, {**options(), **CONTRADICTIONS[option]}, tensors)
    with pytest.raises(WeightError, match=option):
        KelixDiT.from_pretrained(path)


@pytest.mark.parametrize(
    "name", ["y_embedder.y_embedding", "blocks.1.mlp.point_conv.conv.weight", "t_block.1.bias"]
)
def test_missing_and_misshapen_tensors(tmp_path: Path, name: str) -> None:
    config = options()
    tensors = random_tensors(config)
    spoiled = {**tensors, name: tensors[name].unsqueeze(0)[:, :0]}
    with pytest.raises(WeightError, match=name):
        KelixDiT.from_pretrained(write(tmp_path / "shape", config, spoiled))
    del tensors[name]
    with pytest.raises(WeightError, match=name):
        KelixDiT.from_pretrained(write(tmp_path / "missing", config, tensors))


def test_unused_position_table_may_hold_anything(tmp_path: Path) -> None:
    tensors = {**random_tensors(options()), "pos_embed": torch.full((1, 2), float("nan"))}
    KelixDiT.from_pretrained(write(tmp_path, options(), tensors))


def test_rotary_positions_need_patch_1() -> None:
    from kelix_rt.config import SanaConfig

    config = SanaConfig.from_json(options(use_cross_attn_rope=True, patch_size=2))
    with pytest.raises(ConfigError, match="patch_size"):
        KelixDiT(config)


def bad_inputs() -> dict[str, tuple[int, Any]]:
    latent, times, condition, mask = inputs(options())
    return {
        "latent rank": (0, latent[0]),
        "latent channels": (0, latent[:, :3]),
        "latent batch": (0, latent[:1]),
        "timestep batch": (1, times[:1]),
        "timestep rank": (1, times.view(2, 1)),
        "condition channels": (2, condition[..., :5]),
        "condition empty": (2, condition[:, :0]),
        "condition rank": (2, condition[0]),
        "condition NaN": (2, condition * float("nan")),
        "mask length": (3, mask[:, :5]),
        "mask batch": (3, mask[[0, 0, 1]]),
        "mask all zero": (3, mask * 0),
        "mask one row zero": (3, mask * torch.tensor([[1], [0]])),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_inputs_are_refused(tmp_path: Path, case: str) -> None:
    config = options()
    model, _ = build(tmp_path, config)
    arguments = list(inputs(config))
    place, value = bad_inputs()[case]
    arguments[place] = value
    with pytest.raises(InputError):
        model.velocity(*arguments)


def test_latent_must_fit_the_patches(tmp_path: Path) -> None:
    config = options(patch_size=2)
    model, _ = build(tmp_path, config)
    with pytest.raises(InputError, match="patch_size 2"):
        model.velocity(*inputs(config, 5, 6))


def test_one_timestep_serves_the_whole_batch(golden: Path) -> None:
    dit = KelixDiT.from_pretrained(golden / "dit" / "tiny_release")
    latent, condition = randn(2, 8, 8, 8), randn(2, 5, dit.condition_channels, seed=1)
    each = dit.velocity(latent, torch.tensor([500.0, 500.0]), condition)
    assert torch.equal(dit.velocity(latent, 500.0, condition), each)
    assert torch.equal(dit.velocity(latent, torch.tensor(500.9), condition), each)
