"""The trained text tokenizer: the release's special ids, exact size, repeatable, lossless."""

from __future__ import annotations

from pathlib import Path

import pytest

from kelix_rt.errors import ConfigError
from kelix_rt.processing import ChatProcessor, ImageProcessor, TextTokenizer
from kelix_rt.train.recipe import Sizes, language_config
from kelix_rt.train.text_tokenizer import train, write_text_tokenizer
from kelix_rt.train.world import corpus

SIZES = Sizes()
# The release: 151,936 text ids, and where its special ones are.
RELEASE_VOCAB = 151_936
RELEASE_IDS = {
    "<|endoftext|>": 151_643,
    "<|im_start|>": 151_644,
    "<|im_end|>": 151_645,
    "<|vision_start|>": 151_652,
    "<|vision_end|>": 151_653,
    "<|image_pad|>": 151_655,
    "<|q_eos|>": 151_681,
    "<|pos_start|>": 151_682,
    "<|pos_end|>": 151_683,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    write_text_tokenizer(path, SIZES, samples=200)
    return path


@pytest.fixture(scope="module")
def text(folder: Path) -> TextTokenizer:
    return TextTokenizer.from_pretrained(folder, vocab_size=SIZES.vocab)


def test_special_ids_keep_their_distance_to_the_end(text: TextTokenizer) -> None:
    assert text.vocab_size == SIZES.vocab
    for token, released in RELEASE_IDS.items():
        assert text.token_id(token) == released - RELEASE_VOCAB + SIZES.vocab
        assert text.encode(token) == [text.token_id(token)]


def test_texts_come_back_and_are_short(text: TextTokenizer) -> None:
    texts = list(corpus(50, seed=9))
    assert all(text.decode(text.encode(line)) == line for line in texts)
    per_word = sum(len(text.encode(t)) for t in texts) / sum(len(t.split()) for t in texts)
    assert per_word < 1.6  # a word and its punctuation
    other = "Ünïcode \U0001f600 99\n\n"
    assert text.decode(text.encode(other)) == other


def test_the_same_texts_give_the_same_tokenizer() -> None:
    texts = list(corpus(30))
    assert train(texts, 700).to_str() == train(texts, 700).to_str()


def test_few_texts_still_give_every_id_a_name() -> None:
    tokenizer = train(["a b", "c"], 700)
    assert tokenizer.get_vocab_size() == 700
    assert tokenizer.token_to_id("<|endoftext|>") == 700 - 293
    assert tokenizer.token_to_id("<|unused_406|>") == 406


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be at least 549"):
        train(["a"], 500)


def test_prompts_are_built_from_the_written_files(folder: Path, text: TextTokenizer) -> None:
    qwen = language_config(SIZES).qwen_config
    images = ImageProcessor.from_pretrained(folder)
    assert images.max_pixels >= 224**2
    processor = ChatProcessor(text, images, qwen)
    encoded = processor.encode([{"role": "user", "content": "what do you see?"}])
    header = text.encode("<|im_start|>assistant\n")
    assert len(header) == 3  # one id each for the role and the line break
    assert encoded.ids[-3:] == header and encoded.ids.count(qwen.eos_token_id) == 2
