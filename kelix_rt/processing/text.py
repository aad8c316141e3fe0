"""The checkpoint's text tokenizer and chat template, and decoding as a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from kelix_rt.errors import ConfigError, InputError

# One of these must be there; transformers' own message for an empty directory names a web site.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Where processors of older checkpoints keep the template; transformers' tokenizers do not look.
TEMPLATE_FILE = "chat_template.json"
PROBE = "probe"


class TextTokenizer:
    """A transformers tokenizer, reduced to what the runtime needs of it.

    vocab_size: the model's count of text ids; ids from there on are image codes and never text,
    whatever the tokenizer says. None takes the tokenizer's own count.
    """

    def __init__(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        known = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.vocab_size = known if vocab_size is None else min(known, vocab_size)
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            id_ for id_, token in added if token.special
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        trust_remote_code: bool = False,
        vocab_size: int | None = None,
    ) -> TextTokenizer:
        """Load the tokenizer in directory `path`, from its files alone.

        trust_remote_code: True lets Python code that lies in the directory run; off by default.
        Raises ConfigError if the directory holds no tokenizer files or they cannot be loaded.
        """
        directory = Path(path)
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            raise ConfigError(
                f"TextTokenizer: {directory} holds no tokenizer: expected one of "
                f"{', '.join(TOKENIZER_FILES)}; copy the tokenizer files of the checkpoint there"
            )
        # Importing transformers takes a second; users of images alone do without.
        from transformers import AutoTokenizer, PretrainedConfig

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory),
                # Else config.json is read, which transformers cannot: it holds Kelix's "__class__".
                config=PretrainedConfig(),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
            )
        except Exception as error:  # tokenizers raises plain Exception for a broken tokenizer.json
            raise ConfigError(f"TextTokenizer: {directory} cannot be loaded: {error}") from error
        if not tokenizer.chat_template and (directory / TEMPLATE_FILE).is_file():
            tokenizer.chat_template = _read_template(directory / TEMPLATE_FILE)
        return cls(tokenizer, vocab_size)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; special tokens written in it become their single ids.

        Raises InputError for half a surrogate pair, which is no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text must be Unicode, got half a surrogate pair at character {error.start}"
            ) from error
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens and ids that are no text (image codes)."""
        return self._decode([id_ for id_ in ids if self.is_text(id_)])

    def is_text(self, id_: int) -> bool:
        """True for an id that decodes to text: in the vocabulary and not a special token."""
        return 0 <= id_ < self.vocab_size and id_ not in self.special_ids

    def token(self, id_: int) -> str:
        """How the token `id_` is written. Raises ConfigError if the tokenizer has no such id."""
        text = self.tokenizer.convert_ids_to_tokens(id_) if 0 <= id_ < self.vocab_size else None
        if text is None:
            raise ConfigError(
                f"TextTokenizer: id {id_} is not in the tokenizer ({self.vocab_size} tokens); "
                "model and tokenizer do not belong together"
            )
        return str(text)

    def token_id(self, token: str) -> int:
        """The id of the single token `token`. Raises ConfigError if there is none."""
        id_ = self.tokenizer.get_vocab().get(token)
        if id_ is None:
            raise ConfigError(f"TextTokenizer: the tokenizer has no token {token!r}")
        return int(id_)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """The chat template applied to `messages` (role, content and what else it reads).

        `options` are handed to the template. Raises InputError where the template rejects the
        messages, ConfigError if the checkpoint has no template.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "TextTokenizer: the checkpoint has no chat template; add chat_template.jinja to it"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **options,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"messages: the chat template rejects them: {error}") from error

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the chat template reads content as a list of parts alone: it loses a string."""
        return not self._writes(PROBE) and self._writes([{"type": "text", "text": PROBE}])

    def stream(self) -> StreamDecoder:
        """A fresh decoder for one request; see `StreamDecoder`."""
        return StreamDecoder(self)

    def _writes(self, content: Any) -> bool:
        try:
            return PROBE in self.render([{"role": "user", "content": content}])
        except InputError:
            return False

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _read_template(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["chat_template"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"TextTokenizer: {file} must hold a JSON object with a chat_template"
        ) from error


class StreamDecoder:
    """Text of a growing sequence of blocks, given the first id of each.

    A character whose bytes are spread over several tokens is held back until it is complete, so
    the pieces never hold half a character and join up to the text of all ids. Special tokens and
    image codes give no text.
    """

    def __init__(self, text: TextTokenizer) -> None:
        self._text = text
        self._context: list[int] = []  # decoded already; tokenizers may look at what is in front
        self._pending: list[int] = []
        self._given = 0  # characters of the pending ids' text that were handed out

    def push(self, id_: int) -> str:
        """Take the next block's first id; return the new text, which may be empty."""
        if not self._text.is_text(id_):
            return ""
        self._pending.append(id_)
        new = self._new_text()
        if new.endswith("\ufffd"):  # an incomplete character at the end shows as one U+FFFD
            self._given += len(new) - 1
            return new[:-1]
        self._settle()
        return new

    def finish(self) -> str:
        """What was held back; bytes that never became a character show as U+FFFD."""
        new = self._new_text() if self._pending else ""
        self._settle()
        return new

    def _new_text(self) -> str:
        before = len(self._text._decode(self._context)) + self._given
        return self._text._decode(self._context + self._pending)[before:]

    def _settle(self) -> None:
        if self._pending:
            self._context, self._pending, self._given = self._pending, [], 0
