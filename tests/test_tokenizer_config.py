from __future__ import annotations

import pytest

from kelix_rt.errors import ConfigError
from kelix_rt.tokenizer_config import TokenizerConfig


def test_release_tokenizer_sizes() -> None:
    config = TokenizerConfig.from_json(
        {"vision_config": {}, "codebook_size": 65536, "split_voc": 8}
    )
    assert (config.codes_per_book, config.code_dim) == (8192, 128)
    assert (config.vision_config.head_dim, config.vision_config.grid) == (72, 27)
    assert config.has_disjoint_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_voc": 4}, "split_voc must be n_q_tokens"),
        ({"split_dim": True, "embedding_dim": 127}, "embedding_dim must be divisible"),
        ({"vq_sampling_mode": "softmax"}, "vq_sampling_mode"),
        ({"codebook_size": 4, "split_voc": 8}, "codebook_size must be at least split_voc"),
        ({"fusion_type": "max"}, "fusion_type"),
    ],
)
def test_impossible_tokenizers(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig.from_json({"vision_config": {}, **options})


def test_undivided_codebooks_overlap() -> None:
    config = TokenizerConfig.from_json({"vision_config": {}, "split_voc": 0})
    assert config.codes_per_book == config.codebook_size
    assert not config.has_disjoint_ids
