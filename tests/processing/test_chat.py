"""ChatProcessor: prompts of the golden model, image expansion, and errors that name the part."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kelix_rt.config import QwenConfig
from kelix_rt.errors import ConfigError, InputError
from kelix_rt.processing import ChatProcessor, ImageProcessor, PositionMarkers, TextTokenizer
from kelix_rt.processing.chat import image_prompt

TINY = Path(__file__).parents[1] / "golden" / "llm" / "tiny_a"
TEXT = TextTokenizer.from_pretrained(TINY, vocab_size=640)
START, PAD, END = 356, 359, 357
SYSTEM = TEXT.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
HEADER = [348, 77, 98]


@dataclass(frozen=True)
class Ids:
    image_token_id: int | None = PAD
    vision_start_token_id: int | None = START
    vision_end_token_id: int | None = END


def processor(**options: Any) -> ChatProcessor:
    return ChatProcessor(TEXT, ImageProcessor.from_pretrained(TINY), Ids(), **options)


def red(width: int = 112, height: int = 56) -> Image.Image:
    return Image.new("RGB", (width, height), "red")


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_text_prompts() -> None:
    expected = [*SYSTEM, 348, 72, 98, *TEXT.encode("Hello you"), 349, 98, *HEADER]
    plain = processor().encode([{"role": "user", "content": "Hello you"}])
    assert plain.ids == expected and plain.images == []
    assert processor().encode(user(text("Hello"), text(" you"))).ids == expected
    bare = processor().encode(user(text("Hello you")), add_generation_prompt=False)
    assert bare.ids == expected[:-3]


def test_images_are_expanded_in_place() -> None:
    big, small = red(112, 56), red(56, 56)
    prompt = processor().encode(
        user(
            {"type": "image", "image": big},
            text("Describe"),
            {"type": "image", "image": small},
        )
    )
    picture = [START, *[PAD] * 8, END, *TEXT.encode("Describe"), START, *[PAD] * 4, END]
    assert prompt.ids == [*SYSTEM, 348, 72, 98, *picture, 349, 98, *HEADER]
    images = ImageProcessor.from_pretrained(TINY)
    for (values, grid), image in zip(prompt.images, (big, small), strict=True):
        expected_values, expected_grid = images.preprocess(image)
        assert torch.equal(values, expected_values) and torch.equal(grid, expected_grid)
    assert prompt.ids.count(PAD) == sum(images.num_tokens(grid) for _, grid in prompt.images)


def test_image_urls() -> None:
    buffer = io.BytesIO()
    red().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    expected = processor().encode(user({"type": "image", "image": red()}))
    for value in ({"url": url, "detail": "low"}, url):
        got = processor(allow_files=False).encode(user({"type": "image_url", "image_url": value}))
        assert got.ids == expected.ids
        assert torch.equal(got.images[0][0], expected.images[0][0])


def test_resize_limits_of_a_part() -> None:
    part = {"type": "image", "image": red(112, 112)}
    assert processor().encode(user(part)).ids.count(PAD) == 16
    assert processor().encode(user(part | {"max_pixels": 3136})).ids.count(PAD) == 4
    sized = part | {"resized_height": 56, "resized_width": 84}
    assert processor().encode(user(sized)).ids.count(PAD) == 6


def test_markers_in_front_of_every_row() -> None:
    markers = PositionMarkers(386, 387, "{row}/{rows}")
    prompt = processor(markers=markers).encode(user({"type": "image", "image": red(112, 56)}))
    rows = [[386, *TEXT.encode(f"{row}/2"), 387, *[PAD] * 4] for row in range(2)]
    at = prompt.ids.index(START)
    assert prompt.ids[at : prompt.ids.index(END) + 1] == [START, *rows[0], *rows[1], END]


def test_markers_take_as_many_positions_as_in_the_release() -> None:
    ids = processor(markers=PositionMarkers(386, 387)).image_ids((1, 36, 36))
    assert ids.count(PAD) == 324 and ids.count(386) == ids.count(387) == 18
    assert 2 + len(ids) == 442
    assert processor().image_ids(torch.tensor([[1, 36, 36]])) == [PAD] * 324


@pytest.mark.parametrize("template", ["{column}", "{row", "{}", "{row:zz}", "{row!q}"])
def test_bad_marker_templates(template: str) -> None:
    with pytest.raises(ConfigError, match="template"):
        PositionMarkers(386, 387, template)


def test_image_prompts_end_with_vision_start() -> None:
    ids = processor().encode_image_prompt("Draw a red circle")
    turn = [348, 72, 98, *TEXT.encode("Draw a red circle"), 349, 98]
    assert ids == [*SYSTEM, *turn, *HEADER, START]


def test_image_prompts_are_cut_after_the_first_assistant_header(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    template = (TINY / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template + "{{ 'What<|vision_start|>' }}")
    chat = ChatProcessor(TextTokenizer.from_pretrained(tmp_path), ImageProcessor(), Ids())
    assert chat.encode(user(text("A"))).ids[-4:] == [77, 98, *TEXT.encode("What"), START]
    assert chat.encode_image_prompt("A")[-4:] == [*HEADER, START]
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|vision_start|>")
    headless = ChatProcessor(TextTokenizer.from_pretrained(tmp_path), ImageProcessor(), Ids())
    assert headless.encode_image_prompt("A") == [*TEXT.encode("A"), START]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("Hello", "expected a list, got str"),
        ({"role": "user"}, "expected a list, got dict"),
        (["Hello"], r"messages\[0\]: expected an object"),
        ([{"role": "wizard", "content": "x"}], r"messages\[0\]\.role: .*'wizard'"),
        ([{"content": "x"}], r"messages\[0\]\.role: .*None"),
        ([{"role": "user"}], r"messages\[0\]\.content: expected a string or a list"),
        ([{"role": "user", "content": " \n"}], r"messages\[0\]\.content: is empty"),
        (user(), r"messages\[0\]\.content: is empty"),
        (user(text("")), r"messages\[0\]\.content: is empty"),
        (user(text("x"), "y"), r"messages\[0\]\.content\[1\]: expected an object"),
        (user({"type": "text"}), r"content\[0\]\.text: expected a string, got None"),
        (user({"type": "video", "video": 1}), r"content\[0\]\.type: .*'video'"),
        (user({"type": "image"}), r"content\[0\]\.image: is missing"),
        (user({"type": "image_url", "image_url": {}}), r"content\[0\]\.image_url\.url: is missing"),
        (user({"type": "image", "image": b""}), r"messages\[0\]\.content\[0\]: .*empty"),
        (user({"type": "image", "image": 3}), r"messages\[0\]\.content\[0\]: .*got int"),
        (
            user({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}),
            r"messages\[0\]\.content\[0\]: .*the caller's job",
        ),
        (
            user({"type": "image", "image": red(), "max_pixels": "many"}),
            r"content\[0\]\.max_pixels: must be a positive integer",
        ),
        (
            user({"type": "image", "image": red(), "max_pixels": 10**400}),
            r"content\[0\]\.max_pixels: must be a positive integer below",
        ),
        (user(text("half \ud800 of it")), "half a surrogate pair at character"),
        (
            user({"type": "image", "image": red(), "resized_width": 56}),
            r"resized_height and resized_width must be given together",
        ),
        (
            user({"type": "image", "image": red(), "min_pixels": 10**9}),
            r"messages\[0\]\.content\[0\]: .*must hold",
        ),
        (
            [*user(text("x")), {"role": "user", "content": "see <|image_pad|>"}],
            r"messages\[1\]\.content: the text contains the image placeholder",
        ),
    ],
)
def test_bad_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        processor().encode(messages)


def test_files_can_be_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    red().save(path)
    messages = user({"type": "image", "image": str(path)})
    assert len(processor().encode(messages).images) == 1
    with pytest.raises(InputError, match=r"messages\[0\]\.content\[0\]: .*switched off"):
        processor(allow_files=False).encode(messages)


def templated(directory: Path, template: str) -> TextTokenizer:
    """The golden model's tokenizer with another chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TINY / name).read_bytes())
    (directory / "chat_template.jinja").write_text(template)
    return TextTokenizer.from_pretrained(directory, vocab_size=640)


