"""Requests through the engine: prompt -> picture, picture -> text, many at once, from a cold start.

The mid-size model of checkpoints.py. A picture is 324 blocks, 20 denoise steps and 512 x 512
pixels; for throughput, where many are drawn, 64 blocks and 4 steps (the same 16 blocks a step).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.checkpoints import MID_SIZE, MID_SIZE_DIT, dit_tensors, prefer_text
from benchmarks.compare import Comparison, Machine
from benchmarks.reference_dit import ReferenceSampler
from benchmarks.reference_llm import ReferenceLM
from benchmarks.reference_picture import ReferencePicture
from kelix_rt import Engine, Prompt, RenderParams, SamplingParams
from kelix_rt.testing import randn
from tests.models.plain_dit import PlainDiT

QWEN = MID_SIZE["qwen_config"]
BLOCKS, STEPS = 324, 20
SHORT_BLOCKS, SHORT_STEPS = 64, 4
GRID = (1, 16, 16)  # patches of a picture that is read: 64 blocks
ANSWER = 32
AIM = 2.5  # what eight requests at once should gain over one at a time


def concurrencies(machine: Machine) -> tuple[int, ...]:
    """Requests at once."""
    return (1, 8, 32, 64) if machine.on_gpu else (1, 8, 32)


def greedy(blocks: int) -> SamplingParams:
    """Exactly so many blocks, the most likely ones."""
    return SamplingParams(temperature=0.0, max_blocks=blocks, ignore_eos=True)


def text_ids(seed: int, count: int) -> list[int]:
    """Text ids below the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 32000, (count,), generator=generator).tolist()


def draw_many(engine: Engine, count: int) -> None:
    """`count` different pictures at once."""
    render = RenderParams(steps=SHORT_STEPS, seed=0)
    numbers = [
        engine.add_request(text_ids(i, 16), greedy(SHORT_BLOCKS), render=render)
        for i in range(count)
    ]
    for event in engine.run_to_end(numbers):
        assert len(event.output.blocks) == SHORT_BLOCKS and event.output.image is not None


