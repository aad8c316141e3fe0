"""Pictures are read and made beside the steps; their failures are those of their request."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from threading import Event, current_thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kelix_rt import (
    BlockEvent,
    Engine,
    ImageDone,
    InputError,
    RenderParams,
    RequestDone,
    RequestFailed,
    SamplingParams,
)
from kelix_rt.assets import BUNDLED
from tests.engine_helpers import assert_idle, fixtures, load_engine
from tests.queues import Load

SAMPLING = SamplingParams(temperature=0.0, max_blocks=8)
BROKEN = [{"role": "user", "content": [{"type": "image", "image": b"no picture"}]}]


def asking(size: int = 56) -> list[dict[str, Any]]:
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": "?"}]
    return [{"role": "user", "content": content}]


@pytest.fixture(params=["at once", "on a thread"])
def engine(request: pytest.FixtureRequest, load: Load) -> Engine:
    if request.param == "at once":
        return load_engine(BUNDLED, dtype="float32")
    return load(BUNDLED, dtype="float32")[0]


class Held:
    """Holds a function up until it is let go, and notes which thread calls it."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.begun, self.go = Event(), Event()
        self.threads: list[str] = []

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.threads.append(current_thread().name)
        self.begun.set()
        assert self.go.wait(60)
        return self._function(*args, **options)


@pytest.fixture
def held(load: Load, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, Held]]:
    """An engine whose pictures are read only when the test says so."""
    engine, _ = load(BUNDLED, dtype="float32")
    processor = engine.processor
    stopper = Held(processor.encode)
    monkeypatch.setattr(processor, "encode", stopper)
    yield engine, stopper
    stopper.go.set()


def test_messages_get_the_answer_of_their_prompt(engine: Engine) -> None:
    expected = engine.generate([engine.chat_prompt(asking(n)) for n in (56, 84)], SAMPLING)
    numbers = [engine.add_chat(asking(n), SAMPLING) for n in (56, 84)]
    assert numbers == sorted(numbers)
    for event, known in zip(engine.run_to_end(numbers), expected, strict=True):
        np.testing.assert_array_equal(event.output.blocks, known.blocks)
        assert event.output.timings.queued > 0
    assert engine.chat(asking(84), SAMPLING).text == expected[1].text
    assert engine.stats().image_hits >= 3, "the codes are found by what the job computed"
    assert_idle(engine)


def test_options_of_the_template_reach_it(engine: Engine) -> None:
    options = {"chat_template": "{{ messages[0].content }}{{ tail }}", "tail": " you"}
    prompt = engine.chat_prompt("Hello", template_options=options)
    assert prompt.ids == engine.text.encode("Hello you")
    expected = engine.generate([prompt], SAMPLING)[0]
    assert engine.chat("Hello", SAMPLING, template_options=options).text == expected.text
    for wrong in ([1], {1: 2}):
        with pytest.raises(InputError, match="template_options must be a mapping of names"):
            engine.chat_prompt("Hello", template_options=wrong)
    with pytest.raises(InputError, match=r"\['tokenize'\] are set by the engine itself"):
        engine.chat_prompt("Hello", template_options={"tokenize": True})


def test_messages_may_be_used_again_at_once(held: tuple[Engine, Held]) -> None:
    engine, stopper = held
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    number = engine.add_chat(messages, SAMPLING)
    messages[0]["content"][0]["text"] = "another question"  # type: ignore[index]
    messages.append({"role": "assistant", "content": "b"})
    stopper.go.set()
    (event,) = engine.run_to_end([number])
    assert event.output.usage.prompt_blocks == len(engine.chat_prompt("a").ids)
    assert_idle(engine)


def test_a_plain_question_is_a_message(engine: Engine) -> None:
    asked = engine.chat([{"role": "user", "content": "what?"}], SAMPLING)
    np.testing.assert_array_equal(engine.chat("what?", SAMPLING).blocks, asked.blocks)
    assert_idle(engine)


def test_a_bad_picture_fails_its_request_alone(engine: Engine) -> None:
    numbers = [engine.add_chat(m, SAMPLING) for m in (asking(), BROKEN, asking())]
    fine, failed, also = engine.run_to_end(numbers)
    assert isinstance(failed, RequestFailed)
    assert isinstance(failed.error, InputError)
    assert isinstance(fine, RequestDone) and isinstance(also, RequestDone)
    np.testing.assert_array_equal(fine.output.blocks, also.output.blocks)
    with pytest.raises(InputError):
        engine.chat(BROKEN)
    with pytest.raises(InputError):
        next(engine.stream(BROKEN))
    with pytest.raises(InputError, match="sampling"):
        engine.add_chat(asking(), 3)
    engine.add_chat(BROKEN)
    (event,) = engine.step()  # as the only thing to do
    assert isinstance(event, RequestFailed)
    assert_idle(engine)


def test_local_files_are_read_only_where_they_may_be(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (56, 56)).save(picture)
    part = {"type": "image_url", "image_url": {"url": str(picture)}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]
    assert load_engine(BUNDLED).chat(messages, SAMPLING).finish_reason
    strict = load_engine(BUNDLED, allow_files=False)
    with pytest.raises(InputError, match="reading files is switched off"):
        strict.chat(messages, SAMPLING)


def test_a_request_too_large_is_refused_when_its_prompt_is_there(engine: Engine) -> None:
    number = engine.add_chat(asking(), SamplingParams(max_blocks=10**6))
    (event,) = engine.run_to_end([number])
    assert isinstance(event, RequestFailed)
    assert isinstance(event.error, InputError)
    assert_idle(engine)


