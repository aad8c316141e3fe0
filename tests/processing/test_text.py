"""TextTokenizer on the golden tokenizer, and decoding as a stream."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kelix_rt.errors import ConfigError, InputError
from kelix_rt.processing import TextTokenizer

TINY = Path(__file__).parents[1] / "golden" / "llm" / "tiny_a"
TEXT = TextTokenizer.from_pretrained(TINY, vocab_size=640)


def streamed(ids: list[int]) -> list[str]:
    stream = TEXT.stream()
    return [*(stream.push(id_) for id_ in ids), stream.finish()]


def test_ids_of_the_golden_model() -> None:
    assert TEXT.vocab_size == 640
    assert TEXT.encode("<|im_start|>assistant\n") == [348, 77, 98]
    assert TEXT.encode("<|im_start|>user\n") == [348, 72, 98]
    names = "endoftext im_start im_end vision_start vision_end image_pad q_eos pos_start pos_end"
    ids = [TEXT.token_id(f"<|{name}|>") for name in names.split()]
    assert ids == [347, 348, 349, 356, 357, 359, 385, 386, 387]
    assert TEXT.special_ids == frozenset(range(347, 640))
    assert all(len(TEXT.encode(TEXT.token(id_))) == 1 for id_ in TEXT.special_ids)


def test_template() -> None:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turn = "<|im_start|>user\nHello<|im_end|>\n"
    user = {"role": "user", "content": "Hello"}
    assert TEXT.render([user]) == system + turn + "<|im_start|>assistant\n"
    assert TEXT.render([user], add_generation_prompt=False) == system + turn
    brief = TEXT.render([{"role": "system", "content": "Be brief."}, user], False)
    assert brief == "<|im_start|>system\nBe brief.<|im_end|>\n" + turn


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives(text: str) -> None:
    assert TEXT.decode(TEXT.encode(text)) == text


def test_decode_leaves_out_what_is_no_text() -> None:
    hello = TEXT.encode("Hello")
    assert TEXT.decode([348, *hello, 349, 359, 640, 895, 10**9, -1]) == "Hello"
    assert TEXT.decode([]) == ""


def test_ids_beyond_the_model_are_no_text() -> None:
    narrow = TextTokenizer(TEXT.tokenizer, vocab_size=100)
    assert narrow.vocab_size == 100 and narrow.is_text(99) and not narrow.is_text(100)
    wide = TextTokenizer(TEXT.tokenizer, vocab_size=1000)
    assert wide.vocab_size == 640 and not wide.is_text(700)


def test_a_character_over_several_tokens_is_held_back() -> None:
    ids = TEXT.encode("日")
    assert len(ids) == 3
    assert streamed(ids) == ["", "", "日", ""]
    assert streamed([*TEXT.encode("A"), *ids[:2]]) == ["A", "", "", "\ufffd"]
    assert streamed([*ids[:2], *TEXT.encode("A")]) == ["", "", "\ufffdA", ""]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_streamed_text_is_the_text(text: str) -> None:
    pieces = streamed(TEXT.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200)
@given(st.lists(st.integers(-1, 900), max_size=40))
def test_any_ids_stream_to_their_decoding(ids: list[int]) -> None:
    assert "".join(streamed(ids)) == TEXT.decode(ids)


def test_special_tokens_and_codes_do_not_part_a_character() -> None:
    first, *rest = TEXT.encode("é")
    assert "".join(streamed([first, 359, 700, *rest])) == "é"


def test_directories_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        TextTokenizer.from_pretrained(tmp_path)


def test_code_in_the_checkpoint_runs_only_when_trusted(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", "odd.Odd"]}}'
    )
    mark = tmp_path / "ran"
    (tmp_path / "odd.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        f"open({str(mark)!r}, 'w').close()\n"
        "class Odd(PreTrainedTokenizerFast):\n    pass\n"
    )
    with pytest.raises(ConfigError, match="cannot be loaded"):
        TextTokenizer.from_pretrained(tmp_path)
    assert not mark.exists()


def test_unknown_tokens_are_named() -> None:
    with pytest.raises(ConfigError, match=r"id 640 is not in the tokenizer"):
        TEXT.token(640)
    with pytest.raises(ConfigError, match=r"no token '<\|nothing\|>'"):
        TEXT.token_id("<|nothing|>")


def test_templates_that_fail(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    text = TextTokenizer.from_pretrained(tmp_path)
    hello = [{"role": "user", "content": "Hello"}]
    with pytest.raises(ConfigError, match="no chat template"):
        text.render(hello)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content }}!"}')
    assert TextTokenizer.from_pretrained(tmp_path).render(hello) == "Hello!"
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"chat_template\.json must hold"):
        TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        TextTokenizer.from_pretrained(tmp_path).render(hello)
