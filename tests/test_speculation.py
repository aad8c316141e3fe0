"""What is guessed, and which of it counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kelix_rt import ConfigError, SamplingParams
from kelix_rt.config import KelixConfig, read_config
from kelix_rt.sequence import EndRules, Sequence
from kelix_rt.speculation import MarkerDrafter, accepted_drafts, next_coordinates

VISION_START, VISION_END, CODE, DIGITS = 356, 357, 640, 100


def test_accepted_is_what_the_model_drew_itself() -> None:
    drafts = np.array([[1, 9], [2, 9], [3, 9]])
    blocks = np.array([[1, 9], [2, 9], [3, 9], [7, 9]])
    assert accepted_drafts(drafts, blocks) == 3
    assert accepted_drafts(drafts[:0], blocks[:1]) == 0
    for row in range(3):
        other = blocks.copy()
        other[row] = -1  # logits that were no numbers
        assert accepted_drafts(drafts, other) == row


@pytest.mark.parametrize(
    ("before", "last", "following"),
    [
        ("0", "1", "2"),
        ("8", "9", "10"),
        ("3,18", "4,18", "5,18"),
        ("row 9 of 12", "row 10 of 12", "row 11 of 12"),
        ("08|3", "09|3", "10|3"),
        ("18,3", "18,4", "18,5"),
        ("1", "3", None),
        ("1,1", "2,2", None),
        ("1,4", "1,4", None),
        ("a", "b", None),
        ("1", "1,2", None),
        ("", "", None),
    ],
)
def test_one_number_counts_up(before: str, last: str, following: str | None) -> None:
    assert next_coordinates(before, last) == following


class Digits:
    """A tokenizer with one id per digit."""

    def encode(self, text: str) -> list[int]:
        return [DIGITS + int(digit) for digit in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(str(id_ - DIGITS) for id_ in ids)


@pytest.fixture
def config(golden: Path) -> KelixConfig:
    config = read_config(golden / "llm" / "tiny_a")
    assert isinstance(config, KelixConfig)
    return config


def proposed(config: KelixConfig, first_ids: list[int], known: int = 1) -> list[list[int]]:
    """First ids of the drafts after every row from the `known`-th on, [] where there are none."""
    rows = np.full((known, config.num_codes + 1), config.block_end, dtype=np.int64)
    rows[:, 0] = first_ids[:known]
    ends = EndRules(frozenset(), len(first_ids) + 1)
    sequence = Sequence(1, rows, SamplingParams(), 0, ends)
    drafter = MarkerDrafter(config, (VISION_START, VISION_END), Digits)
    found = []
    for index in range(known, len(first_ids) + 1):
        drafts = drafter.propose(sequence)
        if drafts is None:
            found.append([])
        else:
            assert (drafts[:, 1:] == config.block_end).all()
            found.append(drafts[:, 0].tolist())
        if index < len(first_ids):
            sequence.append(np.array([first_ids[index]] + [config.block_end] * config.num_codes))
    return found


def marker(config: KelixConfig, number: int) -> list[int]:
    start, end = config.marker_ids
    return [start, *Digits().encode(str(number)), end]


def image_rows(config: KelixConfig, numbers: list[int], columns: int = 3) -> list[int]:
    ids = [VISION_START]
    for number in numbers:
        ids += marker(config, number) + [CODE] * columns
    return ids


def test_the_third_marker_is_guessed_where_it_is_due(config: KelixConfig) -> None:
    found = proposed(config, image_rows(config, [8, 9]))
    assert found[-1] == marker(config, 10)
    assert not any(found[:-1])


def test_the_rest_of_a_marker_is_guessed_once_it_has_begun(config: KelixConfig) -> None:
    ids = image_rows(config, [8, 9])[:-1]  # the row is shorter than the one before
    expected = marker(config, 10)
    for begun in range(1, len(expected)):
        assert proposed(config, ids + expected[:begun])[-1] == expected[begun:]
    assert proposed(config, ids + expected)[-1] == []
    wrong = [expected[0], DIGITS + 7]
    assert proposed(config, ids + wrong)[-1] == []


def test_nothing_is_guessed_outside_of_an_image(config: KelixConfig) -> None:
    ids = image_rows(config, [8, 9])
    assert proposed(config, [*ids, VISION_END])[-1] == []
    assert proposed(config, ids[1:])[-1] == []
    assert proposed(config, [*ids, VISION_END, VISION_START])[-1] == []
    assert proposed(config, image_rows(config, [8, 8]))[-1] == []


def test_an_image_that_holds_other_text_is_left_alone(config: KelixConfig) -> None:
    ids = image_rows(config, [8, 9])
    assert proposed(config, ids)[-1]
    assert proposed(config, [*ids, 5])[-1] == []
    again = [*ids, 5, *marker(config, 10), CODE, CODE, CODE]
    assert proposed(config, again)[-1] == marker(config, 11)


def test_endless_coordinates_are_not_read(config: KelixConfig) -> None:
    """More digits than Python turns into a number, and than a draft may have rows."""
    start, end = config.marker_ids
    digits = [DIGITS + 1] * 5000
    ids = [VISION_START]
    for _ in range(2):
        ids += [start, *digits, end, CODE]
    assert proposed(config, ids, known=len(ids)) == [[]]


def test_a_tokenizer_that_cannot_be_loaded_ends_the_guessing(
    config: KelixConfig, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def broken() -> Digits:
        asked.append(1)
        raise ConfigError("tokenizer.json is broken")

    ids = image_rows(config, [8, 9, 10])
    rows = np.full((len(ids), config.num_codes + 1), config.block_end, dtype=np.int64)
    rows[:, 0] = ids
    drafter = MarkerDrafter(config, (VISION_START, VISION_END), broken)
    for number in (1, 2):
        sequence = Sequence(number, rows, SamplingParams(), 0, EndRules(frozenset(), 9))
        assert drafter.propose(sequence) is None
    assert len(asked) == 1
    assert "tokenizer.json is broken" in caplog.text


@pytest.mark.parametrize("known", [1, 4, 9, 22])
def test_a_prompt_may_hold_a_part_of_the_image(config: KelixConfig, known: int) -> None:
    ids = [*image_rows(config, [0, 1], columns=2), VISION_END, 5, *image_rows(config, [3, 4])]
    assert proposed(config, ids, known)[-1] == marker(config, 5)
