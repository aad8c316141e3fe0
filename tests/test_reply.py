"""The text of a reply, around images and across incomplete characters."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelix_rt.config import KelixConfig, QwenConfig, read_config
from kelix_rt.processing import TextTokenizer
from kelix_rt.reply import ReplyText


@pytest.fixture(scope="module")
def config(golden: Path) -> QwenConfig:
    config = read_config(golden / "llm" / "tiny_a")
    assert isinstance(config, KelixConfig)
    return config.qwen_config


@pytest.fixture(scope="module")
def text(golden: Path, config: QwenConfig) -> TextTokenizer:
    path = golden / "llm" / "tiny_a"
    return TextTokenizer.from_pretrained(path, vocab_size=config.vocab_size)


def test_pieces_join_up_to_the_text(text: TextTokenizer, config: QwenConfig) -> None:
    ids = text.encode("Grüße aus Köln, 你好!")
    reply = ReplyText(text, config)
    pieces = [reply.push(id_) for id_ in ids] + [reply.finish()]
    assert "".join(pieces) == text.decode(ids)
    assert ReplyText(text, config).decode(ids) == text.decode(ids)


def test_what_stands_inside_an_image_is_no_text(text: TextTokenizer, config: QwenConfig) -> None:
    before, coordinates, after = (text.encode(part) for part in ("Look: ", "0,18", " a cat"))
    image = [config.vision_start_token_id, *coordinates, config.vocab_size + 3]
    ids = [*before, *image, config.vision_end_token_id, *after]
    assert ReplyText(text, config).decode(ids) == text.decode([*before, *after])
