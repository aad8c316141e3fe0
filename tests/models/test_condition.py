"""Which states become the condition of the image de-tokenizer."""

from __future__ import annotations

import pytest
import torch

from kelix_rt.errors import InputError
from kelix_rt.models.condition import build_condition, find_condition
from tests.models import toy_llm as toy

START, END = toy.VISION_START, toy.VISION_END


def find(ids: torch.Tensor, prompt_len: int, max_length: int = 20, special: bool = True):
    return find_condition(ids, prompt_len, START, END, toy.V, max_length, special)


def test_rows_run_from_start_to_end_and_keep_markers() -> None:
    marker = toy.text(10, 11, 12)
    codes = toy.image((0, 1, 2), (3, 4, 5))
    ids = torch.cat((toy.text(7, START), marker, codes, marker, codes, toy.text(END, toy.EOS)))
    rows = find(ids, 2)
    assert (rows.start, rows.end, rows.length) == (1, 12, 12)
    assert rows.positions.tolist() == list(range(1, 13))
    assert find(ids, 2, special=False).positions.tolist() == [5, 6, 10, 11]
    assert find(ids, 2, max_length=3).length == 12


def test_an_image_inside_the_prompt_is_passed_over() -> None:
    first = torch.cat((toy.text(START), toy.image((0, 0, 0)), toy.text(END, 5, START)))
    ids = torch.cat((first, toy.image((1, 1, 1), (2, 2, 2)), toy.text(END, toy.EOS, END)))
    rows = find(ids, len(first))
    assert (rows.start, rows.end) == (4, 7)


def test_without_an_end_the_rows_that_were_fed_are_used() -> None:
    ids = torch.cat((toy.text(7, START), toy.image(*[(1, 2, 3)] * 4)))
    rows = find(ids, 2)
    assert rows.end is None
    assert rows.positions.tolist() == [1, 2, 3, 4]
    assert find(ids, 2, max_length=2).positions.tolist() == [1, 2]
    # The release filters by the flags of the last rows, which here are all visual.
    assert find(ids, 2, max_length=3, special=False).positions.tolist() == [1, 2, 3]


def test_end_as_the_last_block_needs_one_more_state() -> None:
    ids = torch.cat((toy.text(START), toy.image((1, 2, 3)), toy.text(END)))
    rows = find(ids, 1)
    assert rows.positions.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="row 2 has no hidden state"):
        build_condition(torch.zeros(2, 4), rows, 5)
    assert build_condition(torch.zeros(3, 4), rows, 5)[2] == 3


def test_a_prompt_without_start_is_refused() -> None:
    with pytest.raises(InputError, match="no vision_start"):
        find(toy.text(1, 2, 3), 3)


def test_condition_is_padded_or_cut_but_reports_its_length() -> None:
    hidden = torch.arange(24.0).view(6, 4)
    ids = torch.cat((toy.text(START), toy.image(*[(1, 2, 3)] * 3), toy.text(END, toy.EOS)))
    rows = find(ids, 1)
    embeds, mask, length = build_condition(hidden, rows, 7)
    assert length == 5
    assert torch.equal(embeds[:5], hidden[:5])
    assert embeds[5:].abs().sum() == 0
    assert mask.tolist() == [1, 1, 1, 1, 1, 0, 0]
    embeds, mask, length = build_condition(hidden, rows, 3)
    assert (length, mask.tolist()) == (5, [1, 1, 1])
    assert torch.equal(embeds, hidden[:3])
