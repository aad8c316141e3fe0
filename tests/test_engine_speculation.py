"""Drafts change how many steps a request takes and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kelix_rt import Engine, Prompt, RenderParams, SamplingParams
from kelix_rt.assets import BUNDLED
from kelix_rt.sequence import Sequence
from kelix_rt.speculation import MarkerDrafter
from tests.engine_helpers import (
    assert_idle,
    fixtures,
    golden_blocks,
    golden_prompt,
    golden_runs,
    golden_sampling,
    load_engine,
)

VISION_END = 357
OPTIONS = (
    {},
    {"page_size": 4, "max_step_tokens": 9},
    {"page_size": 4, "num_pages": 40, "max_step_tokens": 33, "prefix_cache": False},
)
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, max_blocks=30),
    "sampled": SamplingParams(1.0, 0, 1.0, seed=5, max_blocks=30, ignore_eos=True),
    "reference": SamplingParams(0.9, 20, 0.9, seed=6, max_blocks=30, rule="reference"),
}


class Oracle:
    """Drafts the blocks a request is known to get; every fourth of them is spoilt."""

    def __init__(self, known: dict[int, np.ndarray], length: int = 5) -> None:
        self.known = known
        self.length = length

    def propose(self, sequence: Sequence) -> np.ndarray | None:
        index = sequence.generated
        drafts = self.known[sequence.request_id][index : index + self.length].copy()
        for row in range(len(drafts)):
            if (index + row) % 4 == 3:
                drafts[row, 0] ^= 1
        return drafts if len(drafts) else None


@pytest.fixture(params=["tiny_a", "tiny_b"])
def model(request: pytest.FixtureRequest, golden: Path) -> Path:
    return golden / "llm" / request.param


def run(engine: Engine, prompts: list[Prompt], sampling: SamplingParams) -> list[Any]:
    numbers = [engine.add_request(prompt, sampling, return_hidden=True) for prompt in prompts]
    return [event.output for event in engine.run_to_end(numbers)]


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_drafts_change_no_block_and_no_hidden_state(model: Path, options: dict, kind: str) -> None:
    prompts = [Prompt(*golden_prompt(model, name)) for name in golden_runs(model)]
    sampling = SAMPLINGS[kind]
    plain = load_engine(model, **options, speculate_markers=False)
    expected = run(plain, prompts, sampling)
    engine = load_engine(model, **options)
    for first in (0, len(prompts)):  # the second time on the pages that the first time left
        engine.scheduler.drafter = Oracle({first + i: o.blocks for i, o in enumerate(expected)})
        for output, known in zip(run(engine, prompts, sampling), expected, strict=True):
            np.testing.assert_array_equal(output.blocks, known.blocks)
            assert output.finish_reason == known.finish_reason
            torch.testing.assert_close(output.hidden, known.hidden, atol=3e-5, rtol=0)
        assert_idle(engine)
    counts, before = engine.stats(), plain.stats()
    assert counts.blocks == 2 * before.blocks
    assert counts.drafts_accepted > 0
    assert counts.drafts_rejected > 0
    if "num_pages" not in options:  # preempted requests compute more than once
        assert counts.block_steps < 2 * before.block_steps


def test_a_rejected_draft_leaves_nothing_in_the_prefix_cache(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path, page_size=4)
    expected = golden_blocks(path, "gen0")
    wrong = expected.copy()
    wrong[:, 0] ^= 1
    engine.scheduler.drafter = Oracle({0: wrong})
    prompt = Prompt(*golden_prompt(path, "gen0"))
    first = engine.generate([prompt], golden_sampling(path))[0]
    np.testing.assert_array_equal(first.blocks, expected)
    engine.scheduler.drafter = None
    rows = engine.runner.model.expand(torch.as_tensor(prompt.ids)).numpy()
    whole = np.concatenate((rows, expected))
    pages, matched = engine.scheduler.pool.match_prefix(whole)
    assert matched >= len(whole) - 5  # what was generated can be gone on with ...
    again = engine.generate_blocks(whole[:-1], sampling=SamplingParams(0.0, max_blocks=1))
    np.testing.assert_array_equal(again.ids[-1], expected[-1])  # ... and gives the same
    spoilt = np.concatenate((rows, wrong))
    assert engine.scheduler.pool.match_prefix(spoilt)[1] <= len(rows)
    assert len(pages)


@pytest.mark.parametrize("accepted", [0, 2])
def test_the_steps_after_a_rejected_draft_find_their_pages(golden: Path, accepted: int) -> None:
    """The draft reaches into pages that the steps after it do not need yet."""
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path, page_size=4)
    expected = golden_blocks(path, "gen0")
    wrong = expected.copy()
    wrong[accepted + 3 :, 0] ^= 1

    class Once:
        def propose(self, sequence: Sequence) -> np.ndarray | None:
            return wrong[3:12] if sequence.generated == 3 else None

    engine.scheduler.drafter = Once()
    prompt = Prompt(*golden_prompt(path, "gen0"))
    output = engine.generate([prompt], golden_sampling(path))[0]
    np.testing.assert_array_equal(output.blocks, expected)
    counts = engine.stats()
    assert (counts.drafts_accepted, counts.drafts_rejected) == (accepted, 9 - accepted)
    assert_idle(engine)


@pytest.mark.parametrize("max_blocks", [1, 2, 3, 6, 7])
def test_the_limit_holds_inside_a_draft(golden: Path, max_blocks: int) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path, page_size=4)
    expected = golden_blocks(path, "gen0")
    engine.scheduler.drafter = Oracle({0: expected}, length=8)
    sampling = SamplingParams(temperature=0.0, max_blocks=max_blocks)
    output = engine.generate([Prompt(*golden_prompt(path, "gen0"))], sampling)[0]
    np.testing.assert_array_equal(output.blocks, expected[:max_blocks])
    assert output.finish_reason == "length"
    assert_idle(engine)


@pytest.mark.parametrize("place", [1, 2, 3, 4, 5])
def test_a_stop_id_inside_a_draft_ends_the_request(golden: Path, place: int) -> None:
    path = golden / "llm" / "tiny_a"
    expected = golden_blocks(path, "gen0")
    stop = int(expected[place, 0])
    count = 1 + next(i for i in range(1, len(expected)) if expected[i, 0] == stop)
    engine = load_engine(path, page_size=4)
    engine.scheduler.drafter = Oracle({0: expected}, length=8)
    sampling = SamplingParams(temperature=0.0, stop_ids=(stop,), max_blocks=49)
    output = engine.generate([Prompt(*golden_prompt(path, "gen0"))], sampling)[0]
    np.testing.assert_array_equal(output.blocks, expected[:count])
    assert output.finish_reason == "stop"
    assert_idle(engine)


def test_an_image_ends_inside_a_draft(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    prompt, render = fixtures(path)["cond/prompt_ids2d"], RenderParams(steps=1, seed=3)
    sampling = SamplingParams(temperature=0.0, max_blocks=60)
    known = load_engine(path, **parts).generate_image(prompt, sampling=sampling, render=render)
    assert known.blocks[-1, 0] == VISION_END
    engine = load_engine(path, **parts, page_size=4)
    longer = np.concatenate((known.blocks, known.blocks))  # guesses what comes after it, too
    engine.scheduler.drafter = Oracle({0: longer}, length=8)
    output = engine.generate_image(prompt, sampling=sampling, render=render)
    np.testing.assert_array_equal(output.blocks, known.blocks)
    assert output.condition_length == known.condition_length
    difference = np.asarray(output.image, dtype=int) - np.asarray(known.image, dtype=int)
    assert np.abs(difference).max() <= 1
    assert engine.stats().drafts_accepted > 0
    assert_idle(engine)


@pytest.mark.parametrize("steps", range(1, 9, 2))
def test_abort_between_drafts_frees_everything(golden: Path, steps: int) -> None:
    path = golden / "llm" / "tiny_a"
    engine = load_engine(path, page_size=4)
    expected = golden_blocks(path, "gen0")
    engine.scheduler.drafter = Oracle({0: expected, 1: expected})
    for _ in range(2):
        engine.add_request(golden_prompt(path, "gen0")[0], golden_sampling(path))
    for _ in range(steps):
        engine.step()
    output = engine.abort(1)
    np.testing.assert_array_equal(output.blocks, expected[: len(output.blocks)])
    (event,) = engine.run_to_end([0])
    np.testing.assert_array_equal(event.output.blocks, expected)
    engine.step()
    assert_idle(engine)


def test_the_switch_and_what_a_drafter_needs(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    assert isinstance(load_engine(path).scheduler.drafter, MarkerDrafter)
    assert load_engine(path, speculate_markers=False).scheduler.drafter is None
    assert load_engine(path, verify_head=True).scheduler.drafter is None
    no_tokenizer = golden / "llm" / "tiny_b"
    assert load_engine(no_tokenizer).scheduler.drafter is None


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine.from_pretrained(BUNDLED, device="cpu", dtype="float32")


def drawn(engine: Engine, sampling: SamplingParams) -> tuple[list[np.ndarray], int]:
    """Blocks of four drawings and two answers that share their steps, and the steps they took."""
    before = engine.stats().block_steps
    numbers = []
    for index, text in enumerate(("a red circle.", "two blue squares.", "a green star.", "a cat.")):
        seeded = replace(sampling, seed=40 + index)
        numbers.append(engine.add_request(engine.drawing_prompt(f"draw {text}"), seeded))
        if index % 2:
            question = engine.chat_prompt([{"role": "user", "content": "what is this?"}])
            numbers.append(engine.add_request(question, seeded))
    blocks = [event.output.blocks for event in engine.run_to_end(numbers)]
    assert_idle(engine)
    return blocks, engine.stats().block_steps - before


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_markers_of_drawings_are_guessed(tiny: Engine, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, top_k=0, top_p=1.0, max_blocks=110)
    drafter, start = tiny.scheduler.drafter, tiny.stats()
    blocks, steps = drawn(tiny, sampling)
    counts = tiny.stats()
    tiny.scheduler.drafter = None
    try:
        expected, plain_steps = drawn(tiny, sampling)
    finally:
        tiny.scheduler.drafter = drafter
    for got, known in zip(blocks, expected, strict=True):
        np.testing.assert_array_equal(got, known)
    assert tiny.stats().drafts_accepted == counts.drafts_accepted, "no drafts without a drafter"
    accepted = counts.drafts_accepted - start.drafts_accepted
    # Six of the eight markers of a picture, three blocks each, could be guessed.
    assert accepted >= 0.8 * 4 * 6 * 3
    if temperature == 0.0:
        # After the last row comes the end of the image instead of a marker.
        assert counts.drafts_rejected - start.drafts_rejected <= 4 * 3
        assert steps <= plain_steps - 6 * 3
