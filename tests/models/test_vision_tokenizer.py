from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kelix_rt.errors import ConfigError, InputError, WeightError
from kelix_rt.models import load
from kelix_rt.models.vision_layers import segment_attention
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.parity import tokenizer as parity
from kelix_rt.parity.report import failures
from tests.models.plain_tokenizer import (
    PlainTokenizer,
    make_config,
    make_state,
    save_checkpoint,
)

GRIDS = [[1, 4, 2], [2, 2, 4], [1, 2, 2]]


def make_pixels(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    patches = sum(t * h * w for t, h, w in GRIDS)
    return torch.rand(patches, 3, 14, 14, generator=generator) * 2 - 1


@pytest.mark.parametrize("name", ["tok_a", "tok_b"])
def test_golden_float32(golden: Path, name: str) -> None:
    checks = parity.run(golden / "tokenizer" / name)
    assert len(checks) > 10
    assert not failures(checks)


def test_golden_bfloat16(golden: Path) -> None:
    checks = parity.run(golden / "tokenizer" / "tok_a", dtype=torch.bfloat16)
    assert {check.name for check in checks} >= {"bf16.ln_post", "bf16.indices"}
    assert not failures(checks)


def test_bfloat16_codes_are_the_golden_ones(golden: Path) -> None:
    """Where probabilities are rounded matters: with torch's own attention 1.6 % of them differ."""
    path = golden / "tokenizer" / "tok_b"
    data = load_file(path / "fixtures.safetensors")
    model = VisionTokenizer.from_pretrained(path, dtype=torch.bfloat16)
    codes = model.encode(data["pixel_values"], data["image_grid_thw"], "reference")
    assert (codes != data["bf16.indices"]).float().mean() < 0.008


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "release-like": ({}, {}),
    "gelu erf": ({"hidden_act": "gelu"}, {}),
    "silu": ({"hidden_act": "silu"}, {}),
    "unknown activation is tanh gelu": ({"hidden_act": "quick_gelu"}, {}),
    "other norm eps": ({"layer_norm_eps": 1e-5}, {}),
    "q/k norm": ({"use_qk_norm": True, "qk_norm_eps": 1e-3}, {}),
    "no position table": ({"has_learnable_position_embedding": False}, {}),
    "vocabulary reducer": ({}, {"add_voc_reducer": True}),
    "undivided reducer": ({}, {"add_voc_reducer": True, "split_voc": 1}),
    "undivided codebooks": ({}, {"split_voc": 1}),
    "split_voc 0": ({}, {"split_voc": 0}),
    "divided channels": ({}, {"split_dim": True, "embedding_dim": 32}),
    "aligner and mean": ({}, {"pre_llm_align": True, "fusion_type": "mean"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_against_plain_float64(tmp_path: Path, option: str) -> None:
    config = make_config(OPTIONS[option][0], **OPTIONS[option][1])
    state = make_state(config)
    plain = PlainTokenizer(config, state)
    model = VisionTokenizer.from_pretrained(save_checkpoint(tmp_path, config, state))
    pixels, grid = make_pixels(), torch.tensor(GRIDS)

    layout = model.layout(pixels, grid)
    hidden = model.encode_patches(model.embed_patches(pixels, layout), layout)
    expected = plain.hidden(pixels, GRIDS)
    # ln_post's weights are small on purpose, so compare relative to their size
    torch.testing.assert_close(hidden.double(), expected, rtol=0, atol=2e-5 * 2e-3)
    merged = plain.merged(expected, GRIDS)
    got = model.merge(hidden, layout)
    torch.testing.assert_close(got.double(), merged, rtol=0, atol=2e-5)
    normed = parity.trace(model, pixels, grid).tensors["z_norm"]
    torch.testing.assert_close(
        normed.double(), torch.stack(plain.normed(merged)), rtol=0, atol=5e-5
    )
    books = torch.stack([plain.codebook(i) for i in range(config["n_q_tokens"])])
    torch.testing.assert_close(model.codebooks.double(), books, rtol=0, atol=1e-5)
    codes = model.encode(pixels, grid)
    assert torch.equal(codes, plain.codes(pixels, GRIDS))
    torch.testing.assert_close(model.embed(codes).double(), plain.fused(codes), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_theta": 120.0}, "rope_theta"),
    ],
)
def test_the_plain_model_tells_options_apart(wrong: dict[str, Any], field: str) -> None:
    """Guards the test above: its tolerance must be able to see each of these."""
    config, other = make_config(), make_config(wrong)
    state, pixels = make_state(config), make_pixels()
    first = PlainTokenizer(config, state).hidden(pixels, GRIDS)
    second = PlainTokenizer(other, state).hidden(pixels, GRIDS)
    assert (first - second).abs().max() > 4 * 2e-5 * 2e-3, field


def test_images_do_not_see_each_other(golden: Path) -> None:
    path = golden / "tokenizer" / "tok_a"
    model, data = VisionTokenizer.from_pretrained(path), load_file(path / "fixtures.safetensors")
    grid = data["image_grid_thw"]
    together = model.encode(data["pixel_values"], grid)
    alone = [
        model.encode(pixels, grid[i : i + 1])
        for i, pixels in enumerate(data["pixel_values"].split(grid.prod(1).tolist()))
    ]
    assert torch.equal(together, torch.cat(alone))


def test_equal_sizes_take_the_batched_path(golden: Path) -> None:
    path = golden / "tokenizer" / "tok_a"
    model, data = VisionTokenizer.from_pretrained(path), load_file(path / "fixtures.safetensors")
    grid = data["image_grid_thw"][:1]
    pixels = data["pixel_values"][: int(grid.prod())]
    twice = model.encode(torch.cat([pixels, pixels.flip(0)]), grid.repeat(2, 1))
    once = model.encode(pixels, grid), model.encode(pixels.flip(0), grid)
    assert torch.equal(twice, torch.cat(once))


def test_pre_sliced_codebooks_give_the_same_codes(tmp_path: Path) -> None:
    config = make_config()
    state = make_state(config)
    full = VisionTokenizer.from_pretrained(save_checkpoint(tmp_path / "full", config, state))
    for book in range(4):
        name = f"quantizer.{book}.embedding.weight"
        state[name] = state[name][12 * book : 12 * (book + 1)]
    sliced = VisionTokenizer.from_pretrained(save_checkpoint(tmp_path / "cut", config, state))
    assert torch.equal(full.codebooks, sliced.codebooks)


def test_older_names_load(tmp_path: Path) -> None:
    config = make_config()
    state = make_state(config)
    expected = VisionTokenizer.from_pretrained(save_checkpoint(tmp_path / "new", config, state))
    old = {}
    for name, tensor in state.items():
        stored = name.replace("visual.", "visual.vision_model.")
        if stored.startswith("visual."):
            for new, former in (
                ("sa_norm", "layer_norm1"), ("mlp_norm", "layer_norm2"), (".attn.", ".self_attn."),
                ("output_proj", "out_proj"), ("mlp.w1", "mlp.fc1"), ("mlp.w2", "mlp.fc2"),
                ("ln_post", "post_layernorm"),
            ):  # fmt: skip
                stored = stored.replace(new, former)
        old[stored.replace("up_projectors", "quant_projector")] = tensor
    assert "visual.vision_model.encoder.layers.0.self_attn.out_proj.weight" in old
    got = VisionTokenizer.from_pretrained(save_checkpoint(tmp_path / "old", config, old))
    assert torch.equal(
        got.encode(make_pixels(), torch.tensor(GRIDS)),
        expected.encode(make_pixels(), torch.tensor(GRIDS)),
    )
    assert got.up_projectors is not None


def test_loads_inside_a_language_model(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    model = VisionTokenizer.from_pretrained(path, prefix="visual_tokenizer.")
    data = load_file(path / "fixtures.safetensors")
    if "vis/pixel_values" not in data:
        pytest.skip("the fixtures hold no image")
    codes = model.encode(data["vis/pixel_values"], data["vis/image_grid_thw"].view(-1, 3))
    assert torch.equal(codes, data["vis/indices"])
    assert torch.equal(model.global_ids(codes, 640), data["vis/aligned_ids"])


def test_without_up_projectors(tmp_path: Path) -> None:
    config = make_config()
    state = {k: v for k, v in make_state(config).items() if not k.startswith("up_projectors")}
    model = VisionTokenizer.from_pretrained(save_checkpoint(tmp_path, config, state))
    codes = model.encode(make_pixels(), torch.tensor(GRIDS))
    with pytest.raises(InputError, match="up_projectors"):
        model.embed(codes)


@pytest.mark.parametrize(
    "lost",
    ["quantizer.2.embedding.weight", "quantizer.1.q_norm.bias", "encoder.bias", "up_projectors.3"],
)
def test_missing_tensors_are_named(tmp_path: Path, lost: str) -> None:
    config = make_config()
    state = {k: v for k, v in make_state(config).items() if not k.startswith(lost)}
    with pytest.raises(WeightError, match=lost.replace(".", r"\.")):
        VisionTokenizer.from_pretrained(save_checkpoint(tmp_path, config, state))


def test_misshapen_and_broken_codebooks_are_named(tmp_path: Path) -> None:
    config = make_config()
    state = make_state(config)
    short = {**state, "quantizer.1.embedding.weight": torch.zeros(13, 12)}
    with pytest.raises(WeightError, match=r"quantizer\.1\.embedding\.weight.*\[12, 12\]"):
        VisionTokenizer.from_pretrained(save_checkpoint(tmp_path / "a", config, short))
    state["quantizer.3.embedding.weight"][40, 2] = float("nan")
    with pytest.raises(WeightError, match=r"quantizer\.3\.embedding\.weight holds NaN"):
        VisionTokenizer.from_pretrained(save_checkpoint(tmp_path / "b", config, state))


def test_dtype_is_cast_and_kept(golden: Path, tmp_path: Path) -> None:
    source = golden / "tokenizer" / "tok_a"
    assert VisionTokenizer.from_pretrained(source).dtype == torch.float32
    cast = VisionTokenizer.from_pretrained(source, dtype=torch.bfloat16)
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert cast.codebooks.dtype == torch.bfloat16
    shutil.copy(source / "config.json", tmp_path)
    stored = load_file(source / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in stored.items()}, str(tmp_path / "model.safetensors"))
    own = VisionTokenizer.from_pretrained(tmp_path)
    assert own.dtype == torch.bfloat16
    assert torch.equal(own.codebooks, cast.codebooks)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> VisionTokenizer:
    config = make_config()
    path = save_checkpoint(tmp_path_factory.mktemp("small"), config, make_state(config))
    return VisionTokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    ("pixels", "grid", "message"),
    [
        ((8, 3, 14, 14), [[1, 4, 3]], "even rows and columns"),
        ((8, 3, 14, 14), [[1, 2, 2]], r"\[4, 3, 14, 14\]"),
        ((8, 3, 16, 16), [[1, 4, 2]], r"\[8, 3, 14, 14\]"),
        ((8, 588), [[1, 4, 2]], r"\[8, 588\]"),
        ((0, 3, 14, 14), [[0, 4, 2]], "positive"),
        ((8, 3, 14, 14), [1, 4, 2], r"\[images, 3\]"),
    ],
)
def test_bad_inputs_are_named(
    small: VisionTokenizer, pixels: tuple[int, ...], grid: list[Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        small.encode(torch.zeros(pixels), torch.tensor(grid))


def test_bad_dtypes_and_codes_are_named(small: VisionTokenizer) -> None:
    grid = torch.tensor([[1, 2, 2]])
    with pytest.raises(InputError, match="floating"):
        small.encode(torch.zeros(4, 3, 14, 14, dtype=torch.uint8), grid)
    with pytest.raises(InputError, match="integers"):
        small.encode(torch.zeros(4, 3, 14, 14), grid.float())
    with pytest.raises(InputError, match="mode"):
        small.encode(torch.zeros(4, 3, 14, 14), grid, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 to 11"):
        small.embed(torch.full((2, 4), 12))
    with pytest.raises(InputError, match=r"\[tokens, 4\]"):
        small.global_ids(torch.zeros(2, 3, dtype=torch.int64), 100)


def test_global_ids_need_disjoint_ranges(tmp_path: Path, small: VisionTokenizer) -> None:
    codes = torch.tensor([[0, 1, 2, 11]])
    assert small.global_ids(codes, 100).tolist() == [[100, 113, 126, 147]]
    config = make_config(split_voc=1)
    other = VisionTokenizer.from_pretrained(save_checkpoint(tmp_path, config, make_state(config)))
    with pytest.raises(ConfigError, match="split_voc"):
        other.global_ids(codes, 100)


def test_wrong_config_is_named(golden: Path) -> None:
    with pytest.raises(ConfigError, match="KeyeTokenizerConfig"):
        VisionTokenizer.from_pretrained(golden / "dit" / "tiny_release")


def test_load_picks_the_class(golden: Path, tmp_path: Path) -> None:
    assert isinstance(load(golden / "tokenizer" / "tok_a"), VisionTokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ConfigError, match="AutoencoderDC"):
        load(tmp_path)


def test_load_picks_the_other_classes(golden: Path) -> None:
    assert type(load(golden / "llm" / "tiny_a")).__name__ == "KelixLM"
    assert type(load(golden / "dit" / "tiny_release")).__name__ == "KelixDiT"
    vae = load(golden / "e2e_dit" / "vae", dtype=torch.bfloat16)
    assert type(vae).__name__ == "AutoencoderDC"
    assert next(vae.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_attention_rounds_probabilities_once(dtype: torch.dtype) -> None:
    """Long enough to be computed in parts, which are as if it were whole."""
    lengths = (1100, 4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, sum(lengths), 2, 8, generator=generator).to(dtype).unbind()
    wanted = []
    for a, b, c in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", a.double(), b.double()) * 8**-0.5
        chances = scores.softmax(-1).to(dtype)
        wanted.append(torch.einsum("hqk,khd->qhd", chances.double(), c.double()).to(dtype))
    got = segment_attention(q, k, v, lengths)
    assert (got == torch.cat(wanted)).float().mean() > 0.98
