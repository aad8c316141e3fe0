"""The plan of an engine against what is really allocated, and what it says fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kelix_rt import CapacityError, ConfigError, Engine, EngineConfig, InputError, info
from kelix_rt.assets import BUNDLED
from kelix_rt.config import KelixConfig, read_config
from kelix_rt.denoise_graphs import DENOISE_ROWS
from kelix_rt.ledger import MemoryEntry, MemoryPlan
from kelix_rt.planning import config_entries, engine_plan
from kelix_rt.workspace import GRAPH_BYTES

OPTIONS: dict[str, Any] = {"num_pages": 40, "page_size": 8, "max_batch": 4}


def allocated(*owners: torch.nn.Module | torch.Tensor) -> int:
    """Bytes of the storages behind modules and tensors, each counted once."""
    tensors = [
        tensor
        for owner in owners
        for tensor in (
            [owner] if isinstance(owner, torch.Tensor) else [*owner.parameters(), *owner.buffers()]
        )
    ]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def loaded_bytes(engine: Engine) -> dict[str, int]:
    """What an engine holds between steps, by stage."""
    runner = engine.runner
    tokenizer = runner.model.visual_tokenizer
    encode = allocated(tokenizer)
    own = allocated(runner.model) - encode
    cache = allocated(runner.kv.k, runner.kv.v)
    render = allocated(runner.render.dit, runner.render.vae.module) if runner.render else 0
    return {"encode": encode, "generate": own + cache + runner.buffer.num_bytes, "render": render}


@pytest.fixture(params=["tiny", "tiny_a", "tiny_b"])
def case(request: pytest.FixtureRequest, golden: Path) -> tuple[str | Path, dict[str, Path]]:
    if request.param == "tiny":
        return BUNDLED, {}
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    return golden / "llm" / request.param, parts if request.param == "tiny_a" else {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_is_what_is_allocated(
    case: tuple[str | Path, dict[str, Path]], dtype: str
) -> None:
    model, parts = case
    planned = Engine.plan(model, EngineConfig(**OPTIONS), **parts, device="cpu", dtype=dtype)
    engine = Engine.from_pretrained(model, **parts, device="cpu", dtype=dtype, **OPTIONS)
    for stage, real in loaded_bytes(engine).items():
        booked = planned.bytes_of("loaded", stage)
        if stage == "generate":
            booked += planned.kv_bytes
        assert booked == pytest.approx(real, rel=0.02), stage
    assert planned.num_pages == engine.scheduler.pool.num_pages
    assert (planned.max_positions, planned.max_batch) == (engine.max_positions, 4)


def test_the_cache_gets_what_the_plan_leaves(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as much memory free as the plan was made for, loading takes the pages it named."""
    path = golden / "llm" / "tiny_a"
    free = 8 << 20
    planned = Engine.plan(path, free_bytes=free)
    # Loading looks at what is free once the weights are there, and before the step buffers are.
    buffers = dict(planned.rows())["step buffers"]
    left = free - planned.bytes_of("loaded") + buffers
    monkeypatch.setattr("kelix_rt.loading.available_bytes", lambda device: left)
    engine = Engine.from_pretrained(path, device="cpu")
    pages = engine.scheduler.pool.num_pages
    assert pages < EngineConfig().max_batch * 512 // 16, "else memory decides nothing"
    assert pages == planned.num_pages


def test_a_config_alone_gives_the_same_weights(golden: Path) -> None:
    for path in (golden / "llm" / "tiny_a", golden / "llm" / "tiny_b"):
        config = read_config(path)
        assert isinstance(config, KelixConfig)
        alone = engine_plan(config, EngineConfig(**OPTIONS), dtype=torch.float32)
        stored = engine_plan(path, EngineConfig(**OPTIONS))
        assert alone.kv_bytes == stored.kv_bytes
        assert alone.bytes_of("transient") == stored.bytes_of("transient")
        generate = alone.bytes_of("loaded", "generate")
        assert generate == pytest.approx(stored.bytes_of("loaded", "generate"), rel=0.01)
        # A checkpoint may lack the up-projectors, which a config cannot tell.
        assert alone.bytes_of("loaded", "encode") >= stored.bytes_of("loaded", "encode")
        assert {e.name for e in alone.entries} == {e.name for e in stored.entries}


def test_a_released_size_is_planned_from_its_config() -> None:
    """The figures of an 8B backbone with a 217k-row table and head, in bfloat16."""
    released = KelixConfig.from_json(RELEASED)
    planned = engine_plan(released, EngineConfig(max_batch=64), free_bytes=80 << 30)
    weights = {entry.name: entry.num_bytes for entry in planned.entries}
    assert weights["embedding table"] == weights["output head"] == 217472 * 4096 * 2
    assert weights["backbone"] == pytest.approx(36 * 192.9e6 * 2, rel=0.01)
    assert planned.kv_bytes_per_block == 2 * 36 * 8 * 128 * 2
    assert planned.total_bytes <= 80 << 30
    assert planned.concurrency(450) == 64
    assert 0 < planned.concurrency() < 64
    names = {entry.name for entry in config_entries(released, torch.bfloat16)}
    assert names == set(weights) - {
        "decode graphs", "step buffers", "workspace of a step",
        "workspace of encoding 504 x 504 pixels",
    }  # fmt: skip


