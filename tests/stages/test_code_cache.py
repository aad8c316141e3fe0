"""Images seen before are not encoded again, and their blocks are not computed again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kelix_rt import ConfigError, Engine, EngineConfig, Prompt, SamplingParams
from kelix_rt.stages.code_cache import CodeCache, content_key
from kelix_rt.stages.encode import split_images
from tests.engine_helpers import assert_idle, fixtures, load_engine

GRID = torch.tensor([[1, 2, 2]])
SAMPLING = SamplingParams(1.0, 0, 1.0, seed=3, max_blocks=6)


def codes(value: int, rows: int = 2) -> torch.Tensor:
    return torch.full((rows, 4), value)  # 16 bytes a row as int32


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def question(engine: Engine, *seeds: int) -> Prompt:
    content: list[dict] = [{"type": "image", "image": picture(seed)} for seed in seeds]
    content.append({"type": "text", "text": "what?"})
    return engine.chat_prompt([{"role": "user", "content": content}])


def test_keys_tell_contents_apart() -> None:
    pixels = torch.rand(4, 3, 2, 2)
    key = content_key(pixels, GRID)
    assert key == content_key(pixels.clone(), GRID.clone())
    assert key == content_key(pixels.transpose(2, 3).contiguous().transpose(2, 3), GRID)
    other = pixels.clone()
    other[3, 2, 1, 1] += 1e-6
    assert key != content_key(other, GRID)
    assert key != content_key(pixels, torch.tensor([[2, 2, 1]]))
    half = content_key(pixels.bfloat16(), GRID)
    assert half not in (key, content_key(pixels.half(), GRID))


def test_the_least_recently_used_goes_first() -> None:
    cache = CodeCache(max_bytes=96)
    for index in range(3):
        cache.put(bytes([index]), codes(index))
    assert cache.num_bytes == 96
    assert torch.equal(cache.get(b"\x00"), codes(0))
    cache.put(b"\x03", codes(3))
    assert cache.get(b"\x01") is None
    assert [len(cache), cache.num_bytes, cache.hits, cache.misses] == [3, 96, 1, 1]
    cache.put(b"\x04", codes(4, rows=6))  # as large as all the others
    assert [len(cache), cache.num_bytes] == [1, 96]
    cache.put(b"\x05", codes(5, rows=7))  # larger than the budget
    assert cache.get(b"\x05") is None
    assert torch.equal(cache.get(b"\x04"), codes(4, rows=6))


def test_a_second_put_costs_nothing() -> None:
    cache = CodeCache(max_bytes=96)
    cache.put(b"a", codes(1))
    cache.put(b"a", codes(1))
    assert cache.num_bytes == 32


def test_packed_patches_are_split_by_image() -> None:
    grid = torch.tensor([[1, 2, 2], [2, 2, 4]])
    patches = torch.arange(20.0).view(20, 1, 1, 1)
    (first, one), (second, two) = split_images(patches, grid)
    assert (len(first), one.tolist()) == (4, [[1, 2, 2]])
    assert (len(second), two.tolist()) == (16, [[2, 2, 4]])
    assert torch.equal(torch.cat((first, second)), patches)


@pytest.fixture
def counted(golden: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, list[int]]:
    """An engine and the number of patches of each pass of its tokenizer."""
    engine = load_engine(golden / "llm" / "tiny_a", page_size=4)
    passes: list[int] = []
    codes = engine.runner.encode.codes

    def counting(pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        passes.append(len(pixels))
        return codes(pixels, grid)

    monkeypatch.setattr(engine.runner.encode, "codes", counting)
    return engine, passes


def test_an_image_is_encoded_once(counted: tuple[Engine, list[int]], golden: Path) -> None:
    engine, passes = counted
    first = engine.generate([question(engine, 1)], SAMPLING)[0]
    again, other = (engine.generate([question(engine, n)], SAMPLING)[0] for n in (1, 2))
    assert passes == [48, 48]
    np.testing.assert_array_equal(first.blocks, again.blocks)
    stats = engine.stats()
    assert (stats.image_hits, stats.image_misses) == (1, 2)
    fresh = load_engine(golden / "llm" / "tiny_a", image_cache_bytes=0)
    for output, seed in ((again, 1), (other, 2)):
        alone = fresh.generate([question(fresh, seed)], SAMPLING)[0]
        np.testing.assert_array_equal(output.blocks, alone.blocks)
    assert (fresh.stats().image_hits, fresh.stats().image_misses) == (0, 0)
    assert torch.equal(engine.encode_image(picture(2)).codes, fresh.encode_image(picture(2)).codes)
    assert engine.stats().image_hits == 2
    assert_idle(engine)


def test_every_image_of_a_request_finds_its_place(
    counted: tuple[Engine, list[int]], golden: Path
) -> None:
    """Known ones and new ones between each other; one pass of the tokenizer in a step."""
    engine, passes = counted
    engine.generate([question(engine, 1)], SAMPLING)
    before = engine.stats().encode_steps
    output = engine.generate([question(engine, 2, 1, 3, 2, 1)], SAMPLING)[0]
    assert len(passes) == 3
    assert engine.stats().encode_steps - before == 3  # 2 | 1, 3 | 2, 1
    plain = load_engine(golden / "llm" / "tiny_a", image_cache_bytes=0)
    alone = plain.generate([question(plain, 2, 1, 3, 2, 1)], SAMPLING)[0]
    np.testing.assert_array_equal(output.blocks, alone.blocks)
    assert plain.stats().encode_steps == 5
    assert_idle(engine)


def test_codes_out_of_the_cache_are_the_callers_own(counted: tuple[Engine, list[int]]) -> None:
    engine, _ = counted
    first = engine.encode_image(picture(1)).codes
    kept = first.clone()
    first += 1
    second = engine.encode_image(picture(1)).codes
    assert torch.equal(second, kept)
    second += 1
    assert torch.equal(engine.encode_image(picture(1)).codes, kept)


def test_pages_of_an_image_are_shared_with_the_same_image_only(golden: Path) -> None:
    engine = load_engine(golden / "llm" / "tiny_a", page_size=4)
    prompt = question(engine, 1)
    ids = list(prompt.ids)
    image = engine.config.qwen_config.image_token_id
    begin, end = ids.index(image), len(ids) - ids[::-1].index(image)
    assert end - begin == 12
    first, again, other = (
        engine.generate([question(engine, seed)], SAMPLING)[0] for seed in (1, 1, 2)
    )
    assert first.usage.cached_blocks == 0
    assert again.usage.cached_blocks >= end - 3  # every full page, those of the image among them
    assert other.usage.cached_blocks <= begin
    np.testing.assert_array_equal(first.blocks, again.blocks)


def test_a_second_turn_finds_the_image_of_the_first(golden: Path) -> None:
    engine = load_engine(golden / "llm" / "tiny_a", page_size=4)
    prompt = question(engine, 1)
    first = engine.generate([prompt], SAMPLING)[0]
    rows = engine.runner.model.expand(
        torch.tensor(prompt.ids), engine.runner.encode.ids(engine.encode_image(picture(1)).codes)
    )
    longer = np.concatenate((rows.numpy(), first.blocks))
    second = engine.generate([longer], SAMPLING)[0]
    assert second.usage.cached_blocks >= len(rows) - 3
    plain = load_engine(golden / "llm" / "tiny_a", prefix_cache=False)
    np.testing.assert_array_equal(second.blocks, plain.generate([longer], SAMPLING)[0].blocks)


def test_the_budget_is_checked() -> None:
    with pytest.raises(ConfigError, match="image_cache_bytes"):
        EngineConfig(image_cache_bytes=-1)


def test_golden_images_are_the_same_one_by_one(golden: Path) -> None:
    data = fixtures(golden / "llm" / "tiny_a")
    stage = load_engine(golden / "llm" / "tiny_a").runner.encode_stage()
    parts = split_images(data["vis/pixel_values"], data["vis/image_grid_thw"])
    found = torch.cat([stage.cached_codes(*part)[0] for part in parts])
    assert torch.equal(found, data["vis/indices"])
