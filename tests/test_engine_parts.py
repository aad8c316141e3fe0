"""Chat, and engines whose checkpoint lacks a tokenizer or an image DiT."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from kelix_rt import ConfigError, Engine, SamplingParams, TextDelta
from kelix_rt.models.vision_tokenizer import VisionTokenizer
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


def test_warm_up_tunes_the_encoder_only_where_asked(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[int], str]] = []
    monkeypatch.setattr(
        VisionTokenizer, "tune", lambda self, tokens, mode: asked.append((tokens, mode))
    )
    engine = load_engine(golden / "llm" / "tiny_a", codes_mode="reference")
    engine.warm_up()
    assert not asked
    engine.warm_up(tune_tokens=[4, 324])
    assert asked == [([4, 324], "reference")]


def marked_rows(engine: Engine) -> list[list[int]]:
    """The ids of a prompt with three rows of image tokens, cut in front of each marker."""
    content = [
        {"type": "image", "image": Image.new("RGB", (112, 84), "red")},
        {"type": "text", "text": "what?"},
    ]
    ids = list(engine.chat_prompt([{"role": "user", "content": content}]).ids)
    starts = [i for i, id_ in enumerate(ids) if id_ == engine.config.block_end + 1]
    return [ids[a:b] for a, b in pairwise([*starts, len(ids)])]


def test_position_markers_stand_in_front_of_every_image_row(golden: Path) -> None:
    engine = load_engine(golden / "llm" / "tiny_a", position_markers="{row},{cols}")
    rows = marked_rows(engine)
    assert len(rows) == 3, "84 pixels are three rows of image tokens"
    assert rows[0][-4:] == [engine.config.qwen_config.image_token_id] * 4
    end = rows[0].index(engine.config.block_end + 2)
    assert rows[0][end - 1] in engine.text.encode("4")


def test_position_markers_of_the_checkpoint(golden: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(golden / "llm" / "tiny_a", tmp_path / "model")
    file = copied / "preprocessor_config.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps(known | {"position_markers": "{row}"}))
    assert len(marked_rows(load_engine(copied))) == 3
    assert marked_rows(load_engine(copied, position_markers="")) == []
    assert marked_rows(load_engine(golden / "llm" / "tiny_a")) == []