PARTS = """{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'text' %}{{- part['text'] }}{%- endif %}
{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def test_templates_that_read_parts_get_parts(tmp_path: Path) -> None:
    """The same prompt as from a template that reads strings, which loses none of it."""
    text_of_parts = templated(tmp_path, PARTS)
    assert text_of_parts.takes_parts and not TEXT.takes_parts
    chat = ChatProcessor(text_of_parts, ImageProcessor.from_pretrained(TINY), Ids())
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        *user({"type": "image", "image": red()}, text("Describe"), text(" it")),
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and now"},
    ]
    assert chat.encode(messages).ids == processor().encode(messages).ids


def test_what_else_messages_hold_reaches_the_template(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{{ m.tool_calls }};{% endfor %}"
    )
    chat = ChatProcessor(templated(tmp_path, template), ImageProcessor(), Ids())
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "two and two"},
        {"role": "assistant", "content": None, "tool_calls": ["add"]},
        {"role": "tool", "content": "4"},
    ]
    written = chat.encode(messages).ids
    assert written == TEXT.encode("system:;user:two and two;assistant:['add'];tool:4;")


def test_an_image_the_template_drops_is_an_error(tmp_path: Path) -> None:
    chat = ChatProcessor(
        templated(tmp_path, "{{ messages[-1]['content'] }}"), ImageProcessor(), Ids()
    )
    messages = [*user({"type": "image", "image": red()}), *user(text("What"))]
    with pytest.raises(InputError, match=r"0 image placeholders for 1 images \(messages\[0\]"):
        chat.encode(messages)


def test_empty_image_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="is empty"):
        processor().encode_image_prompt("")


def test_models_without_images() -> None:
    chat = ChatProcessor(TEXT, ImageProcessor(), Ids(image_token_id=None))
    assert chat.encode(user(text("Hello"))).images == []
    with pytest.raises(InputError, match=r"content\[0\]: this model takes no images"):
        chat.encode(user({"type": "image", "image": red()}))
    with pytest.raises(ConfigError, match="image_token_id is null"):
        chat.image_ids((1, 2, 2))
    blind = ChatProcessor(TEXT, ImageProcessor(), Ids(vision_start_token_id=None))
    with pytest.raises(ConfigError, match="cannot draw"):
        blind.encode_image_prompt("Draw")


def test_ids_must_be_the_tokenizers() -> None:
    foreign = dataclasses.replace(Ids(), image_token_id=151655)
    with pytest.raises(ConfigError, match="id 151655 is not in the tokenizer"):
        ChatProcessor(TEXT, ImageProcessor(), foreign)


def test_the_models_config_serves_as_ids() -> None:
    config = QwenConfig.from_json(json.loads((TINY / "config.json").read_text())["qwen_config"])
    chat = ChatProcessor(TEXT, ImageProcessor(), config)
    assert chat.encode_image_prompt("Draw")[-1] == START


@pytest.mark.parametrize(
    ("ids", "want"),
    [
        ([7, 1, 2, 3], [7, 1, 2, 3, START]),
        ([7, 1, 2, 3, START], [7, 1, 2, 3, START]),
        ([7, 1, 2, 3, 9, 1, 2, 3], [7, 1, 2, 3, START]),
        ([7, 1, 2], [7, 1, 2, START]),
        ([], [START]),
    ],
)
def test_prompt_is_cut_at_the_first_assistant_turn(ids: list[int], want: list[int]) -> None:
    assert image_prompt(ids, [1, 2, 3], START) == want
