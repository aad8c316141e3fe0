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
from kelix_rt.train.world_scene import Scene
from kelix_rt.train.world_text import Question, caption, caption_question, prompt

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

    processor: with the position markers that drawings are written with. prompt_markers: how often
    (0 to 1) the pictures of a user's message carry markers too; below 1 the model also reads
    prompts without them. end_of_text: closes every document.
    """

    def __init__(
        self, processor: ChatProcessor, config: QwenConfig, prompt_markers: float = 0.5
    ) -> None:
        if config.pad_token_id is None or config.image_token_id is None:
            raise ConfigError("ChatBuilder: qwen_config needs pad_token_id and image_token_id")
        self._text = processor.text
        self._marked = processor
        self._bare = ChatProcessor(processor.text, processor.images, config)
        self._prompt_markers = prompt_markers
        self._num_codes = config.n_q_tokens
        self._image_id = config.image_token_id
        self._end_of_text = config.pad_token_id
        self._message_end = config.pad_token_id + MESSAGE_END
        self._header = processor.assistant_header
        start, end = config.vision_start_token_id, config.vision_end_token_id
        if start is None or end is None:
            raise ConfigError("ChatBuilder: qwen_config needs vision_start and vision_end ids")
        self.image = "".join(map(processor.text.token, (start, self._image_id, end)))

    def chat(
        self,
        turns: Sequence[tuple[str, str]],
        pictures: Sequence[CodedPicture] = (),
        markers: bool = True,
    ) -> Document:
        """A chat of (role, content) turns, content with `self.image` once per picture in order.

        Only the assistant's own words and pictures count.
        """
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = self._text.encode(self._text.render(messages, add_generation_prompt=False))
        document = self._document(ids, pictures, markers)
        return replace(
            document, counted=completion_mask(document.ids, self._header, self._message_end)
        )

    def plain(self, text: str, pictures: Sequence[CodedPicture] = ()) -> Document:
        """Text (with `self.image` per picture) outside of any chat; every position counts."""
        return self._document(self._text.encode(text), pictures, True)

    def _document(
        self, ids: list[int], pictures: Sequence[CodedPicture], markers: bool
    ) -> Document:
        processor = self._marked if markers else self._bare
        remaining = iter(pictures)
        expanded: list[int] = []
        for id_ in ids:
            if id_ == self._image_id:
                expanded += processor.image_ids(next(remaining).grid)
            else:
                expanded.append(id_)
        if next(remaining, None) is not None:
            raise ValueError(f"ChatBuilder: {len(pictures)} pictures for fewer places in the text")
        expanded.append(self._end_of_text)
        rows = [picture.ids for picture in pictures]
        codes = torch.cat(rows) if rows else torch.empty(0, self._num_codes, dtype=torch.int64)
        return Document(expanded, codes, []).counting_all()

    def answers(
        self, picture: CodedPicture, asked: Sequence[Question], rng: random.Random
    ) -> Document:
        """Questions about one picture, one turn each; the first one carries the picture."""
        turns = []
        for number, question in enumerate(asked):
            content = self.image + question.text if number == 0 else question.text
            turns += [("user", content), ("assistant", question.answer)]
        return self.chat(turns, [picture], markers=rng.random() < self._prompt_markers)


Task = Callable[[ChatBuilder, Subject, random.Random], Document]


def _text(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    sample = text_sample(rng)
    return chats.chat([("user", sample.text), ("assistant", sample.answer)])


def _told(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """The scene in words alone: questions follow from the caption in front of them."""
    asked = [f"{question.text} {question.answer}" for question in _some(subject.scene, rng, 4)]
    return chats.plain("\n".join((caption(subject.scene, rng), *asked)))


def _pair(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    """Interleaved picture and caption, in either order."""
    parts = [chats.image, caption(subject.scene, rng)]
    if rng.random() < 0.5:
        parts.reverse()
    return chats.plain("\n".join(parts), [subject.drawing()])


def _caption(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    asked = Question("caption", caption_question(rng), caption(subject.scene, rng))
    return chats.answers(subject.seen(rng), [asked], rng)


def _questions(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    return chats.answers(subject.seen(rng), _some(subject.scene, rng, 8), rng)


def _one_question(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    return chats.answers(subject.seen(rng), _some(subject.scene, rng, 1), rng)


def _draw(chats: ChatBuilder, subject: Subject, rng: random.Random) -> Document:
    return drawing(chats, prompt(subject.scene, rng).text, subject.drawing())


def drawing(chats: ChatBuilder, request: str, picture: CodedPicture) -> Document:
    """A request and the picture that answers it."""
    return chats.chat([("user", request), ("assistant", chats.image)], [picture])


def _some(scene: Scene, rng: random.Random, most: int) -> list[Question]:
    known = questions(scene, rng)
    return rng.sample(known, min(most, len(known)))


TASKS: Mapping[str, Task] = {
    "text": _text,
    "told": _told,
    "pair": _pair,
    "caption": _caption,
    "questions": _questions,
    "one_question": _one_question,
    "draw": _draw,
}
