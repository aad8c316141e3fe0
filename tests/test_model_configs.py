from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from kelix_rt.errors import ConfigError
from kelix_rt.model_configs import KelixConfig


def language(golden: Path, name: str = "tiny_a") -> dict[str, Any]:
    data: dict[str, Any] = json.loads((golden / "llm" / name / "config.json").read_text())
    return data


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_sizes_of_a_language_model(golden: Path, name: str) -> None:
    data = language(golden, name)
    config = KelixConfig.from_json(data)
    qwen = data["qwen_config"]
    assert config.num_codes == qwen["n_q_tokens"]
    assert config.block_end == qwen["q_eos_token"]
    assert config.qwen_config.total_vocab == qwen["vocab_size"] + qwen["codebook_size"]
    assert config.qwen_config.codes_per_book == 32
    assert config.tokenizer_config.codes_per_book == 32


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("qwen_config.tie_word_embeddings", True, "tie_word_embeddings must be false"),
        ("qwen_config.use_multimodal_rope", True, "use_multimodal_rope"),
        ("qwen_config.num_kv_heads", 3, r"qwen_config\.num_heads must be divisible"),
        ("qwen_config.head_dim", 15, "head_dim must be even"),
        ("qwen_config.head_dim", 320, "and at most 256"),
        ("qwen_config.pre_embedding_size", 12, "pre_embedding_size"),
        ("qwen_config.image_token_id", 100000, "image_token_id must be a text id"),
        ("qwen_config.n_q_tokens", 4, r"tokenizer_config\.n_q_tokens must equal"),
        ("tokenizer_config.codebook_size", 512, r"tokenizer_config\.codebook_size must equal"),
        ("tokenizer_config.split_voc", 1, "split_voc must equal n_q_tokens"),
        ("tokenizer_config.vision_config.num_attention_heads", 3, "hidden_size must be divisible"),
        ("tokenizer_config.vision_config.num_attention_heads", 4, "divisible by 4"),
        ("token_decoder_config.max_length", 8, "a block would lack codes"),
        ("token_decoder_config.nhead", 3, "d_model must be divisible"),
        ("token_decoder_config.input_dim", 63, "input_dim must be null or"),
        ("token_decoder_config.eos_token", 1, "eos_token must equal"),
        ("token_decoder_config.reduce", False, "reduce must be true"),
    ],
)
def test_impossible_combinations_name_the_field(
    golden: Path, field: str, value: object, message: str
) -> None:
    data = copy.deepcopy(language(golden))
    *path, leaf = field.split(".")
    place = data
    for name in path:
        place = place[name]
    place[leaf] = value
    with pytest.raises(ConfigError, match=message):
        KelixConfig.from_json(data)


def test_default_ids_beyond_a_small_vocabulary_never_occur(golden: Path) -> None:
    data = language(golden)
    names = ("eos_token_id", "vision_start_token_id", "vision_end_token_id")
    for name in names:
        del data["qwen_config"][name]
    qwen = KelixConfig.from_json(data).qwen_config
    assert [getattr(qwen, name) for name in names] == [None, None, None]
