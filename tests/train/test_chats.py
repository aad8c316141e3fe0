from __future__ import annotations

import random

import pytest
import torch

from kelix_rt.train.chats import TASKS, completion_mask
from kelix_rt.train.pictures import CodedPicture, PictureCodes, Subject, scene_of
from kelix_rt.train.world_text import Question
from tests.train import tiny

START, PLACE, END, MARK, MARK_END = 356, 359, 357, 386, 387
EOT, TURN, TURN_END = 347, 348, 349
HEADER = [TURN, 77, 98]


def picture() -> CodedPicture:
    ids = torch.arange(8) * 32 + 640
    return CodedPicture(ids.expand(4, 8).clone(), (1, 4, 4))


def test_mask_of_a_hand_made_chat() -> None:
    ids = [9, *HEADER, 5, 6, TURN_END, 98, 7, TURN, 72, 98, TURN_END, 98, *HEADER, 8, TURN_END, 98,
           EOT]  # fmt: skip
    counted = [i for i, flag in enumerate(completion_mask(ids, HEADER, TURN_END)) if flag]
    assert counted == [4, 5, 6, 7, 17, 18, 19]


def test_the_last_position_never_counts() -> None:
    assert completion_mask([*HEADER, 5, TURN_END, 98], HEADER, TURN_END) == [
        False, False, False, True, True, False,
    ]  # fmt: skip
    assert completion_mask([*HEADER, 5, 6], HEADER, TURN_END)[-2:] == [True, False]
    assert completion_mask([], HEADER, TURN_END) == []


def test_a_chat_with_a_picture() -> None:
    chats = tiny.chats()
    turns = [("user", chats.image + "Hello"), ("assistant", "you")]
    document = chats.chat(turns, [picture()])
    text = chats._text
    row = [PLACE, PLACE]
    marked = [[MARK, *text.encode(str(r)), MARK_END, *row] for r in range(2)]
    system = text.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    answer = [*text.encode("you"), TURN_END, 98]
    asked = [TURN, 72, 98, START, *marked[0], *marked[1], END, *text.encode("Hello"), TURN_END, 98]
    assert document.ids == [*system, *asked, *HEADER, *answer, EOT]
    first = len(document.ids) - 1 - len(answer)
    assert [i for i, flag in enumerate(document.counted) if flag] == list(
        range(first, first + len(answer))
    )
    assert torch.equal(document.codes, picture().ids)


def test_a_drawn_picture_counts_whole() -> None:
    chats = tiny.chats()
    document = chats.chat([("user", "Hello"), ("assistant", chats.image)], [picture()])
    start, end = document.ids.index(START), document.ids.index(END)
    assert all(document.counted[start : end + 3])  # and the end of the message, and the newline
    assert not any(document.counted[:start]) and not any(document.counted[end + 3 :])


def test_plain_text_counts_everywhere_but_at_the_start() -> None:
    document = tiny.chats().plain("Hello you")
    assert document.counted == [False] + [True] * (len(document.ids) - 1)
    assert document.ids[-1] == EOT
    chat = tiny.chats().chat([("user", "Hello"), ("assistant", "you")])
    assert chat.counting_all().counted == [False] + [True] * (len(chat.ids) - 1)


def test_lines_count_answers_alone() -> None:
    chats = tiny.chats()
    asked = [Question("count", "how many?", "two"), Question("word", "which word?", "map")]
    document = chats.lines(picture(), asked)
    text = chats._text
    row = [PLACE, PLACE]
    rows = [[MARK, *text.encode(str(r)), MARK_END, *row] for r in range(2)]
    parts = [([START, *rows[0], *rows[1], END, *text.encode("\n")], False)]
    for question in asked:
        parts += [(text.encode(question.text), False)]
        parts += [(text.encode(f" {question.answer}\n"), True)]
    parts += [([EOT], False)]
    assert document.ids == [id_ for ids, _ in parts for id_ in ids]
    assert document.counted == [counts for ids, counts in parts for _ in ids]
    told = chats.lines("two things", asked)
    assert PLACE not in told.ids and sum(told.counted) == sum(document.counted)


def test_pictures_must_have_places() -> None:
    with pytest.raises(ValueError, match="2 pictures"):
        chats = tiny.chats()
        chats.plain(chats.image, [picture(), picture()])


@pytest.mark.parametrize("name", TASKS)
def test_every_task_makes_a_document(name: str) -> None:
    codes = PictureCodes(*torch.zeros(4, 1, 4, 8, dtype=torch.int16), {}, 56, 14, lambda c: c + 640)
    subject = Subject(scene_of(0, 0), lambda: codes, 0)
    document = TASKS[name](tiny.chats(), subject, random.Random(0))
    assert len(document.ids) == len(document.counted)
    assert document.ids.count(PLACE) == len(document.codes)
    assert any(document.counted)
    assert (len(document.codes) > 0) == (name not in ("text", "told", "told relations"))
    again = TASKS[name](tiny.chats(), subject, random.Random(0))
    assert document.ids == again.ids and document.counted == again.counted


@pytest.mark.parametrize(
    ("name", "kind"), [("draw", 1), ("draw exactly", 1), ("draw odd", 3), ("caption", 0)]
)
def test_drawings_are_taught_plain(name: str, kind: int) -> None:
    kinds = torch.arange(4, dtype=torch.int16).view(4, 1, 1, 1).expand(4, 1, 4, 8)
    codes = PictureCodes(*kinds, {}, 56, 14, lambda c: c + 640)
    document = TASKS[name](
        tiny.chats(), Subject(scene_of(0, 0), lambda: codes, 0), random.Random(0)
    )
    assert torch.equal(document.codes, torch.full_like(document.codes, 640 + kind))
