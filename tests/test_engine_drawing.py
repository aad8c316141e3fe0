"""Drawing: prompt -> codes -> condition -> image, next to requests of other routes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kelix_rt import (
    BlockEvent,
    ConfigError,
    Engine,
    ImageDone,
    ImageProgress,
    InputError,
    Prompt,
    RenderParams,
    RequestDone,
    RequestFailed,
    SamplingParams,
)
from tests.engine_helpers import (
    assert_idle,
    fixtures,
    golden_blocks,
    golden_prompt,
    golden_sampling,
    load_engine,
    metadata,
)

VISION_START, VISION_END, PLACE = 356, 357, 359
QUICK = RenderParams(steps=2, seed=3)


@pytest.fixture(scope="module")
def path(golden: Path) -> Path:
    return golden / "llm" / "tiny_a"


def load_drawing(golden: Path, **options: object) -> Engine:
    parts = {"dit": golden / "e2e_dit" / "dit", "vae": golden / "e2e_dit" / "vae"}
    return load_engine(golden / "llm" / "tiny_a", **parts, **options)


@pytest.fixture(scope="module")
def engine(golden: Path) -> Engine:
    return load_drawing(golden)


@pytest.mark.parametrize(
    "case", ["full_special", "full_codes", "trunc_special", "noend_special", "noend_codes"]
)
@pytest.mark.parametrize("max_step_tokens", [5, 512])
def test_conditions_equal_the_golden_ones(
    golden: Path, path: Path, monkeypatch: pytest.MonkeyPatch, case: str, max_step_tokens: int
) -> None:
    meta, data = metadata(path)["cond"][case], fixtures(path)
    length = meta["max_condition_length"]
    engine = load_drawing(
        golden, max_condition_length=length, max_step_tokens=max_step_tokens, page_size=4,
        condition_on_special_tokens=meta["condition_on_special_tokens"],
    )  # fmt: skip
    seen = []
    start = engine.runner.render.start
    monkeypatch.setattr(
        engine.runner.render,
        "start",
        lambda rows, params: (seen.append(rows), start(rows, params))[1],
    )
    sampling = None
    if meta["end"]:  # enough blocks for the whole image, however short the condition is
        sampling = SamplingParams(temperature=0.0, max_blocks=60)
    output = engine.generate_image(data["cond/prompt_ids2d"], sampling=sampling, render=QUICK)
    assert len(seen[0]) == meta["token_embed_lengths"][0]
    expected = data[f"cond/{case}/embeds"][: meta["valid"]]
    torch.testing.assert_close(seen[0][:length], expected, atol=3e-5, rtol=0)
    assert output.condition_length == meta["valid"]
    golden_rows = data[f"cond/{case}/gen_ids"][meta["prompt_len"] + 1 :].numpy()
    if meta["end"]:
        golden_rows = golden_rows[: len(output.blocks)]
        assert output.blocks[-1, 0] == VISION_END
    np.testing.assert_array_equal(output.blocks, golden_rows)
    assert_idle(engine)


def test_what_follows_the_first_assistant_header_is_cut(engine: Engine, path: Path) -> None:
    prompt = fixtures(path)["cond/prompt_ids2d"].tolist()
    header = engine.processor.assistant_header
    cut = engine.generate_image([*prompt, *header], render=QUICK)
    longer = engine.generate_image([*prompt, *header, 5, 6, *header], render=QUICK)
    np.testing.assert_array_equal(longer.blocks, cut.blocks)
    assert_idle(engine)


@pytest.mark.parametrize("ids", [[], [[1, 2, 3]]])
def test_prompts_of_another_shape_are_refused(engine: Engine, ids: list) -> None:
    with pytest.raises(InputError, match=r"prompt ids must have shape \[S\]"):
        engine.generate_image(ids, render=QUICK)
    assert_idle(engine)


def test_images_behind_the_cut_are_refused(engine: Engine) -> None:
    header = engine.processor.assistant_header
    picture = Prompt([*header, 5, PLACE], image_ids=np.full((1, 8), 640))
    with pytest.raises(InputError, match="must end at its first assistant header"):
        engine.generate_image(picture, render=QUICK)
    assert_idle(engine)


@pytest.mark.parametrize("change", ["codes", "grid", "dtype", "array", "text"])
def test_codes_the_model_does_not_have_are_refused(golden: Path, change: str) -> None:
    engine = load_drawing(golden, position_markers="{row}")
    codes = engine.encode_image(Image.new("RGB", (84, 56)))
    wrong = {
        "codes": replace(codes, codes=codes.codes + 1000),
        "grid": replace(codes, grid=(1, 2, 2)),
        "dtype": replace(codes, codes=codes.codes.float()),
        "array": replace(codes, codes=codes.codes.numpy()),
        "text": "codes",
    }[change]
    with pytest.raises(InputError, match=r"(?i)codes"):
        engine.add_reconstruction(wrong)
    assert_idle(engine)


def test_an_image_is_streamed_step_by_step(engine: Engine, path: Path) -> None:
    prompt = fixtures(path)["cond/prompt_ids2d"]
    events = list(engine.stream(prompt, render=RenderParams(steps=3, seed=3)))
    kinds = [type(event) for event in events]
    blocks = kinds.count(BlockEvent)
    assert kinds == [BlockEvent] * blocks + [ImageProgress] * 3 + [ImageDone, RequestDone]
    assert [event.step for event in events[blocks : blocks + 3]] == [1, 2, 3]
    output = events[-2].output
    assert output.image.size == (128, 128)
    assert output.seed == 3
    assert output.timings.render > 0
    assert_idle(engine)


def test_the_same_seed_gives_the_same_image_in_any_company(engine: Engine, path: Path) -> None:
    prompt = fixtures(path)["cond/prompt_ids2d"]
    alone = engine.generate_image(prompt, render=QUICK).image
    numbers = [
        engine.add_request(prompt, render=RenderParams(steps=2, seed=seed)) for seed in (1, 3, 2)
    ]
    events = engine.run_to_end(numbers)
    together = [np.asarray(event.output.image.image, dtype=int) for event in events]
    assert np.abs(together[1] - np.asarray(alone, dtype=int)).max() <= 1  # rounding of a batch
    assert np.abs(together[0] - together[1]).max() > 1
    assert_idle(engine)


def test_mixed_routes_share_the_steps_and_change_nothing(golden: Path, path: Path) -> None:
    engine = load_drawing(golden, max_step_tokens=7, page_size=4, num_pages=50)
    data = fixtures(path)
    texts = {
        engine.add_request(Prompt(*golden_prompt(path, run)), golden_sampling(path)): run
        for run in ("gen0", "gen1", "gen2")
    }
    drawing = engine.add_request(data["cond/prompt_ids2d"], render=RenderParams(steps=9))
    events = {event.request_id: event for event in engine.run_to_end([*texts, drawing])}
    for number, run in texts.items():
        np.testing.assert_array_equal(events[number].output.blocks, golden_blocks(path, run))
    rows = data["cond/full_special/gen_ids"][12:].numpy()
    blocks = events[drawing].output.blocks
    np.testing.assert_array_equal(blocks, rows[: len(blocks)])
    assert events[drawing].output.image.image.size == (128, 128)
    assert_idle(engine)


def test_an_image_survives_preemption(golden: Path, path: Path) -> None:
    data = fixtures(path)
    calm = load_drawing(golden).generate_image(data["cond/prompt_ids2d"], render=QUICK)
    tight = load_drawing(golden, page_size=4, num_pages=18, max_step_tokens=9)
    sampling = SamplingParams(temperature=0.0, max_blocks=60)
    numbers = [
        tight.add_request(golden_prompt(path, "gen1")[0], golden_sampling(path)),
        tight.add_request(data["cond/prompt_ids2d"], sampling, render=QUICK),
    ]
    output = tight.run_to_end(numbers)[1].output
    assert output.usage.preemptions > 0
    np.testing.assert_array_equal(output.blocks, calm.blocks)
    difference = np.asarray(output.image.image, dtype=int) - np.asarray(calm.image, dtype=int)
    assert np.abs(difference).max() <= 1
    assert_idle(tight)


def test_descriptions_are_drawn(engine: Engine) -> None:
    first, second = (engine.generate_image("a red circle", render=QUICK) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert first.seed == 3


def test_without_a_seed_images_differ(engine: Engine, path: Path) -> None:
    prompt = fixtures(path)["cond/prompt_ids2d"]
    first, second = (engine.generate_image(prompt, render=RenderParams(steps=1)) for _ in range(2))
    assert first.seed != second.seed
    again = engine.generate_image(prompt, render=RenderParams(steps=1, seed=first.seed))
    assert again.image.tobytes() == first.image.tobytes()


@pytest.mark.parametrize("steps", [0, 3, 29, 31])
def test_a_drawing_is_aborted_in_any_stage(engine: Engine, path: Path, steps: int) -> None:
    number = engine.add_request(
        fixtures(path)["cond/prompt_ids2d"], render=RenderParams(steps=9, seed=1)
    )
    for _ in range(steps):
        engine.step()
    output = engine.abort(number)
    assert output.finish_reason == "abort"
    assert output.image is None
    engine.step()
    assert_idle(engine)
    assert engine.runner.render.denoiser._batches == {}


@pytest.mark.parametrize(
    "render",
    [RenderParams(height=100), RenderParams(width=33), RenderParams(latent=torch.zeros(1, 8, 3, 4),
     height=128, width=128)],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(
    engine: Engine, path: Path, render: RenderParams
) -> None:
    with pytest.raises(InputError, match=r"multiple of|latent must have shape"):
        engine.generate_image(fixtures(path)["cond/prompt_ids2d"], render=render)
    assert_idle(engine)


@pytest.mark.parametrize("method", ["start", "step", "pixels"])
def test_an_exception_while_rendering_fails_the_drawing_alone(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no more memory")

    text = engine.add_request(golden_prompt(path, "gen1")[0], golden_sampling(path))
    monkeypatch.setattr(engine.runner.render, method, broken)
    drawing = engine.add_request(fixtures(path)["cond/prompt_ids2d"], render=QUICK)
    kept, failed = engine.run_to_end([text, drawing])
    assert isinstance(failed, RequestFailed)
    assert "no more memory" in str(failed.error)
    np.testing.assert_array_equal(kept.output.blocks, golden_blocks(path, "gen1"))
    assert_idle(engine)


def test_waiting_drawings_take_no_memory_of_the_dit(engine: Engine, path: Path) -> None:
    """Conditions are made for the drawings that are being drawn, however many wait."""
    prompt = fixtures(path)["cond/prompt_ids2d"]
    quick = SamplingParams(temperature=0.0, max_blocks=6)
    numbers = [engine.add_request(prompt, quick, render=QUICK) for _ in range(20)]
    live, done = [], 0
    while engine.has_work:
        done += sum(isinstance(event, RequestDone) for event in engine.step())
        states = [one.render_state for one in engine._requests.values()]
        live.append(sum(state is not None for state in states))
    assert done == len(numbers)
    assert max(live) == engine.scheduler.max_render_batch
    assert_idle(engine)


def test_a_dit_without_vae_is_refused(golden: Path, path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no vae="):
        load_engine(path, dit=golden / "e2e_dit" / "dit")


def test_a_dit_for_another_model_is_refused(golden: Path) -> None:
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    with pytest.raises(ConfigError, match="64 channels, but the language model's embed_dim is 48"):
        load_engine(golden / "llm" / "tiny_b", **parts)


def test_parts_in_subfolders_are_found(golden: Path, path: Path, tmp_path: Path) -> None:
    for source in path.iterdir():
        (tmp_path / source.name).symlink_to(source)
    for part in ("dit", "vae"):
        (tmp_path / part).symlink_to(golden / "e2e_dit" / part)
    output = load_engine(tmp_path).generate_image([5, 6], render=QUICK)
    assert output.image.size == (128, 128)
