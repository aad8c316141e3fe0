"""What cannot be served is refused by name, costs nothing, and leaves the engine working."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kelix_rt import (
    CapacityError,
    ConfigError,
    Engine,
    InputError,
    KelixError,
    Prompt,
    RequestDone,
    RequestFailed,
    SamplingParams,
    SlotSampling,
)
from tests.engine_helpers import (
    GREEDY,
    assert_idle,
    golden_blocks,
    golden_prompt,
    golden_sampling,
    load_engine,
)

IMAGE = 359  # placeholder id of tiny_a
CODE = 640  # first visual code


@pytest.fixture(scope="module")
def path(golden: Path) -> Path:
    return golden / "llm" / "tiny_a"


@pytest.fixture(scope="module")
def engine(path: Path) -> Engine:
    return load_engine(path, num_pages=12, page_size=8, max_model_len=100)


def assert_serves(engine: Engine, path: Path) -> None:
    assert_idle(engine)
    output = engine.generate([golden_prompt(path, "gen0")[0]], golden_sampling(path))[0]
    np.testing.assert_array_equal(output.blocks, golden_blocks(path, "gen0"))
    assert_idle(engine)


def image_prompt(count: int, blocks: int, low: int = CODE) -> Prompt:
    return Prompt([1, 2, *[IMAGE] * count, 3], np.full((blocks, 8), low))


BAD_PROMPTS: dict[str, tuple[object, str]] = {
    "empty": ([], "at least one id"),
    "empty rows": (np.empty((0, 9), dtype=np.int64), "at least one id"),
    "too long": ([1] * 101, "max_model_len is 100"),
    "negative": ([1, -1], r"\[0, 896\)"),
    "beyond": ([1, 896], r"\[0, 896\)"),
    "low precision": (torch.ones(2, dtype=torch.bfloat16), "must be integers"),
    "floats": ([1.5, 2.0], "must be integers"),
    "text": ("hello", "sequence of integers"),
    "ragged": ([[1, 2], [3]], "regular shape|must be integers"),
    "narrow rows": (np.ones((3, 4), dtype=np.int64), r"N\+1=9"),
    "three dimensions": (np.ones((1, 3, 9), dtype=np.int64), r"N\+1=9"),
    "image without images": ([1, IMAGE, 2], "placeholder"),
    "too few images": (image_prompt(3, 2), "placeholder"),
    "too many images": (image_prompt(1, 2), "placeholder"),
    "images without placeholder": (image_prompt(0, 2), "placeholder"),
    "narrow images": (Prompt([1, IMAGE], np.full((1, 7), CODE)), r"N=8"),
    "local codes": (image_prompt(1, 1, low=3), "ids of visual codes"),
    "codes beyond": (image_prompt(1, 1, low=896), r"\[0, 896\)"),
    "mixed rows": (
        np.array([[IMAGE] + [385] * 8, [CODE] * 8 + [385]]),
        "must not mix image placeholders",
    ),
    "images twice": (
        Prompt([1, IMAGE], [[CODE] * 8], torch.zeros(4, 3, 14, 14), torch.tensor([[1, 2, 2]])),
        "not both",
    ),
    "patches without grid": (Prompt([1, IMAGE], None, torch.zeros(4, 3, 14, 14)), "together"),
    "wrong patch count": (
        Prompt([1, IMAGE], None, torch.zeros(5, 3, 14, 14), torch.tensor([[1, 2, 2]])),
        r"pixel_values must be floating with shape \[4, 3, 14, 14\]",
    ),
    "wrong patch size": (
        Prompt([1, IMAGE], None, torch.zeros(4, 3, 28, 28), torch.tensor([[1, 2, 2]])),
        r"shape \[4, 3, 14, 14\] .* got torch.float32 \[4, 3, 28, 28\]",
    ),
    "grey patches": (
        Prompt([1, IMAGE], None, torch.zeros(4, 1, 14, 14), torch.tensor([[1, 2, 2]])),
        r"got torch.float32 \[4, 1, 14, 14\]",
    ),
    "whole numbers as pixels": (
        Prompt([1, IMAGE], None, torch.zeros(4, 3, 14, 14).long(), torch.tensor([[1, 2, 2]])),
        "pixel_values must be floating",
    ),
    "odd grid": (
        Prompt([1, IMAGE], None, torch.zeros(6, 3, 14, 14), torch.tensor([[1, 3, 2]])),
        "even rows and columns",
    ),
    "placeholders of patches": (
        Prompt([1, IMAGE, IMAGE], None, torch.zeros(4, 3, 14, 14), torch.tensor([[1, 2, 2]])),
        "2 image placeholders, but the images have 1 blocks",
    ),
    "NaN pixels": (
        Prompt([1, IMAGE], None, torch.full((4, 3, 14, 14), np.nan), torch.tensor([[1, 2, 2]])),
        "finite",
    ),
    "patches in lists": (Prompt([1, IMAGE], None, [[0.0]], [[1, 2, 2]]), "a tensor or an array"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts_are_refused(engine: Engine, path: Path, case: str) -> None:
    prompt, message = BAD_PROMPTS[case]
    with pytest.raises(InputError, match=message):
        engine.add_request(prompt, GREEDY)
    assert_serves(engine, path)


def test_a_bad_prompt_in_a_list_runs_none_of_them(engine: Engine, path: Path) -> None:
    with pytest.raises(InputError):
        engine.generate([[1, 2], [1, 5000], [3]], GREEDY)
    assert_serves(engine, path)


def test_bad_input_of_a_stream_is_raised_at_once(engine: Engine, path: Path) -> None:
    with pytest.raises(InputError):
        next(engine.stream([], GREEDY))
    assert_serves(engine, path)


def test_more_blocks_than_positions_are_refused(engine: Engine, path: Path) -> None:
    with pytest.raises(InputError, match="max_blocks can be 91 at most"):
        engine.add_request([1] * 10, SamplingParams(max_blocks=92))
    assert_serves(engine, path)


def test_more_blocks_than_memory_are_refused(path: Path) -> None:
    engine = load_engine(path, num_pages=8, page_size=8)
    with pytest.raises(CapacityError, match="need 9 KV pages of 8, but there are 8"):
        engine.add_request([1] * 10, SamplingParams(max_blocks=56))
    with pytest.raises(CapacityError, match="KV pages"):
        engine.add_request([1] * 65)
    assert_serves(engine, path)


BAD_SAMPLING: tuple[Callable[[], object], ...] = (
    lambda: SamplingParams(temperature=-0.1),
    lambda: SamplingParams(temperature=float("nan")),
    lambda: SamplingParams(temperature=float("inf")),
    lambda: SamplingParams(temperature="hot"),  # type: ignore[arg-type]
    lambda: SamplingParams(temperature=None),  # type: ignore[arg-type]
    lambda: SamplingParams(top_k=-1),
    lambda: SamplingParams(top_k=1.5),  # type: ignore[arg-type]
    lambda: SamplingParams(top_p=0.0),
    lambda: SamplingParams(top_p=1.1),
    lambda: SamplingParams(min_p=-0.1),
    lambda: SamplingParams(min_p=1.1),
    lambda: SamplingParams(max_blocks=0),
    lambda: SamplingParams(max_blocks=True),
    lambda: SamplingParams(seed=1 << 63),
    lambda: SamplingParams(seed=0.5),  # type: ignore[arg-type]
    lambda: SamplingParams(stop_ids=1),  # type: ignore[arg-type]
    lambda: SamplingParams(stop_ids=(-1,)),
    lambda: SamplingParams(rule="other"),  # type: ignore[arg-type]
    lambda: SamplingParams(visual=0.5),  # type: ignore[arg-type]
    lambda: SlotSampling(top_p=2.0),
)


@pytest.mark.parametrize("make", BAD_SAMPLING)
def test_impossible_sampling_values_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="must"):
        make()


def test_overrides_for_another_number_of_slots_are_refused(engine: Engine, path: Path) -> None:
    with pytest.raises(InputError, match="one entry for each of the 7 slots"):
        engine.add_request([1, 2], SamplingParams(visual=(SlotSampling(), None)))
    assert_serves(engine, path)


@pytest.mark.parametrize("name", ["sampling", "render"])
def test_parameters_of_another_type_are_refused(engine: Engine, path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be"):
        engine.add_request([1, 2], **{name: {"steps": 2}})  # type: ignore[arg-type]
    assert_serves(engine, path)


def test_patches_may_be_arrays(engine: Engine, path: Path) -> None:
    pixels, grid = np.zeros((4, 3, 14, 14), dtype=np.float32), np.array([[1, 2, 2]])
    arrays = Prompt([1, IMAGE], None, pixels, grid)  # type: ignore[arg-type]
    tensors = Prompt([1, IMAGE], None, torch.from_numpy(pixels), torch.from_numpy(grid))
    first, second = engine.generate([arrays, tensors], GREEDY)
    np.testing.assert_array_equal(first.blocks, second.blocks)
    assert_serves(engine, path)


def test_buffers_of_patches_may_be_used_again_at_once(path: Path) -> None:
    engine = load_engine(path, image_cache_bytes=0)
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, 4, 3, 14, 14)).astype(np.float32)
    grid = np.array([[1, 2, 2]])
    buffer = first.copy()
    number = engine.add_request(Prompt([1, IMAGE], None, buffer, grid), GREEDY)  # type: ignore[arg-type]
    buffer[:] = second
    (event,) = engine.run_to_end([number])
    want = Prompt([1, IMAGE], None, torch.from_numpy(first), torch.from_numpy(grid))
    np.testing.assert_array_equal(event.output.blocks, engine.generate([want], GREEDY)[0].blocks)


def test_unknown_options_are_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="max_btach"):
        load_engine(path, max_btach=4)
    with pytest.raises(ConfigError, match="dtype"):
        load_engine(path, dtype="int8")


def poison(engine: Engine, monkeypatch: pytest.MonkeyPatch, bad_seed: int) -> None:
    """Makes the hidden state of one request NaN, like overflowing activations do."""
    decode = engine.runner.model.decode_blocks

    def poisoned(hidden: torch.Tensor, params: object, seeds: torch.Tensor, *args: object,
                 **kwargs: object) -> object:  # fmt: skip
        hidden = torch.where((seeds == bad_seed).unsqueeze(1), torch.nan, hidden)
        return decode(hidden, params, seeds, *args, **kwargs)

    monkeypatch.setattr(engine.runner.model, "decode_blocks", poisoned)


def test_nan_logits_fail_their_request_alone(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(engine, monkeypatch, bad_seed=13)
    prompt = golden_prompt(path, "gen0")[0]
    good = engine.add_request(prompt, golden_sampling(path))
    bad = engine.add_request([1, 2, 3], SamplingParams(seed=13))
    kept, failed = engine.run_to_end([good, bad])
    assert isinstance(failed, RequestFailed)
    assert isinstance(failed.error, KelixError)
    assert "logits of block 0 are not finite" in str(failed.error)
    assert isinstance(kept, RequestDone)
    np.testing.assert_array_equal(kept.output.blocks, golden_blocks(path, "gen0"))
    with pytest.raises(KelixError, match="not finite"):
        engine.generate_blocks([1, 2, 3], sampling=SamplingParams(seed=13))
    outputs = engine.generate([[1, 2, 3]], SamplingParams(seed=13))
    assert outputs[0].finish_reason == "error"
    assert isinstance(list(engine.stream([1, 2], SamplingParams(seed=13)))[-1], RequestFailed)
    monkeypatch.undo()
    assert_serves(engine, path)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_exception_inside_a_step_leaks_nothing(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    forward, calls = engine.runner.generate.step, []

    def failing(batch: object) -> object:
        calls.append(batch)
        if len(calls) > after:
            raise RuntimeError("the device fell over")
        return forward(batch)

    monkeypatch.setattr(engine.runner.generate, "step", failing)
    outputs = engine.generate([[1, 2, 3], [4, 5]], SamplingParams(max_blocks=9, ignore_eos=True))
    assert [output.finish_reason for output in outputs] == ["error", "error"]
    assert "fell over" in str(outputs[0].error)
    monkeypatch.undo()
    assert_serves(engine, path)


def test_an_interrupt_inside_a_step_leaks_nothing(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(batch: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner.generate, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3], [4, 5]], GREEDY)
    monkeypatch.undo()
    assert_serves(engine, path)


def test_hidden_states_that_do_not_fit_fail_their_request_alone(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(engine.runner, "hidden", full)
    greedy = SamplingParams(temperature=0.0, max_blocks=3, ignore_eos=True)
    wanted, aborted = (engine.add_request([1, 2], greedy, return_hidden=True) for _ in range(2))
    other = engine.add_request([1, 2], greedy)
    engine.step()
    assert engine.abort(aborted) is None
    ended = {}
    while engine.has_work:
        ended |= {event.request_id: event for event in engine.step()}
    for number in (wanted, aborted):
        assert isinstance(ended[number], RequestFailed)
        assert "no more memory" in str(ended[number].error)
    assert isinstance(ended[other], RequestDone) and len(ended[other].output.blocks) == 3
    monkeypatch.undo()
    assert_serves(engine, path)