def test_others_go_on_while_a_picture_is_read(held: tuple[Engine, Held]) -> None:
    engine, stopper = held
    asked = engine.add_chat(asking(), SAMPLING)
    other = engine.add_request([5, 6], SamplingParams(0.0, max_blocks=6, ignore_eos=True))
    assert stopper.begun.wait(60)
    events = [event for _ in range(6) for event in engine.step()]
    assert sum(isinstance(event, BlockEvent) for event in events) == 6
    assert {event.request_id for event in events} == {other}
    assert engine.has_work
    stopper.go.set()
    (event,) = engine.run_to_end([asked])
    assert isinstance(event, RequestDone)
    assert stopper.threads[0].startswith("kelix-jobs")
    assert_idle(engine)


def test_an_abort_while_a_picture_is_read(held: tuple[Engine, Held]) -> None:
    engine, stopper = held
    begun, waiting = (engine.add_chat(asking(), SAMPLING) for _ in range(2))
    assert stopper.begun.wait(60)
    for number in (begun, waiting):
        output = engine.abort(number)
        assert output.finish_reason == "abort"
        assert output.blocks.shape == (0, engine.config.num_codes + 1)
        assert engine.abort(number) is None
    assert [type(event) for event in engine.step()] == [RequestDone] * 2
    assert_idle(engine)
    stopper.go.set()
    assert engine.chat(asking(), SAMPLING).blocks.shape[0] > 0
    assert len(stopper.threads) == 2, "the one that had not begun never did"
    assert_idle(engine)


def test_leaving_a_stream_while_its_picture_is_read(
    held: tuple[Engine, Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, stopper = held

    def interrupted() -> None:
        assert stopper.begun.wait(60)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_step", interrupted)
        next(engine.stream(asking(), SAMPLING))
    assert not stopper.go.is_set()
    assert_idle(engine)
    stopper.go.set()
    assert engine.chat(asking(), SAMPLING).blocks.shape[0] > 0
    assert_idle(engine)


@pytest.fixture
def drawing(golden: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine whose pixels become a picture only when the test says so."""
    path = golden / "llm" / "tiny_a"
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    engine, _ = load(path, **parts)
    prompt, render = fixtures(path)["cond/prompt_ids2d"], RenderParams(steps=1, seed=3)
    expected = load_engine(path, **parts).generate_image(prompt, render=render)
    from kelix_rt.stages.render import to_picture

    stopper = Held(to_picture)
    monkeypatch.setattr("kelix_rt.runner.to_picture", stopper)
    yield engine, stopper, engine.add_request(prompt, render=render), expected
    stopper.go.set()


def run_until(engine: Engine, event: Event) -> list[Any]:
    events = []
    while not event.is_set():
        events += engine.step()
        event.wait(0.01) if engine.scheduler.has_work is False else None
    return events


def test_others_go_on_while_a_picture_is_made(drawing: Any) -> None:
    engine, stopper, number, expected = drawing
    other = engine.add_request([5, 6], SamplingParams(0.0, max_blocks=200, ignore_eos=True))
    run_until(engine, stopper.begun)
    events = [event for _ in range(5) for event in engine.step()]
    assert [event.request_id for event in events if isinstance(event, BlockEvent)] == [other] * 5
    assert not any(isinstance(event, ImageDone) for event in events)
    stopper.go.set()
    (event,) = engine.run_to_end([number])
    np.testing.assert_array_equal(np.asarray(event.output.image.image), np.asarray(expected.image))
    np.testing.assert_array_equal(event.output.blocks, expected.blocks)
    assert stopper.threads[0].startswith("kelix-jobs")
    engine.abort(other)
    engine.step()
    assert_idle(engine)


def test_an_abort_while_a_picture_is_made(drawing: Any) -> None:
    engine, stopper, number, expected = drawing
    engine.add_request([5, 6], SamplingParams(0.0, max_blocks=200, ignore_eos=True))
    run_until(engine, stopper.begun)
    output = engine.abort(number)
    assert output.finish_reason == "abort"
    assert output.image is None
    np.testing.assert_array_equal(output.blocks, expected.blocks)
    stopper.go.set()
    engine.abort(number + 1)
    engine.step()
    assert_idle(engine)


def assert_fails_alone(engine: Engine, number: int, reason: str) -> None:
    other = engine.add_request([5, 6], SAMPLING)
    failed, fine = engine.run_to_end([number, other])
    assert isinstance(failed, RequestFailed)
    assert reason in str(failed.error)
    assert isinstance(fine, RequestDone)
    assert_idle(engine)


def test_a_picture_that_fails_fails_its_drawing_alone(
    drawing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _, number, _ = drawing

    def broken(*painted: object) -> None:
        raise MemoryError("no room for a picture")

    monkeypatch.setattr("kelix_rt.runner.to_picture", broken)
    assert_fails_alone(engine, number, "no room")


def test_what_is_painted_must_be_numbers(drawing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DiT that overflows fails the drawing: NaN would be an arbitrary picture."""
    engine, stopper, number, _ = drawing
    stopper.go.set()

    def overflowing(latent: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.full_like(latent, math.inf)

    monkeypatch.setattr(engine.runner.render.denoiser, "evaluate", overflowing)
    assert_fails_alone(engine, number, "the painted pixels are not finite")
