"""The ledger against tensors that are really allocated."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kelix_rt import CapacityError, EngineConfig, memory
from kelix_rt.config import KelixConfig, read_config
from kelix_rt.memory import available_bytes, choose_pages, kv_bytes_per_block, max_positions, plan
from tests.engine_helpers import load_engine

LANGUAGE = ("backbone", "embedding table", "output head", "block decoder")


@pytest.fixture(params=["tiny_a", "tiny_b"])
def path(request: pytest.FixtureRequest, golden: Path) -> Path:
    return golden / "llm" / request.param


@pytest.fixture
def config(path: Path) -> KelixConfig:
    config = read_config(path)
    assert isinstance(config, KelixConfig)
    return config


def tensor_bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_cache_bytes_are_those_of_the_cache(path: Path) -> None:
    engine = load_engine(path, num_pages=10, page_size=8)
    kv = engine.runner.kv
    planned = plan(path, options=EngineConfig(num_pages=10, page_size=8))
    assert planned.kv_bytes == kv.k.nbytes + kv.v.nbytes
    assert planned.kv_bytes_per_block == planned.kv_bytes // 80


def test_weights_are_booked_as_they_are_loaded(path: Path) -> None:
    model = load_engine(path).runner.model
    booked = {entry.name: entry.num_bytes for entry in plan(path).entries}
    own = [p for name, p in model.named_parameters() if not name.startswith("visual_tokenizer")]
    loaded = sum(p.numel() * p.element_size() for p in own)
    unused_positions = booked["block decoder"] - tensor_bytes(model.block_decoder)
    assert sum(booked[name] for name in LANGUAGE) - unused_positions == loaded
    assert booked["backbone"] == tensor_bytes(model.backbone)


def test_the_unused_head_is_not_booked(golden: Path) -> None:
    planned = plan(golden / "llm" / "tiny_a")
    head = dict(planned.rows())["output head"]
    assert head == 896 * 64 * 4


def test_half_precision_halves_the_weights(path: Path) -> None:
    full, half = plan(path), plan(path, dtype=torch.bfloat16)
    assert full.entries[0].num_bytes == 2 * half.entries[0].num_bytes
    assert half.dtype == torch.bfloat16


def test_pages_follow_memory_and_never_exceed_use(config: KelixConfig) -> None:
    options = EngineConfig(max_batch=2, max_model_len=100, kv_memory_fraction=0.5)
    page = kv_bytes_per_block(config, torch.float32) * options.page_size
    assert choose_pages(config, options, torch.float32, 10 * page) == 5
    assert choose_pages(config, options, torch.float32, 1000 * page) == 2 * 7
    assert choose_pages(config, replace(options, num_pages=3), torch.float32, 3 * page) == 3
    with pytest.raises(CapacityError, match="num_pages=3 pages"):
        choose_pages(config, replace(options, num_pages=3), torch.float32, 3 * page - 1)
    with pytest.raises(CapacityError, match=f"a page takes {page} bytes"):
        choose_pages(config, options, torch.float32, page)


def test_positions_are_bounded_by_the_model(config: KelixConfig) -> None:
    assert max_positions(config, EngineConfig()) == config.qwen_config.max_seq_len
    assert max_positions(config, EngineConfig(max_model_len=7)) == 7
    assert max_positions(config, EngineConfig(max_model_len=1 << 20)) == 512


def test_the_total_is_the_sum_of_the_rows(path: Path) -> None:
    *rows, (name, total) = plan(path).rows()
    assert name == "total"
    assert sum(size for _, size in rows) == total


@pytest.mark.parametrize("part", ["e2e_dit/dit", "e2e_dit/vae", "tokenizer/tok_a"])
def test_other_checkpoints_have_weights_only(golden: Path, part: str) -> None:
    planned = plan(golden / part)
    assert planned.num_pages == 0
    assert planned.total_bytes > 0


def test_memory_that_the_file_cache_holds_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "meminfo"
    info.write_text(
        "MemTotal: 9000 kB\nMemFree:   10 kB\nMemAvailable:   4000 kB\nCached: 3990 kB\n"
    )
    monkeypatch.setattr(memory, "MEMINFO", info)
    assert available_bytes(torch.device("cpu")) == 4000 * 1024


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.container_bytes() == sys.maxsize, "no control group"
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.container_bytes() == sys.maxsize, "no limit"
    (tmp_path / "memory.max").write_text("10000\n")
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 4000\ninactive_file 2500\n")
    assert available_bytes(torch.device("cpu")) == 5500
