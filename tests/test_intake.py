"""Prompts to rows, seeds and the rules that end a request."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kelix_rt.config import KelixConfig, read_config
from kelix_rt.errors import InputError
from kelix_rt.intake import derive_seed, integer_array, prompt_rows
from kelix_rt.models.expand import expand_ids
from kelix_rt.request import Prompt


def test_derived_seeds_are_positive_different_and_repeatable() -> None:
    seeds = [derive_seed(base, counter) for base in (-5, 0, 1, 1 << 62) for counter in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert derive_seed(7, 3) == derive_seed(7, 3)
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.1


@pytest.mark.parametrize(
    "value",
    [[1, 2], (1, 2), range(1, 3), np.array([1, 2], dtype=np.uint8), torch.tensor([1, 2]).int()],
)
def test_integers_come_in_many_containers(value: object) -> None:
    array = integer_array("ids", value)
    assert array.dtype == np.int64
    assert array.tolist() == [1, 2]


@pytest.mark.parametrize("value", [3, "12", None, [1.0], [[1], [1, 2]], [1 << 80], {"a": 1}])
def test_anything_else_is_refused_by_name(value: object) -> None:
    with pytest.raises(InputError, match="ids must be"):
        integer_array("ids", value)


def test_image_rows_are_visual_by_their_first_id(golden: Path) -> None:
    """Behind it any id of the model may stand, as in the release."""
    config = read_config(golden / "llm" / "tiny_a")
    assert isinstance(config, KelixConfig)
    qwen = config.qwen_config
    row = [qwen.vocab_size + book * qwen.codes_per_book for book in range(config.num_codes)]
    expand = partial(expand_ids, config=config)
    for last, first in ((5, row[0]), (row[-1], 5)):
        image = [[first, *row[1:-1], last]]
        prompt = Prompt([1, qwen.image_token_id], image)
        if first == row[0]:
            rows, placed = prompt_rows(prompt, config, expand)
            assert rows[1, :-1].tolist() == image[0] and placed.tolist() == [False, True]
        else:
            with pytest.raises(InputError, match="image_ids must begin with ids of visual codes"):
                prompt_rows(prompt, config, expand)
