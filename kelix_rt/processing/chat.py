"""Chat messages to prompt ids: template, image placeholders, position markers."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from kelix_rt.errors import ConfigError, InputError
from kelix_rt.processing.images import ImageProcessor
from kelix_rt.processing.text import TextTokenizer

ROLES = ("system", "user", "assistant", "tool")
ASSISTANT_HEADER = "<|im_start|>assistant\n"
MARKER_FIELDS = ("row", "rows", "cols")
PIXELS_LIMIT = 1 << 40  # beyond it the arithmetic of sizes is no longer exact


class SpecialIds(Protocol):
    """The ids a prompt is built from; `QwenConfig` is one."""

    @property
    def image_token_id(self) -> int | None: ...
    @property
    def vision_start_token_id(self) -> int | None: ...
    @property
    def vision_end_token_id(self) -> int | None: ...


@dataclass(frozen=True)
class PositionMarkers:
    """Text markers in front of every row of image tokens: start id, coordinates, end id.

    template: the coordinates, over {row} (counted from 0), {rows} and {cols}. The default gives
    the 442 positions that an image of 18 x 18 tokens takes in the released model.
    """

    start_id: int
    end_id: int
    template: str = "{row},{cols}"

    def __post_init__(self) -> None:
        try:
            used = {name for _, name, _, _ in string.Formatter().parse(self.template)} - {None}
            if used <= set(MARKER_FIELDS):
                self.template.format(**dict.fromkeys(MARKER_FIELDS, 0))
        except ValueError as error:
            raise ConfigError(f"PositionMarkers: template is malformed: {error}") from error
        if not used <= set(MARKER_FIELDS):
            raise ConfigError(
                f"PositionMarkers: template may use the fields {', '.join(MARKER_FIELDS)}, got "
                f"{self.template!r}"
            )


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready for the model.

    ids: one id per position, every image expanded to vision_start, image ids, vision_end.
    images: (pixel_values float32 [N, 3, patch, patch], grid int64 [1, 3]) in order of appearance.
    """

    ids: list[int]
    images: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _ImagePart:
    source: Any
    options: dict[str, Any]
    where: str


