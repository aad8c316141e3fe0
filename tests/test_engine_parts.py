"""Chat, and engines whose checkpoint lacks a tokenizer or an image DiT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from kelix_rt import ConfigError, SamplingParams, TextDelta
from tests.engine_helpers import (
    assert_idle,
    fixtures,
    golden_prompt,
    golden_sampling,
    load_engine,
)


def test_chat_answers_messages_and_streams_the_same_text(golden: Path) -> None:
    engine = load_engine(golden / "llm" / "tiny_a")
    messages = [{"role": "user", "content": "Say something."}]
    sampling = SamplingParams(temperature=0.9, seed=5, max_blocks=30)
    reply = engine.chat(messages, sampling)
    assert reply.usage.generated_blocks == len(reply.blocks)
    assert reply.timings.total >= reply.timings.first_block > 0
    events = list(engine.stream(messages, sampling))
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == reply.text
    assert_idle(engine)


def test_a_checkpoint_without_tokenizer_files_still_makes_blocks(golden: Path) -> None:
    path = golden / "llm" / "tiny_b"
    engine = load_engine(path)
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        engine.chat([{"role": "user", "content": "Hello"}])
    output = engine.generate_blocks(golden_prompt(path, "gen0")[0], sampling=golden_sampling(path))
    assert torch.equal(output.ids, fixtures(path)["gen0/ids"])


def test_a_checkpoint_without_dit_says_so(golden: Path) -> None:
    engine = load_engine(golden / "llm" / "tiny_a")
    with pytest.raises(ConfigError, match="drawing needs the image DiT"):
        engine.generate_image("a red circle")
    with pytest.raises(ConfigError, match="drawing needs the image DiT"):
        engine.generate_image([1, 2, 3])
    assert_idle(engine)


def test_codes_of_an_image_are_the_callers_own(golden: Path) -> None:
    engine = load_engine(golden / "llm" / "tiny_a")
    codes = engine.encode_image(Image.new("RGB", (56, 56), "red")).codes
    codes += 1  # a tensor made in inference mode would refuse
    assert codes.shape == (4, 8)


def test_position_markers_stand_in_front_of_every_image_row(golden: Path) -> None:
    engine = load_engine(golden / "llm" / "tiny_a", position_markers="{row},{cols}")
    picture = Image.new("RGB", (112, 84), "red")
    prompt = engine.chat_prompt(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}],
            }
        ]
    )
    ids = list(prompt.ids)
    start = engine.config.block_end + 1
    assert ids.count(start) == 3, "84 pixels are three rows of image tokens"
    row = ids[ids.index(start) : ids.index(start, ids.index(start) + 1)]
    assert row[-4:] == [engine.config.qwen_config.image_token_id] * 4
    assert row[row.index(start + 1) - 1] in engine.text.encode("4")
