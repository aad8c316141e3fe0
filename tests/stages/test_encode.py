"""The encode stage on golden patches, and images that become prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kelix_rt import Engine, InputError, Prompt, RenderParams, SamplingParams
from kelix_rt.config import VisionConfig
from kelix_rt.stages.encode import block_count, check_patches
from tests.engine_helpers import GREEDY, assert_idle, fixtures, load_engine


@pytest.fixture(scope="module", params=["tiny_a", "tiny_b"])
def path(request: pytest.FixtureRequest, golden: Path) -> Path:
    return golden / "llm" / request.param


@pytest.fixture(scope="module")
def engine(path: Path) -> Engine:
    return load_engine(path)


def photo(height: int = 56, width: int = 84) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_codes_and_ids_equal_the_golden_ones(engine: Engine, path: Path) -> None:
    data = fixtures(path)
    stage = engine.runner.encode_stage()
    patches = data["vis/pixel_values"], data["vis/image_grid_thw"]
    assert torch.equal(stage.codes(*patches), data["vis/indices"])
    assert torch.equal(stage.ids(stage.codes(*patches)), data["vis/aligned_ids"])


def test_pixels_in_a_prompt_equal_their_ids(engine: Engine, path: Path) -> None:
    data = fixtures(path)
    marker = engine.config.qwen_config.image_token_id
    ids = [1, 2, *[marker] * len(data["vis/aligned_ids"]), 3]
    sampling = SamplingParams(temperature=0.0, max_blocks=6)
    pixels = Prompt(ids, None, data["vis/pixel_values"], data["vis/image_grid_thw"])
    encoded, given = engine.generate([pixels, Prompt(ids, data["vis/aligned_ids"])], sampling)
    np.testing.assert_array_equal(encoded.blocks, given.blocks)
    assert_idle(engine)


def test_an_encoder_that_fails_fails_its_request_alone(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no more memory")

    data = fixtures(path)
    monkeypatch.setattr(engine.runner.encode, "cached_codes", broken)
    ids = [engine.config.qwen_config.image_token_id] * len(data["vis/aligned_ids"])
    image = Prompt(ids, None, data["vis/pixel_values"], data["vis/image_grid_thw"])
    failed, fine = engine.generate([image, [1, 2]], SamplingParams(max_blocks=3))
    assert "no more memory" in str(failed.error)
    assert fine.error is None
    assert_idle(engine)


def test_encode_image_gives_a_row_per_two_by_two_patches(engine: Engine) -> None:
    codes = engine.encode_image(photo())
    frames, rows, columns = codes.grid
    config = engine.config.tokenizer_config
    assert codes.codes.shape == (frames * rows * columns // 4, config.n_q_tokens)
    assert codes.codes.dtype == torch.int64
    assert 0 <= int(codes.codes.min()) <= int(codes.codes.max()) < config.codes_per_book
    sized = engine.encode_image(photo(), size=(56, 56))
    assert sized.grid == (1, 4, 4)


def test_block_count_adds_up_images() -> None:
    assert block_count(torch.tensor([[1, 4, 6], [2, 2, 2]])) == 6 + 2


@pytest.mark.parametrize(
    ("pixels", "grid"),
    [
        (torch.zeros(4, 3, 14, 14), torch.tensor([1, 2, 2])),
        (torch.zeros(4, 3, 14, 14), torch.tensor([[1.0, 2.0, 2.0]])),
        (torch.zeros(0, 3, 14, 14), torch.empty((0, 3), dtype=torch.int64)),
        (torch.zeros(0, 3, 14, 14), torch.tensor([[0, 2, 2]])),
        (torch.zeros(2, 3, 14, 14), torch.tensor([[1, 1, 2]])),
        (torch.zeros(4, 3 * 14 * 14), torch.tensor([[1, 2, 2]])),
        (torch.zeros(3, 3, 14, 14), torch.tensor([[1, 2, 2]])),
    ],
)
def test_patches_that_do_not_fit_are_refused(pixels: torch.Tensor, grid: torch.Tensor) -> None:
    with pytest.raises(InputError):
        check_patches(pixels, grid, VisionConfig())


def test_messages_with_images_are_answered(golden: Path) -> None:
    engine = load_engine(golden / "llm" / "tiny_a")
    content = [{"type": "image", "image": photo()}, {"type": "text", "text": "What is this?"}]
    output = engine.chat([{"role": "user", "content": content}], SamplingParams(0.0, max_blocks=5))
    assert len(output.blocks) <= 5
    assert output.usage.prompt_blocks > 6
    assert_idle(engine)


def test_reconstruct_feeds_the_codes_of_the_image_to_the_dit(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    engine = load_engine(golden / "llm" / "tiny_a", **parts, max_step_tokens=5)
    seen = []
    start = engine.runner.render.start

    def recording(rows: torch.Tensor, params: RenderParams) -> object:
        seen.append(rows)
        return start(rows, params)

    monkeypatch.setattr(engine.runner.render, "start", recording)
    output = engine.reconstruct(photo(), render=RenderParams(steps=1, seed=1))
    codes = engine.encode_image(photo()).codes
    assert output.condition_length == len(codes) + 2
    qwen = engine.config.qwen_config
    ids = engine.runner.model.visual_tokenizer.global_ids(codes, qwen.vocab_size)
    np.testing.assert_array_equal(output.blocks[:-1, :-1], ids)

    prompt = [qwen.vision_start_token_id, *[qwen.image_token_id] * len(ids)]
    rows = engine.runner.model.expand(torch.tensor([*prompt, qwen.vision_end_token_id]), ids)
    forced = engine.runner.model.hidden_states(rows)[-1]
    torch.testing.assert_close(seen[0], forced, atol=3e-5, rtol=0)
    assert_idle(engine)


@pytest.mark.parametrize("as_arrays", [False, True])
def test_reconstruct_behind_a_prompt_with_a_picture(golden: Path, as_arrays: bool) -> None:
    """Its patches are encoded first: all is as with their codes in the prompt."""
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    engine = load_engine(golden / "llm" / "tiny_a", **parts)
    data = fixtures(golden / "llm" / "tiny_a")
    qwen = engine.config.qwen_config
    ids = [1, *[qwen.image_token_id] * len(data["vis/aligned_ids"]), 2, qwen.vision_start_token_id]
    patches = data["vis/pixel_values"], data["vis/image_grid_thw"]
    if as_arrays:
        patches = tuple(value.numpy() for value in patches)
    render = RenderParams(steps=1, seed=1)
    prompts = [Prompt(ids, None, *patches), Prompt(ids, data["vis/aligned_ids"]), Prompt(ids[-1:])]
    encoded, given, bare = (
        np.asarray(engine.reconstruct(photo(), prompt=prompt, render=render).image)
        for prompt in prompts
    )
    np.testing.assert_array_equal(encoded, given)
    assert (encoded != bare).any()
    assert_idle(engine)


def test_reconstruct_refuses_what_does_not_fit(golden: Path) -> None:
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    engine = load_engine(golden / "llm" / "tiny_a", **parts, max_condition_length=6)
    with pytest.raises(InputError, match="encode it at a smaller size"):
        engine.reconstruct(photo())
    assert engine.reconstruct(photo(), size=(28, 28), render=RenderParams(steps=1)).image
    assert engine.generate([[1, 2]], GREEDY)[0].error is None
    assert_idle(engine)