class ChatProcessor:
    """Builds prompts with a checkpoint's tokenizer, chat template and image processor.

    ids: the model's config (`QwenConfig`); without an image_token_id, messages must be text.
    markers: position markers to put in front of each image row; None (default) for none.
    allow_files: False refuses local paths as images and rare formats, for messages that come from
    strangers. max_length: blocks of the longest prompt; pictures that do not fit are not cut up.

    Raises ConfigError if the ids are not those of the tokenizer.
    """

    def __init__(
        self,
        text: TextTokenizer,
        images: ImageProcessor,
        ids: SpecialIds,
        markers: PositionMarkers | None = None,
        allow_files: bool = True,
        max_length: int | None = None,
    ) -> None:
        self.text = text
        self.images = images
        self.markers = markers
        self.allow_files = allow_files
        self.max_length = max_length
        self.image_id = ids.image_token_id
        self.vision_start_id = ids.vision_start_token_id
        self.vision_end_id = ids.vision_end_token_id
        self.assistant_header = text.encode(ASSISTANT_HEADER)
        self._image_token, self._image_text = self._placeholder()

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> EncodedPrompt:
        """Prompt ids and pixel values of OpenAI-style messages.

        messages: mappings with `role` (system, user, assistant, tool) and `content`, a string or a
        list of parts: {"type": "text", "text": str}, {"type": "image", "image": source} with
        optional min_pixels, max_pixels or resized_height and resized_width, or
        {"type": "image_url", "image_url": {"url": str}}; sources as `load_image` takes them. An
        assistant's content may be None. Other fields (tool_calls, ...) go to the template as they
        are.
        add_generation_prompt: end with the assistant's header. template_options: handed to the
        chat template. Raises InputError naming the message index and the part.
        """
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
            raise InputError(f"messages: expected a list, got {type(messages).__name__}")
        if not messages:
            raise InputError("messages: expected at least one message, got none")
        parts: list[_ImagePart] = []
        plain = [self._plain(index, message, parts) for index, message in enumerate(messages)]
        prompt = self.text.render(plain, add_generation_prompt, **template_options)
        return self._expand(self.text.encode(prompt), parts)

    def encode_image_prompt(self, prompt: str) -> list[int]:
        """Ids that make the model draw: `prompt` as a user turn, as `image_prompt` cuts it. Raises
        InputError for an empty prompt."""
        return self.image_prompt(self.encode([{"role": "user", "content": prompt}]).ids)

    def image_prompt(self, ids: Sequence[int]) -> list[int]:
        """`image_prompt` with this checkpoint's header and vision_start.

        Raises ConfigError for a model that names no vision_start.
        """
        if self.vision_start_id is None:
            raise ConfigError("ChatProcessor: vision_start_token_id is null: it cannot draw")
        return image_prompt(ids, self.assistant_header, self.vision_start_id)

    def image_ids(self, grid: torch.Tensor | Sequence[int]) -> list[int]:
        """The ids between vision_start and vision_end for one image of grid (t, h, w), counted in
        patches: a placeholder per token, with the position markers in front of each row."""
        if self.image_id is None:
            raise ConfigError("ChatProcessor: image_token_id is null; this model takes no images")
        frames, height, width = torch.as_tensor(grid).reshape(3).tolist()
        rows, cols = frames * height // self.images.merge_size, width // self.images.merge_size
        ids: list[int] = []
        for row in range(rows):
            if self.markers is not None:
                coordinates = self.markers.template.format(row=row, rows=rows, cols=cols)
                ids += [self.markers.start_id, *self.text.encode(coordinates), self.markers.end_id]
            ids += [self.image_id] * cols
        return ids

    def _placeholder(self) -> tuple[str, str]:
        """The image token, and vision_start + image token + vision_end, as they are written."""
        wanted = [self.vision_start_id, self.image_id, self.vision_end_id]
        ids = [id_ for id_ in wanted if id_ is not None]
        if len(ids) != len(wanted):
            return "", ""
        tokens = [self.text.token(id_) for id_ in ids]
        if (got := self.text.encode("".join(tokens))) != ids:
            raise ConfigError(
                f"ChatProcessor: the image tokens {tokens} must encode to the config's ids {ids}, "
                f"got {got}; model and tokenizer do not belong together"
            )
        return tokens[1], "".join(tokens)

    def _plain(self, index: int, message: Any, images: list[_ImagePart]) -> dict[str, Any]:
        """The message as the chat template reads it, images as placeholders; collects images."""
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InputError(f"{where}: expected an object, got {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"{where}.role: must be one of {', '.join(ROLES)}, got {role!r}")
        if content is None and role == "assistant":
            content = ""
        if isinstance(content, str):
            parts = [{"type": "text", "text": self._checked(content, f"{where}.content")}]
        elif isinstance(content, (list, tuple)):
            parts = [
                self._part(f"{where}.content[{number}]", part, images)
                for number, part in enumerate(content)
            ]
        else:
            raise InputError(
                f"{where}.content: expected a string or a list of parts, got "
                f"{type(content).__name__}"
            )
        flat = "".join(part.get("text", self._image_text) for part in parts)
        if role == "user" and not flat.strip():
            raise InputError(f"{where}.content: is empty; write some text or add an image")
        return {**message, "content": parts if self.text.takes_parts else flat}

    def _part(self, where: str, part: Any, images: list[_ImagePart]) -> dict[str, str]:
        """The part as a chat template reads it; collects images."""
        if not isinstance(part, Mapping):
            raise InputError(f"{where}: expected an object, got {type(part).__name__}")
        kind = part.get("type")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise InputError(f"{where}.text: expected a string, got {part.get('text')!r}")
            return {"type": "text", "text": self._checked(part["text"], where)}
        if kind not in ("image", "image_url"):
            raise InputError(f"{where}.type: must be text, image or image_url, got {kind!r}")
        source = part.get(kind)
        if kind == "image_url" and isinstance(source, Mapping):
            source = source.get("url")
        if source is None:
            field = "image" if kind == "image" else "image_url.url"
            raise InputError(f"{where}.{field}: is missing")
        if not self._image_text:
            raise InputError(f"{where}: this model takes no images (image_token_id is null)")
        images.append(_ImagePart(source, _resize_options(part, where), where))
        return {"type": "image"}

    def _checked(self, text: str, where: str) -> str:
        if self._image_token and self._image_token in text:
            raise InputError(
                f"{where}: the text contains the image placeholder {self._image_token}; pass "
                "images as parts of type image instead"
            )
        return text

    def _expand(self, ids: list[int], parts: list[_ImagePart]) -> EncodedPrompt:
        found = 0 if self.image_id is None else ids.count(self.image_id)
        if found != len(parts):
            named = ", ".join(part.where for part in parts) or "none"
            raise InputError(
                f"messages: the chat template wrote {found} image placeholders for {len(parts)} "
                f"images ({named}); every image needs exactly one"
            )
        images, length = [], len(ids) - found
        for part in parts:
            image = self._load(part)
            length += image.width * image.height // self.images.factor**2
            if self.max_length is not None and length > self.max_length:
                raise InputError(
                    f"{part.where}: with this image the prompt has at least {length} blocks, "
                    f"max_model_len is {self.max_length}; send fewer or smaller ones"
                )
            images.append(self.images.patchify(image))
        pending: Iterator[tuple[torch.Tensor, torch.Tensor]] = iter(images)
        expanded: list[int] = []
        for id_ in ids:
            expanded += self.image_ids(next(pending)[1]) if id_ == self.image_id else [id_]
        return EncodedPrompt(expanded, images)

    def _load(self, part: _ImagePart) -> Image.Image:
        try:
            image = self.images.load_image(part.source, self.allow_files)
            return self.images.resize(image, **part.options)
        except InputError as error:
            raise InputError(f"{part.where}: {error}") from error


def _resize_options(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The part's own resize limits, as keyword arguments of `ImageProcessor.resize`."""
    names = ("min_pixels", "max_pixels", "resized_height", "resized_width")
    given = {name: part[name] for name in names if part.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < PIXELS_LIMIT:
            raise InputError(
                f"{where}.{name}: must be a positive integer below {PIXELS_LIMIT}, got "
                f"{repr(value)[:20]}"
            )
    height, width = given.pop("resized_height", None), given.pop("resized_width", None)
    if (height is None) != (width is None):
        raise InputError(f"{where}: resized_height and resized_width must be given together")
    return given if height is None else {"size": (height, width)}


def image_prompt(ids: Sequence[int], header: Sequence[int], vision_start: int) -> list[int]:
    """The prompt an image is generated from, as the release makes it.

    Cut right after the first occurrence of `header` (the ids that open an assistant turn; nothing
    is cut without one); vision_start is appended unless the prompt already ends with it.
    """
    prompt, opening = list(ids), list(header)
    for start in range(len(prompt) - len(opening) + 1):
        if opening and prompt[start : start + len(opening)] == opening:
            prompt = prompt[: start + len(opening)]
            break
    return prompt if prompt and prompt[-1] == vision_start else [*prompt, vision_start]
