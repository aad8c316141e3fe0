"""A decode step and a denoise step never wait for the device; the blocks are fetched once, after.

Three ways: the operators that would wait are counted on a CPU; the steps run on the meta device,
where there is no value to read; on a GPU torch itself refuses to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kelix_rt import Engine, RenderParams, SamplingParams
from kelix_rt.models.sequences import PagedKV
from kelix_rt.models.transfer import to_device
from kelix_rt.plans import BlockPlan
from kelix_rt.stages.denoise import Denoiser, RenderState
from kelix_rt.stages.generate import BlockBatch, GenerateStage
from tests.engine_helpers import load_engine
from tests.host_waits import HostWaits

SEEDED = SamplingParams(temperature=1.0, top_k=9, top_p=0.9, min_p=0.01, seed=5, max_blocks=9)
REFERENCE = replace(SEEDED, rule="reference")
RENDERS = [
    {"cfg": 1.0},
    {"cfg": 3.0},
    {"cfg": 1.0, "scheduler": "dpm++"},
    {"cfg": 2.0, "scheduler": "dpm++"},
]
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def decode_batch(engine: Engine, *sampling: SamplingParams) -> BlockBatch:
    """A step in which each of these requests has one row and keeps its hidden state."""
    for number, one in enumerate(sampling):
        engine.add_request([5, 6, 7 + number], one, return_hidden=True)
    engine.step()
    plan = engine.scheduler.schedule()
    assert isinstance(plan, BlockPlan)
    assert all(span.count == 1 for span in plan.spans)
    return engine.runner.buffer.pack(plan)[0]


def drawings(engine: Engine, lengths: tuple[int, ...], **options: Any) -> list[RenderState]:
    stage = engine.runner.render_stage()
    width = stage.dit.condition_channels
    conditions = [torch.randn(n, width).to(engine.runner.device) for n in lengths]
    render = RenderParams(steps=4, seed=1, **options)
    return [stage.start(condition.to(stage.dit.dtype), render) for condition in conditions]


@pytest.fixture(scope="module")
def drawing(golden: Path) -> Engine:
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    return load_engine(golden / "llm" / "tiny_a", **parts)


@pytest.mark.parametrize("sampling", [(SEEDED,), (SEEDED, SEEDED), (SEEDED, REFERENCE)])
def test_a_decode_step_reads_nothing(golden: Path, sampling: tuple[SamplingParams, ...]) -> None:
    engine = load_engine(golden / "llm" / "tiny_a")
    batch = decode_batch(engine, *sampling)
    with HostWaits() as waits:
        engine.runner.generate.step(batch)
    assert waits.calls > 0
    assert waits.found == []


@pytest.mark.parametrize("options", RENDERS, ids=str)
@pytest.mark.parametrize("lengths", [(7,), (7, 5), (4, 9, 9)])
def test_a_denoise_step_reads_nothing(
    drawing: Engine, lengths: tuple[int, ...], options: dict[str, Any]
) -> None:
    """The first one, which joins the drawings, and those after it."""
    states = drawings(drawing, lengths, **options)
    with HostWaits() as waits:
        for _ in range(3):
            drawing.runner.render_stage().step(states)
    assert waits.calls > 0
    assert waits.found == []


def test_drawings_with_and_without_guidance_read_nothing(drawing: Engine) -> None:
    states = [*drawings(drawing, (7,), cfg=1.0), *drawings(drawing, (5,), cfg=3.0)]
    with HostWaits() as waits:
        drawing.runner.render_stage().step(states)
    assert waits.found == []


def wait_by_item(x: Tensor) -> Any:
    return x.sum().item()


def wait_by_branch(x: Tensor) -> Any:
    return 1 if x.amax() > 0 else 0


def wait_by_mask(x: Tensor) -> Any:
    return x[x > 0]


def wait_by_store(x: Tensor) -> Any:
    x[x > 0] = x[x > 0]


def wait_by_nonzero(x: Tensor) -> Any:
    return (x > 0).nonzero()


@pytest.mark.parametrize(
    "call", [wait_by_item, wait_by_branch, wait_by_mask, wait_by_store, wait_by_nonzero]
)
def test_a_wait_is_found(call: Callable[[Tensor], Any]) -> None:
    with HostWaits() as waits:
        call(torch.randn(8))
    assert waits.found


def on_meta(batch: BlockBatch) -> BlockBatch:
    """The same batch without values."""
    context = {f.name: getattr(batch.context, f.name).to("meta") for f in fields(batch.context)}
    tensors = {
        f.name: getattr(batch, f.name).to("meta")
        for f in fields(batch)
        if isinstance(getattr(batch, f.name), Tensor)
    }
    return replace(batch, **tensors, context=type(batch.context)(**context))


@pytest.mark.parametrize("sampling", [(SEEDED,), (SEEDED, REFERENCE)])
def test_a_decode_step_needs_no_values(golden: Path, sampling: tuple[SamplingParams, ...]) -> None:
    engine = load_engine(golden / "llm" / "tiny_a", num_pages=8)
    batch = decode_batch(engine, *sampling)
    runner = engine.runner
    runner.model.visual_tokenizer = None
    kv = PagedKV(runner.kv.k.to("meta"), runner.kv.v.to("meta"))
    result = GenerateStage(runner.model.to("meta"), kv).step(on_meta(batch))
    assert result.blocks.shape == (len(sampling), batch.ids.shape[1])
    assert result.hidden is not None
    with pytest.raises((RuntimeError, NotImplementedError)):
        result.blocks.tolist()


def test_numbers_arrive_on_the_device() -> None:
    moved = to_device([3, 1, 2], torch.device("cpu"))
    assert moved.dtype == torch.int64
    assert moved.tolist() == [3, 1, 2]


def gpu_engine(golden: Path) -> Engine:
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    return Engine.from_pretrained(golden / "llm" / "tiny_a", device="cuda", **parts)


class NoWaits:
    """Between enter and exit torch raises where the host would wait for the GPU."""

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("sampling", [(SEEDED,), (SEEDED, SEEDED), (SEEDED, REFERENCE)])
def test_a_gpu_is_not_waited_for_in_a_decode_step(
    golden: Path, device: str, sampling: tuple[SamplingParams, ...]
) -> None:
    engine = gpu_engine(golden)
    batch = decode_batch(engine, *sampling)
    bucket = len(sampling)
    with NoWaits():
        eager = engine.runner.generate.step(batch).blocks
    assert eager.cpu().shape == (bucket, batch.ids.shape[1])
    engine.runner.buffer.pad(bucket)
    with NoWaits():
        replayed = engine.runner.graphs.replay(bucket).blocks
    assert (replayed.cpu() >= 0).all()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("options", RENDERS, ids=str)
@pytest.mark.parametrize("lengths", [(7,), (7, 5), (4, 9, 9)])
def test_a_gpu_is_not_waited_for_in_a_denoise_step(
    golden: Path, device: str, lengths: tuple[int, ...], options: dict[str, Any]
) -> None:
    """But for the tables of a latent size, which its first step makes."""
    engine = gpu_engine(golden)
    denoiser: Denoiser = engine.runner.render_stage().denoiser
    denoiser.step(drawings(engine, lengths, **options))
    states = drawings(engine, lengths, **options)
    with NoWaits():
        for _ in range(2):
            denoiser.step(states)
    assert all(state.latent.cpu().isfinite().all() for state in states)