RELEASED = {
    "qwen_config": {
        "vocab_size": 151936, "embed_dim": 4096, "num_layers": 36, "num_heads": 32,
        "tie_word_embeddings": False,
        "num_kv_heads": 8, "head_dim": 128, "intermediate_dim": 12288, "max_seq_len": 40960,
        "codebook_size": 65536, "n_q_tokens": 8,
    },
    "tokenizer_config": {
        "vision_config": {
            "image_size": 504, "patch_size": 14, "hidden_size": 1152, "num_hidden_layers": 27,
            "num_attention_heads": 16, "intermediate_size": 4304,
        },
        "codebook_size": 65536, "embedding_dim": 128, "n_q_tokens": 8, "split_voc": 8,
    },
    "token_decoder_config": {
        "vocab_size": 151936, "max_pos_length": 10, "max_length": 10, "d_model": 512, "nhead": 8,
        "num_layers": 1, "dim_feedforward": 2048, "eos_token": 151681, "input_dim": 4096,
    },
}  # fmt: skip


def test_graphs_are_booked_where_they_are_made(golden: Path) -> None:
    """In the plan of a GPU, and only with the option on and nothing that forbids them."""
    path = golden / "llm" / "tiny_a"

    def booked(**options: Any) -> int:
        return dict(engine_plan(path, EngineConfig(**options)).rows()).get("decode graphs", 0)

    one, eight = booked(max_batch=1), booked(max_batch=8)
    draws = 5 * 7 * (640 + 32) * 4 + 4 * 7 * 2 * 160 * 4
    assert eight - one == draws + 3 * GRAPH_BYTES
    assert booked(cuda_graphs=False) == booked(verify_head=True) == 0
    on_cpu = Engine.plan(path, EngineConfig(), device="cpu")
    assert "decode graphs" not in dict(on_cpu.rows())
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    drawing = dict(engine_plan(path, **parts).rows())
    room = DENOISE_ROWS * drawing["conditions of 8 drawings"] // (8 + 16 + 1)
    assert drawing["denoise graphs"] > room + DENOISE_ROWS * GRAPH_BYTES
    without = dict(engine_plan(path, EngineConfig(cuda_graphs=False), **parts).rows())
    assert "denoise graphs" not in without


def test_requests_at_once_follow_pages_and_batch() -> None:
    entries = (MemoryEntry("weights", 100, "generate"),)
    planned = MemoryPlan(entries, torch.float32, 8, 16, num_pages=10, max_positions=48, max_batch=6)
    assert planned.concurrency() == 3
    assert planned.concurrency(16) == 6
    assert planned.concurrency(17) == 5
    assert planned.concurrency(161) == 0
    assert planned.total_bytes == 100 + 8 * 16 * 10
    with pytest.raises(InputError, match="at least 1, got 0"):
        planned.concurrency(0)


def test_the_workspaces_grow_with_what_the_options_allow(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    small = engine_plan(path, EngineConfig(max_step_tokens=64, max_condition_length=10), **parts)
    large = engine_plan(path, EngineConfig(max_step_tokens=256, max_condition_length=40), **parts)
    steps = [dict(p.rows())["workspace of a step"] for p in (small, large)]
    assert steps[1] - steps[0] == 4 * (256 - 64) * 2 * 160 * 4
    conditions = [dict(p.rows())["conditions of 8 drawings"] for p in (small, large)]
    assert conditions[1] == 4 * conditions[0]


def test_what_cannot_be_planned_is_refused(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        Engine.plan(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="must hold a Kelix language model"):
        Engine.plan(golden / "e2e_dit" / "dit")
    path = golden / "llm" / "tiny_a"
    with pytest.raises(ConfigError, match="there is no vae="):
        Engine.plan(path, dit=golden / "e2e_dit" / "dit")
    with pytest.raises(ConfigError, match="must hold a SanaConfig"):
        Engine.plan(path, dit=path, vae=golden / "e2e_dit" / "vae")
    with pytest.raises(CapacityError, match="KV cache"):
        Engine.plan(path, free_bytes=1000)


def test_facts_of_an_engine_that_does_not_fit(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    found = info.engine(path, free_bytes=1000)
    assert "only 80% of 0 bytes are free" in found["error"]
    assert (found["pages"], found["free"]) == (1, 1000)
    fitting = info.engine(path, free_bytes=1 << 40)
    assert "error" not in fitting
    assert [row["blocks"] for row in fitting["concurrency"]] == [256, 512]
    assert fitting["total"] == fitting["loaded"] + fitting["transient"] + fitting["kv_bytes"]
