"""Int8 weights: what quantising loses, how they are read, and what an engine on them gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kelix_rt import ConfigError, Engine, EngineConfig, Prompt, SamplingParams
from kelix_rt.checkpoint import Checkpoint
from kelix_rt.errors import WeightError
from kelix_rt.models.backbone import weight_map
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.layers import INT8_ROWS, Int8Linear, int8_linear
from kelix_rt.planning import engine_plan
from kelix_rt.quantization import TILE, dequantize_int8, quantize_int8
from kelix_rt.release import random_engine
from kelix_rt.testing import assert_as_accurate_as_torch, randn
from kelix_rt.weights import split_weights
from tests.engine_helpers import assert_idle, golden_prompt, load_engine
from tests.test_release import toy_sizes

SAMPLED = SamplingParams(1.0, 0, 1.0, max_blocks=9, seed=3)


@pytest.fixture(params=["tiny_a", "tiny_b"])
def path(request: pytest.FixtureRequest, golden: Path) -> Path:
    return golden / "llm" / request.param


def int8_engine(path: Path, **options: Any) -> Engine:
    return load_engine(path, quantization="int8", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (600, 2100), (0, 4), (4, 0)])
def test_a_weight_is_off_by_half_a_scale_at_most(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = randn(*shape, dtype=dtype)
    codes, scale = quantize_int8(weight)
    assert (codes.dtype, scale.dtype, tuple(codes.shape)) == (torch.int8, torch.float32, shape)
    if weight.numel():
        largest = weight.double().abs().amax(1)
        torch.testing.assert_close(scale.double() * 127, largest, rtol=1e-6, atol=0)
        assert codes.abs().amax() == 127
    error = (codes.double() * scale.double().unsqueeze(1) - weight.double()).abs()
    assert bool((error <= 0.5001 * scale.double().unsqueeze(1)).all())


def test_rows_of_zeros_and_of_one_value() -> None:
    weight = torch.zeros(3, 5)
    weight[1] = -2.0
    codes, scale = quantize_int8(weight)
    assert torch.equal(dequantize_int8(codes, scale, torch.float32), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, INT8_ROWS, INT8_ROWS + 1, 90])
def test_products_of_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    """Above INT8_ROWS by tiles, here two and a rest."""
    inputs = 4096
    outputs = 2 * (TILE // inputs) + 3
    weight, scale = quantize_int8(randn(outputs, inputs, seed=1))
    x = randn(rows, inputs, dtype=dtype)
    exact = x.double() @ (weight.double() * scale.double().unsqueeze(1)).T
    plain = torch.nn.functional.linear(x, dequantize_int8(weight, scale, dtype))
    assert_as_accurate_as_torch(int8_linear(x, weight, scale), plain, exact)


def test_matrices_are_quantised_as_they_are_read(path: Path) -> None:
    """The same as quantising the loaded model."""
    full, seen = KelixLM.from_pretrained(path), []
    read = KelixLM.from_pretrained(
        path, quantization="int8", on_tensor=lambda name, size: seen.append((name, size))
    )
    full.quantize()
    matrices = {n: m for n, m in read.backbone.named_modules() if isinstance(m, Int8Linear)}
    assert len(matrices) == 4 * read.config.qwen_config.num_layers
    for name, own in matrices.items():
        other = full.backbone.get_submodule(name)
        assert isinstance(other, Int8Linear)
        assert torch.equal(own.weight, other.weight)
        assert torch.equal(own.weight_scale, other.weight_scale)
        size = dict(seen)[f"backbone.{name}.weight"]
        assert size == own.weight.nbytes + own.weight_scale.nbytes
    assert read.head.dtype == torch.int8 and read.head_scale is not None
    assert full.head_scale is not None and torch.equal(read.head_scale, full.head_scale)
    assert dict(seen)["head"] == read.head.nbytes + read.head_scale.nbytes
    for name, parameter in full.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter), name
    sources = weight_map(read.config.qwen_config)
    with pytest.raises(WeightError, match="is int8; load it without quantization"):
        split_weights(read.backbone, sources)


def test_nan_in_a_matrix_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Checkpoint, name: str, rows: slice | None = None) -> Tensor:
        tensor = original(self, name, rows).clone()
        if name.endswith("layers.0.mlp.w2.weight"):
            tensor.view(-1)[3] = torch.nan
        return tensor

    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(WeightError, match=r"mlp\.w2\.weight holds NaN"):
        KelixLM.from_pretrained(path, quantization="int8")


@torch.inference_mode()
def test_hidden_states_stay_close(path: Path) -> None:
    """Weights are off by 1/254 of a row's largest at most; so are states, relative to their size.

    The model on the dequantised weights gives the same as the int8 one up to roundings.
    """
    full, int8 = KelixLM.from_pretrained(path), KelixLM.from_pretrained(path, quantization="int8")
    prompt, image = golden_prompt(path, "gen0")
    ids = full.expand(prompt, image)
    want, got = full.hidden_states(ids)[-1], int8.hidden_states(ids)[-1]
    deviation = ((got - want).norm() / want.norm()).item()
    assert 1e-5 < deviation < 0.02, deviation
    for name, own in int8.backbone.named_modules():
        if isinstance(own, Int8Linear):
            weight = dequantize_int8(own.weight, own.weight_scale, torch.float32)
            full.backbone.get_submodule(name).weight.copy_(weight)
    torch.testing.assert_close(got, full.hidden_states(ids)[-1], atol=2e-5, rtol=1e-4)
    assert int8.head_scale is not None
    full.head.copy_(dequantize_int8(int8.head, int8.head_scale, torch.float32))
    torch.testing.assert_close(int8.full_logits(got), full.full_logits(got), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0, max_blocks=9), SAMPLED])
def test_a_request_does_not_depend_on_others_or_on_chunks(
    path: Path, sampling: SamplingParams
) -> None:
    prompts = [Prompt(*golden_prompt(path, "gen0")), [3, 4, 5], list(range(1, 90))]
    alone = [int8_engine(path).generate([prompt], sampling)[0].blocks for prompt in prompts]
    for options in ({}, {"max_step_tokens": 7}, {"max_batch": 2, "prefix_cache": False}):
        together = int8_engine(path, **options).generate(prompts, sampling)
        for output, blocks in zip(together, alone, strict=True):
            np.testing.assert_array_equal(output.blocks, blocks)


def test_hidden_states_are_equal_however_a_prompt_is_cut(path: Path) -> None:
    def hidden(**options: Any) -> Tensor:
        found = int8_engine(path, **options).generate_blocks(
            range(1, 90), sampling=SamplingParams(temperature=0.0, max_blocks=3), return_hidden=True
        )
        assert found.hidden is not None
        return found.hidden

    whole = hidden()
    assert torch.equal(hidden(max_step_tokens=13), whole)


def test_sleep_and_wake(path: Path) -> None:
    engine = int8_engine(path)
    before = engine.generate([[1, 2, 3]], SAMPLED)[0].blocks
    engine.sleep()
    engine.wake()
    assert isinstance(engine.runner.model.backbone.layers[0].gate_up, Int8Linear)
    np.testing.assert_array_equal(engine.generate([[1, 2, 3]], SAMPLED)[0].blocks, before)
    offloaded = engine.runner.offload()
    assert engine.runner.model.backbone.layers[0].gate_up.weight.untyped_storage().nbytes() == 0
    offloaded.restore()
    engine.scheduler.pool.reset_cache()
    np.testing.assert_array_equal(engine.generate([[1, 2, 3]], SAMPLED)[0].blocks, before)
    assert_idle(engine)


def test_random_weights_are_quantised_and_drawn_on() -> None:
    options = EngineConfig(quantization="int8", num_pages=20)
    engine = random_engine(toy_sizes(), torch.device("cpu"), torch.bfloat16, options)
    assert isinstance(engine.runner.model.backbone.layers[0].down, Int8Linear)
    assert len(engine.generate_blocks([1, 2], sampling=SAMPLED).ids) == 2 + 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_counts_bytes_of_int8(path: Path, dtype: str) -> None:
    options = EngineConfig(quantization="int8", num_pages=4)
    planned = Engine.plan(path, options, device="cpu", dtype=dtype)
    booked = {entry.name: entry.num_bytes for entry in planned.entries}
    model = int8_engine(path, dtype=dtype, num_pages=4).runner.model
    backbone = model.backbone
    scales = sum(b.nbytes for n, b in backbone.named_buffers() if n.endswith("scale"))
    loaded = sum(p.nbytes for p in backbone.parameters()) + scales
    assert booked["backbone"] == loaded
    assert model.head_scale is not None
    head = model.head.nbytes + model.head_scale.nbytes
    assert booked["output head"] == head
    config = engine_plan(KelixLM.from_pretrained(path).config, options, dtype=getattr(torch, dtype))
    sizes = {e.name: e.num_bytes for e in config.entries}
    assert (sizes["backbone"], sizes["output head"]) == (loaded, head)
    plain = Engine.plan(path, replace(options, quantization=None), device="cpu", dtype=dtype)
    assert {e.name: e.num_bytes for e in plain.entries}["backbone"] > 1.7 * loaded


def test_other_kinds_are_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization must be .*int8.*, got 'int4'"):
        load_engine(path, quantization="int4")
    with pytest.raises(ConfigError, match=r"quantization must be one of .*int8.*, got 'fp8'"):
        EngineConfig(quantization="fp8")  # type: ignore[arg-type]
