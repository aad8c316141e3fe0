"""benchmarks/launches.py: counts that hold for the real steps, and the table that is documented."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.launches import Row, count, denoise_step, in_block_loop, table, visual_block
from kelix_rt.config import SanaConfig, read_config
from kelix_rt.denoise_graphs import DenoiseGraphs
from kelix_rt.graphs import GraphCounts
from kelix_rt.models.dit import KelixDiT
from kelix_rt.plans import BlockPlan
from kelix_rt.release import Sizes
from kelix_rt.request import RenderParams, SamplingParams
from kelix_rt.stages.denoise import Denoiser
from tests.engine_helpers import load_engine

DOCS = Path(__file__).parent.parent / "docs" / "performance.md"
DECODING = SamplingParams(temperature=0.0, max_blocks=4)


def test_the_documented_table_is_what_is_counted() -> None:
    assert "\n".join(table()) in DOCS.read_text()


def test_a_block_launches_the_same_with_values(golden: Path) -> None:
    """The count of the meta device against a step that computes, of three requests."""
    engine = load_engine(golden / "llm" / "tiny_a")
    for first in range(3):
        engine.add_request([first, 5], DECODING, return_hidden=True)
    engine.step()
    plan = engine.scheduler.schedule()
    assert isinstance(plan, BlockPlan)
    batch, _, _ = engine.runner.buffer.pack(plan)
    real = count(lambda: engine.runner.generate.step(batch))
    real["linear"] = real.pop("skinny_linear")  # what a few rows take on a CPU
    assert real == visual_block(3, Sizes(kelix=engine.config))
    layers = engine.config.qwen_config.num_layers
    assert real["paged_attention"] == 2 * layers
    assert real["rope_store_kv"] == layers


def test_a_denoise_step_launches_the_same_with_values(golden: Path) -> None:
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    stage = load_engine(golden / "llm" / "tiny_a", **parts).runner.render_stage()
    condition = torch.randn(5, stage.dit.condition_channels)
    states = [stage.start(condition, RenderParams(seed=1)) for _ in range(2)]
    stage.step(states)
    real = count(lambda: stage.step(states))
    counted = denoise_step(2, Sizes(dit=stage.dit.config))
    assert real == counted
    assert real["scaled_dot_product_attention"] == stage.dit.config.depth


def test_the_in_block_loop_of_many_rows() -> None:
    """As the launcher makes them: a set-up and eight per layer and slot, and what a draw needs."""
    text, codes, books = 20000, 100, 3
    head = torch.empty(text + books * codes, 4, device="meta")

    def launches(rows: int) -> int:
        hidden = torch.empty(rows, 4, device="meta")
        none = (None,) * 3
        return in_block_loop((hidden, *none, head, *none, books, text, 0, -1, 8, 2, 2, 8))

    assert launches(1) == launches(8) == 2
    assert launches(9) == books * (5 + 8 * 2) + 3 + 1 + 1


def test_idle_time_is_what_launches_take_beyond_the_work() -> None:
    row = Row("step", 100, 1e-3)
    assert row.idle(5e-6) == 0
    assert abs(row.idle(20e-6) - 1e-3) < 1e-12


def test_replays_leave_a_handful_of_launches(golden: Path) -> None:
    """Recorded work is replayed by nothing here, so what is counted is what stays outside."""
    config = read_config(golden / "dit" / "tiny_release")
    assert isinstance(config, SanaConfig)
    dit = KelixDiT.from_pretrained(golden / "dit" / "tiny_release")
    graphs = DenoiseGraphs(dit, 12, GraphCounts())
    graphs.capture(lambda work: work() or (lambda: None))
    side = config.input_size
    latent = torch.randn(1, config.in_channels, side, side)
    cache = dit.prepare_condition(torch.randn(1, 7, dit.condition_channels), capacity=12)
    denoiser = Denoiser(dit)
    state = denoiser.start(cache, latent, 4)
    eager = count(lambda: denoiser.step([state]))
    denoiser.evaluate = graphs.evaluate
    denoiser.step([state])  # copies the condition
    left = count(lambda: denoiser.step([state]))
    assert set(left) == {"stack", "copy_", "euler_step"}
    assert left.total() == 5 < eager.total()

    engine = load_engine(golden / "llm" / "tiny_a")
    runner = engine.runner
    runner.graphs.capture(lambda work: work() or (lambda: None))
    assert count(lambda: runner.graphs.replay(1)).total() == 0