def reading_prompt(seed: int) -> Prompt:
    """A question about a picture of noise."""
    places = [QWEN["image_token_id"]] * (GRID[1] * GRID[2] // 4)
    picture = [QWEN["vision_start_token_id"], *places, QWEN["vision_end_token_id"]]
    return Prompt(
        [*text_ids(seed, 8), *picture, *text_ids(seed + 1, 8)],
        pixel_values=randn(GRID[1] * GRID[2], 3, 14, 14, seed=seed),
        image_grid_thw=torch.tensor([GRID]),
    )


def answer_many(engine: Engine, count: int) -> None:
    """Answers about `count` different pictures; nothing of them is in the prefix cache, and codes
    must not be kept either."""
    engine.scheduler.pool.reset_cache()
    for output in engine.generate([reading_prompt(i) for i in range(count)], greedy(ANSWER)):
        assert len(output.blocks) == ANSWER
        assert bool((output.blocks[:, 0] < QWEN["vocab_size"]).all()), "answers must be text"


def test_picture_against_the_release(compare: Comparison, machine: Machine, mid_size: Path) -> None:
    """In float32 on the CPU: the transcription makes no use of a GPU."""
    engine = Engine.from_pretrained(mid_size, device="cpu")
    tensors = load_file(mid_size / "model.safetensors")
    assert engine.runner.render is not None
    released = ReferencePicture(
        ReferenceLM(MID_SIZE, tensors),
        ReferenceSampler(PlainDiT(MID_SIZE_DIT, dit_tensors())),
        engine.runner.render.vae.module,
    )
    prompt = [*text_ids(0, 31), QWEN["vision_start_token_id"]]
    latent = randn(1, 32, 16, 16, seed=1)
    render = RenderParams(steps=STEPS, latent=latent)

    image = compare.benchmark.pedantic(
        lambda: engine.generate_image(prompt, sampling=greedy(BLOCKS), render=render), rounds=2
    )
    begin = time.perf_counter()
    with torch.inference_mode():
        blocks, pixels = released.draw(prompt, BLOCKS, STEPS, latent)
    theirs = time.perf_counter() - begin

    assert image.blocks.tolist() == blocks.tolist(), "the greedy blocks differ"
    assert image.condition_length == BLOCKS
    difference = np.abs(np.asarray(image.image).astype(int) - pixels)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.995
    mine = compare.benchmark.stats.stats.mean  # theirs is one run
    compare.record(
        {
            "seconds": round(mine, 2),
            "blocks_s": round(image.timings.blocks, 2),
            "render_s": round(image.timings.render, 2),
            "released_s": round(theirs, 1),
            "ratio": round(theirs / mine, 1),
        }
    )
    assert theirs / mine >= 10


def throughput(
    compare: Comparison, machine: Machine, engine: Engine, run: Callable[[Engine, int], None]
) -> dict[int, float]:
    """Requests per second by concurrency; runs of all of them take turns."""
    counts = concurrencies(machine)
    run(engine, 1)
    best = machine.best_seconds({str(n): lambda n=n: run(engine, n) for n in counts})
    compare.benchmark.pedantic(lambda: run(engine, 8), rounds=1)
    rates = {n: n / best[str(n)] for n in counts}
    facts: dict[str, object] = {f"per_second_{n}": round(rate, 3) for n, rate in rates.items()}
    facts["latency_ms"] = round(best["1"] * 1e3, 1)
    facts["gain_of_8"] = round(rates[8] / rates[1], 2)
    compare.record(facts)
    return rates


def loaded(mid_size: Path, machine: Machine, **options: Any) -> Engine:
    """An engine with room for the largest concurrency."""
    batch = concurrencies(machine)[-1]
    return Engine.from_pretrained(
        mid_size, device=machine.device, max_batch=batch, max_model_len=512, **options
    )


def test_throughput_of_pictures(compare: Comparison, machine: Machine, mid_size: Path) -> None:
    rates = throughput(compare, machine, loaded(mid_size, machine), draw_many)
    gain = rates[8] / rates[1]
    if gain < AIM and not machine.on_gpu:
        pytest.xfail(f"{gain:.2f}x, the aim is {AIM}x: on a CPU denoising is bound by arithmetic")
    assert gain >= AIM


def test_throughput_of_answers(compare: Comparison, machine: Machine, mid_size: Path) -> None:
    engine = loaded(mid_size, machine, image_cache_bytes=0)  # every picture is encoded
    prefer_text(engine.runner.model.head)
    rates = throughput(compare, machine, engine, answer_many)
    assert rates[8] >= AIM * rates[1]


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_overhead_of_the_engine(
    compare: Comparison,
    machine: Machine,
    mid_size: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:
    """A whole step of the loop against the model's call inside it, in the same steps.

    On a GPU without graphs, whose replay is no call, and without overlap, which hides the loop.
    """
    engine = loaded(mid_size, machine, cuda_graphs=False, overlap=False)
    stage = engine.runner.generate
    bare: list[float] = []
    step = stage.step

    def timed(*arguments: object) -> object:
        begin = time.perf_counter()
        result = step(*arguments)
        if machine.on_gpu:
            torch.cuda.synchronize()
        bare.append(time.perf_counter() - begin)
        return result

    for i in range(batch):
        engine.add_request(text_ids(i, 16), greedy(BLOCKS))
    engine.step()
    monkeypatch.setattr(stage, "step", timed)
    events = compare.benchmark.pedantic(engine.step, rounds=32, warmup_rounds=2)
    assert len(events) == batch, "every request must have got a block"
    whole = float(compare.benchmark.stats.stats.median)
    model = float(np.median(bare[2:]))
    share = 1 - model / whole
    compare.record(
        {
            "step_ms": round(whole * 1e3, 2),
            "model_ms": round(model * 1e3, 2),
            "overhead_percent": round(100 * share, 2),
        }
    )
    # On a GPU a call of this model is short and bound by its launches: the share is only recorded.
    if not machine.on_gpu:
        assert share < 0.10


def test_start_up(compare: Comparison, machine: Machine, mid_size: Path) -> None:
    """A new process: import, load, and one picture of 8 blocks and one step."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "benchmarks.start_up", str(mid_size), machine.device, threads]
    root = Path(__file__).resolve().parent.parent
    facts: dict[str, float] = {}

    def start() -> None:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        facts.update(json.loads(done.stdout.splitlines()[-1]))

    compare.benchmark.pedantic(start, rounds=2)
    stored = sum(path.stat().st_size for path in mid_size.rglob("*.safetensors"))
    compare.record({**facts, "stored_mib": round(stored / 2**20)})
    assert facts["peak_mib"] > stored / 2**20 / 2, "less than the weights cannot be right"
