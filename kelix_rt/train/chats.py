"""Scenes as training documents: ids with image placeholders, codes, and which positions count."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kelix_rt.config import QwenConfig
from kelix_rt.errors import ConfigError
from kelix_rt.processing import ChatProcessor
from kelix_rt.train.pictures import CodedPicture, Subject
from kelix_rt.train.pure_text import text_sample
from kelix_rt.train.world_questions import questions
from kelix_rt.train.world_scene import Scene, unnamed
from kelix_rt.train.world_text import (
    Question,
    caption,
    caption_question,
    full_request,
    inventory,
    inventory_question,
    prompt,
)

# Distances of special ids to <|endoftext|>, as in the release's vocabulary.
MESSAGE_END = 2


@dataclass(frozen=True)
class Document:
    """One training sequence.

    ids: one id per position, placeholders for codes. codes: int64 [n, N] rows of the placeholders,
    ids of the unified vocabulary. counted: the positions whose blocks the loss predicts.
    """

    ids: list[int]
    codes: Tensor
    counted: list[bool]

    def counting_all(self) -> Document:
        """The same document with every position counted but the first, which nothing predicts."""
        return replace(self, counted=[False] + [True] * (len(self.ids) - 1))


def completion_mask(ids: Sequence[int], header: Sequence[int], message_end: int) -> list[bool]:
    """Positions of the assistant's own blocks: after each header, up to and including the end of
    the message and the newline behind it. The last position of the sequence never counts."""
    header = list(header)
    mask = [False] * len(ids)
    position = 0
    while position < len(ids):
        if list(ids[position : position + len(header)]) != header:
            position += 1
            continue
        position += len(header)
        while position < len(ids):
            mask[position] = True
            position += 1
            if ids[position - 1] == message_end:
                if position < len(ids):
                    mask[position] = True
                break
    if mask:
        mask[-1] = False
    return mask


class ChatBuilder:
    """Turns scenes into documents with the checkpoint's own tokenizer, template and markers.

    processor: with the position markers that stand in prompts and drawings alike.
    """

    def __init__(self, processor: ChatProcessor, config: QwenConfig) -> None:
        if config.pad_token_id is None or config.image_token_id is None:
            raise ConfigError("ChatBuilder: qwen_config needs pad_token_id and image_token_id")
        self._text = processor.text
        self._processor = processor
        self._num_codes = config.n_q_tokens
        self._image_id = config.image_token_id
        self._end_of_text = config.pad_token_id
        self._message_end = config.pad_token_id + MESSAGE_END
        self._header = processor.assistant_header
        start, end = config.vision_start_token_id, config.vision_end_token_id
        if start is None or end is None:
            raise ConfigError("ChatBuilder: qwen_config needs vision_start and vision_end ids")
        self._limits = start, end
        self.image = "".join(map(processor.text.token, (start, self._image_id, end)))

    def chat(
        self,
        turns: Sequence[tuple[str, str]],
        pictures: Sequence[CodedPicture] = (),
    ) -> Document:
        """A chat of (role, content) turns, content with `self.image` once per picture in order.

        Only the assistant's own words and pictures count.
        """
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = self._text.encode(self._text.render(messages, add_generation_prompt=False))
        document = self._document(ids, pictures)
        return replace(
            document, counted=completion_mask(document.ids, self._header, self._message_end)
        )

    def plain(self, text: str, pictures: Sequence[CodedPicture] = ()) -> Document:
        """Text (with `self.image` per picture) outside of any chat; every position counts."""
        return self._document(self._text.encode(text), pictures)

    def _document(self, ids: list[int], pictures: Sequence[CodedPicture]) -> Document:
        remaining = iter(pictures)
        expanded: list[int] = []
        for id_ in ids:
            if id_ == self._image_id:
                expanded += self._processor.image_ids(next(remaining).grid)
            else:
                expanded.append(id_)
        if next(remaining, None) is not None:
            raise ValueError(f"ChatBuilder: {len(pictures)} pictures for fewer places in the text")
        expanded.append(self._end_of_text)
        rows = [picture.ids for picture in pictures]
        codes = torch.cat(rows) if rows else torch.empty(0, self._num_codes, dtype=torch.int64)
        return Document(expanded, codes, []).counting_all()

    def answers(self, picture: CodedPicture, asked: Sequence[Question]) -> Document:
        """Questions about one picture, one turn each; the first one carries the picture."""
        turns = []
        for number, question in enumerate(asked):
            content = self.image + question.text if number == 0 else question.text
            turns += [("user", content), ("assistant", question.answer)]
        return self.chat(turns, [picture])

    def codes_of_image(self, document: Document) -> list[bool]:
        """Which positions from vision_start to vision_end of its first image are codes."""
        begin, end = (document.ids.index(id_) for id_ in self._limits)
        return [id_ == self._image_id for id_ in document.ids[begin : end + 1]]

    def lines(self, shown: CodedPicture | str, asked: Sequence[Question]) -> Document:
        """The same without a chat, a line per question: a third of the positions, and the answer
        stands right behind its question. Only the answers count."""
        front, pictures = (shown, []) if isinstance(shown, str) else (self.image, [shown])
        document = self._document(self._text.encode(front + "\n"), pictures)
        ids, counted = document.ids[:-1], [False] * (len(document.ids) - 1)
        for question in asked:
            for text, counts in ((question.text, False), (f" {question.answer}\n", True)):
                piece = self._text.encode(text)
                ids += piece
                counted += [counts] * len(piece)
        return Document([*ids, self._end_of_text], document.codes, [*counted, False])


Task = Callable[[ChatBuilder, Subject, random.Random], Document]


def _text(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    sample = text_sample(rng)
    return chats.chat([("user", sample.text), ("assistant", sample.answer)])


def _told(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """The scene in words alone, with questions: what a language model brings along."""
    return chats.lines(inventory(subject.scene), _some(subject.scene, rng, 12))


def _shown(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """The same about a picture."""
    return chats.lines(subject.seen(rng), _some(subject.scene, rng, 12))


def _strange(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """`_shown` of things with odd colours, or else odd shapes."""
    scene, picture = subject.stranger()
    return chats.lines(picture, _some(scene, rng, 12))


def _strange_questions(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """The same as a chat."""
    scene, picture = subject.stranger()
    return chats.answers(picture, _some(scene, rng, 8))


def _pair(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """Interleaved picture and caption, in either order."""
    parts = [chats.image, caption(subject.scene, rng)]
    if rng.random() < 0.5:
        parts.reverse()
    return chats.plain("\n".join(parts), [subject.drawing()])


def _told_relations(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """`_told` with what is learned last: how things lie to each other, where they do."""
    return chats.lines(inventory(subject.scene), _relations(subject.scene, rng, 8))


def _shown_relations(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """The same about a picture."""
    return chats.lines(subject.seen(rng), _relations(subject.scene, rng, 8))


def _caption(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    asked = Question("caption", caption_question(rng), caption(subject.scene, rng))
    return chats.answers(subject.seen(rng), [asked])


def _inventory(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """Every object with its place: the most words about a picture that one document can hold."""
    asked = [Question("inventory", inventory_question(rng), inventory(subject.scene))]
    return chats.answers(subject.seen(rng), asked)


def _questions(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    return chats.answers(subject.seen(rng), _some(subject.scene, rng, 8))


def _one_question(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    return chats.answers(subject.seen(rng), _some(subject.scene, rng, 1))


def _relation_questions(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    return chats.answers(subject.seen(rng), _relations(subject.scene, rng, 6))


def _strange_relations(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """`_relation_questions` about odd things: knowing by heart which shapes lie how is no help."""
    scene, picture = subject.stranger()
    return chats.answers(picture, _relations(scene, rng, 6))


def _draw(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    return drawing(chats, prompt(subject.scene, rng).text, subject.answer())


def _draw_exactly(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """The same when every place is told: which words a code hangs on is then never a guess."""
    return drawing(chats, full_request(subject.scene, rng), subject.answer())


def _draw_odd(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """A request for odd things, of which what is odd is told more often than not."""
    scene, picture = subject.odd_answer()
    if rng.random() < 0.2:
        scene = unnamed(scene)
    wanted = full_request(scene, rng) if rng.random() < 0.5 else prompt(scene, rng).text
    return drawing(chats, wanted, picture)


def drawing(chats: ChatBuilder, request: str, picture: CodedPicture) -> Document:
    """A request and the picture that answers it."""
    return chats.chat([("user", request), ("assistant", chats.image)], [picture])


def _some(scene: Scene, rng: random.Random, most: int) -> list[Question]:
    known = list(dict.fromkeys((*questions(scene, rng), *questions(scene, rng))))
    return rng.sample(known, min(most, len(known)))


def _relations(scene: Scene, rng: random.Random, most: int) -> list[Question]:
    """Questions about relations as far as the scene has any, else any questions."""
    known = [question for _ in range(most) for question in questions(scene, rng)]
    related = [question for question in known if question.kind == "relation"]
    return list(dict.fromkeys(related or known))[:most]


TASKS: Mapping[str, Task] = {
    "text": _text,
    "told": _told,
    "shown": _shown,
    "strange": _strange,
    "strange questions": _strange_questions,
    "told relations": _told_relations,
    "shown relations": _shown_relations,
    "pair": _pair,
    "caption": _caption,
    "inventory": _inventory,
    "questions": _questions,
    "relation questions": _relation_questions,
    "strange relations": _strange_relations,
    "one_question": _one_question,
    "draw": _draw,
    "draw exactly": _draw_exactly,
    "draw odd": _draw_odd,
}
