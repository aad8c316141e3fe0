"""Sleep gives memory back, wake takes it again, and nothing else changes."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kelix_rt import (
    AsleepError,
    CapacityError,
    ConfigError,
    Engine,
    KelixError,
    Prompt,
    RenderParams,
    SamplingParams,
    WeightError,
)
from kelix_rt.offload import Offloaded
from tests.engine_helpers import (
    assert_idle,
    golden_blocks,
    golden_prompt,
    golden_sampling,
    load_engine,
)

SAMPLED = SamplingParams(1.0, 0, 1.0, max_blocks=9)  # without a seed: the engine's count decides
PICTURE = Image.fromarray(np.arange(56 * 56 * 3, dtype=np.uint8).reshape(56, 56, 3))


@pytest.fixture
def path(golden: Path) -> Path:
    return golden / "llm" / "tiny_a"


def load_drawing(golden: Path, **options: Any) -> Engine:
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    return load_engine(golden / "llm" / "tiny_a", **parts, **options)


def outputs(engine: Engine, path: Path) -> list[np.ndarray]:
    """Of every route: greedy, sampled, an image encoded and one drawn."""
    prompt = Prompt(*golden_prompt(path, "gen2"))
    greedy = engine.generate([prompt], golden_sampling(path))[0].blocks
    np.testing.assert_array_equal(greedy, golden_blocks(path, "gen2"))
    sampled = engine.generate([prompt], SAMPLED)[0].blocks
    drawn = engine.generate_image([5, 6], render=RenderParams(steps=2, seed=1))
    codes = engine.encode_image(PICTURE).codes.numpy()
    return [greedy, sampled, codes, np.asarray(drawn.image), drawn.blocks]


def sleep_in_main_memory(engine: Engine) -> None:
    """What sleep(weights="host") does on a GPU."""
    engine._offloaded = engine.runner.offload()
    engine.scheduler.pool.reset_cache()


def loaded_bytes(engine: Engine) -> int:
    runner = engine._runner
    assert runner is not None
    modules = (runner.model, runner.render.dit, runner.render.vae.module)
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    tensors += [runner.kv.k, runner.kv.v]
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("way", ["disk", "host"])
def test_outputs_are_equal_before_and_after(golden: Path, path: Path, way: str) -> None:
    expected = load_drawing(golden)
    engine = load_drawing(golden)
    for _ in range(3):
        for got, known in zip(outputs(engine, path), outputs(expected, path), strict=True):
            np.testing.assert_array_equal(got, known)
        if way == "disk":
            engine.sleep()
        else:
            sleep_in_main_memory(engine)
        assert engine.is_asleep
        engine.wake()
        assert not engine.is_asleep
    assert_idle(engine)
    assert engine.scheduler.pool.num_cached == 0
    assert engine.stats() == expected.stats(), "the codes of images are not forgotten"


def test_the_disk_keeps_nothing_in_memory(golden: Path, path: Path) -> None:
    engine = load_drawing(golden)
    outputs(engine, path)
    runner = engine.runner
    held = [weakref.ref(item) for item in (runner, runner.model, runner.render.dit, runner.kv.k)]
    del runner
    engine.sleep()
    gc.collect()
    assert [ref() for ref in held] == [None] * 4


def test_it_wakes_in_another_working_directory(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(golden)
    parts = {name: f"e2e_dit/{name}" for name in ("dit", "vae")}
    engine = load_engine(Path("llm/tiny_a"), **parts)
    engine.sleep("disk")
    monkeypatch.chdir("/")
    engine.wake()
    assert engine.runner.render is not None


def test_main_memory_frees_every_byte_of_the_device(golden: Path, path: Path) -> None:
    engine = load_drawing(golden)
    outputs(engine, path)
    before = loaded_bytes(engine)
    sleep_in_main_memory(engine)
    assert loaded_bytes(engine) == 0
    assert engine._runner.render.denoiser._plans == {}
    engine.wake()
    assert loaded_bytes(engine) == before


@pytest.mark.parametrize("way", ["disk", "host"])
def test_a_sleeping_engine_refuses_requests(golden: Path, path: Path, way: str) -> None:
    engine = load_drawing(golden)
    (engine.sleep if way == "disk" else lambda: sleep_in_main_memory(engine))()
    calls = (
        lambda: engine.generate([[1, 2]]),
        lambda: engine.add_request([1, 2]),
        lambda: engine.generate_blocks([1, 2]),
        lambda: engine.generate_image("a red circle"),
        lambda: engine.encode_image(PICTURE),
        lambda: engine.reconstruct(PICTURE),
        lambda: engine.chat([{"role": "user", "content": "Hello"}]),
        lambda: list(engine.stream("Hello")),
    )
    for call in calls:
        with pytest.raises(AsleepError, match=r"the engine sleeps .* call wake\(\) first"):
            call()
    assert engine.step() == []
    assert not engine.has_work
    engine.sleep()  # a second time does nothing
    engine.wake()
    engine.wake()
    blocks = engine.generate([Prompt(*golden_prompt(path, "gen0"))], golden_sampling(path))
    np.testing.assert_array_equal(blocks[0].blocks, golden_blocks(path, "gen0"))


def test_unfinished_requests_keep_it_awake(path: Path) -> None:
    engine = load_engine(path)
    number = engine.add_request([1, 2], SAMPLED)
    with pytest.raises(KelixError, match="sleep: requests are unfinished"):
        engine.sleep()
    engine.abort(number)
    with pytest.raises(KelixError, match="have events nobody read"):
        engine.sleep()
    engine.step()
    engine.sleep()
    assert engine.is_asleep


def test_a_copy_on_the_cpu_is_refused(path: Path) -> None:
    engine = load_engine(path)
    with pytest.raises(ConfigError, match="frees nothing on a CPU"):
        engine.sleep(weights="host")
    with pytest.raises(ConfigError, match="must be 'auto', 'host' or 'disk', got 'disc'"):
        engine.sleep(weights="disc")
    assert not engine.is_asleep


def test_an_engine_that_cannot_wake_sleeps_on(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in path.iterdir():
        (model / file.name).symlink_to(file)
    engine = load_engine(model, num_pages=12)
    engine.sleep()
    with monkeypatch.context() as patch:
        patch.setattr("kelix_rt.loading.available_bytes", lambda device: 0)
        with pytest.raises(CapacityError, match="num_pages=12"):
            engine.wake()
    (model / "model.safetensors").rename(tmp_path / "gone")
    with pytest.raises(WeightError):
        engine.wake()
    assert engine.is_asleep
    (tmp_path / "gone").rename(model / "model.safetensors")
    engine.wake()
    assert engine.scheduler.pool.num_pages == 12
    assert engine.generate([[1, 2]], SAMPLED)[0].error is None


def test_views_stay_views_of_one_another() -> None:
    packed = torch.arange(12.0)
    module = nn.Linear(3, 2, bias=False)
    module.weight = nn.Parameter(packed[:6].view(2, 3))
    cache = torch.ones(5)
    with torch.inference_mode():
        expected = module(torch.ones(3))
    away = Offloaded([packed, *module.parameters()], [cache])
    assert packed.untyped_storage().nbytes() == cache.untyped_storage().nbytes() == 0
    away.restore()
    away.restore()  # as after a restore that found too little memory
    assert module.weight.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert torch.equal(packed, torch.arange(12.0))
    assert torch.equal(module(torch.ones(3)), expected)
    assert torch.equal(cache, torch.zeros(5))
