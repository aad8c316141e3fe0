"""The routes: answers are those of the engine, errors are told and cost nobody else anything."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from kelix_rt import Engine, RenderParams, SamplingParams
from kelix_rt.processing import ImageProcessor
from kelix_rt.serve.protocol import ChatBody
from tests.serve.conftest import NAME, client_of, wait_until_idle

CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"
HELLO = [{"role": "user", "content": "Hello"}]


def picture_url() -> str:
    buffer = io.BytesIO()
    pixels = np.arange(56 * 56 * 3, dtype=np.uint8).reshape(56, 56, 3)
    Image.fromarray(pixels).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chunks(lines: Iterator[str]) -> list[Any]:
    """The objects of server-sent events, of which the last must be the mark of the end."""
    sent = [line.removeprefix("data: ") for line in lines if line]
    assert sent.pop() == "[DONE]"
    return [json.loads(each) for each in sent]


def test_chat_answers_as_the_engine(client: httpx.Client, engine: Engine) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": picture_url()}},
        {"type": "text", "text": "What is this?"},
    ]
    messages = [{"role": "user", "content": content}]
    body = {"model": NAME, "messages": messages, "seed": 3, "top_k": 20, "max_tokens": 12}
    body |= {"stop": None, "n": 1, "frequency_penalty": 0.0, "response_format": {"type": "text"}}
    body |= {"tools": [], "logit_bias": {}, "stream_options": {"include_usage": None}}
    expected = engine.chat(messages, SamplingParams(seed=3, top_k=20, max_blocks=12))
    answer = client.post(CHAT, json=body).json()  # from here on the engine is the server's
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert answer["model"] == NAME
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == expected.finish_reason
    assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_blocks
    assert answer["usage"]["completion_tokens"] == expected.usage.generated_blocks


def test_chat_streams_the_same_text(client: httpx.Client) -> None:
    body = {"messages": HELLO, "seed": 5, "max_completion_tokens": 20}
    whole = client.post(CHAT, json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", CHAT, json={**body, **options}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        first, *rest, usage = chunks(response.iter_lines())
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in rest)
    assert text == whole["choices"][0]["message"]["content"]
    assert len(rest) > 2
    reasons = [each["choices"][0]["finish_reason"] for each in rest]
    assert reasons == [None] * (len(rest) - 1) + [whole["choices"][0]["finish_reason"]]
    assert (usage["choices"], usage["usage"]["total_tokens"]) == (
        [],
        whole["usage"]["total_tokens"],
    )
    assert {each["id"] for each in (first, *rest, usage)} == {first["id"]}


def test_pictures_are_those_of_the_engine(client: httpx.Client, engine: Engine) -> None:
    expected = [
        engine.generate_image("a red circle", render=RenderParams(steps=3, seed=seed)).image
        for seed in (7, 8)
    ]
    body = {"prompt": "a red circle", "n": 2, "seed": 7, "steps": 3}
    answer = client.post(IMAGES, json=body).json()
    assert [each["seed"] for each in answer["data"]] == [7, 8]
    for each, image in zip(answer["data"], expected, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))) as found:
            assert answer["size"] == f"{found.width}x{found.height}"
            np.testing.assert_array_equal(np.asarray(found), np.asarray(image))


def test_requests_of_several_clients_share_steps(client: httpx.Client) -> None:
    bodies = [{"messages": HELLO, "seed": seed, "max_tokens": 30} for seed in range(6)]
    alone = [client.post(CHAT, json=body).json()["choices"] for body in bodies]
    before = client.get("/stats").json()
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: client.post(CHAT, json=body).json(), bodies))
    after = client.get("/stats").json()
    assert [each["choices"] for each in together] == alone
    blocks, steps = (after[name] - before[name] for name in ("blocks", "block_steps"))
    assert steps < blocks


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (CHAT, {"messages": HELLO, "model": "other"}, 404, "'other' is not served here"),
        (CHAT, {}, 400, "messages: Field required"),
        (CHAT, {"messages": HELLO, "n": 2}, 400, "n: Input should be 1"),
        (CHAT, {"messages": HELLO, "stop": ["x"]}, 400, "stop: List should have at most 0 items"),
        (CHAT, {"messages": HELLO, "top_p": 0}, 400, r"top_p must be a number in \(0.0, 1.0\]"),
        (CHAT, {"messages": HELLO, "best_of": 2}, 400, "best_of: Extra inputs are not permitted"),
        (CHAT, {"messages": HELLO, "presence_penalty": 0.5}, 400, "presence_penalty: Input should"),
        (
            CHAT,
            {"messages": HELLO, "chat_template_kwargs": {"chat_template": "x"}},
            400,
            "chat_template is the server's to choose",
        ),
        (
            CHAT,
            {"messages": HELLO, "chat_template_kwargs": {"messages": []}},
            400,
            r"\['messages'\] are set by the engine",
        ),
        (CHAT, {"messages": []}, 400, "expected at least one message"),
        (CHAT, {"messages": HELLO, "max_tokens": 10**8}, 400, "max_model_len"),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}
                ]
            },
            400,
            "reading files is switched off",
        ),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "http://\ud800"}]}
                ]
            },
            400,
            "is a web address",
        ),
        (IMAGES, {"prompt": ""}, 400, "empty"),
        (IMAGES, {"prompt": "a", "size": "12"}, 400, "WIDTHxHEIGHT"),
        (IMAGES, {"prompt": "a", "size": "60000x60000"}, 400, "max_drawn_pixels"),
        (
            IMAGES,
            {"prompt": "a", "size": "64x16400", "output_format": "webp"},
            400,
            "a webp has at most 16383 pixels",
        ),
        (IMAGES, {"prompt": "a", "steps": 0}, 400, "steps"),
        (IMAGES, {"prompt": "a", "n": 17}, 400, "n: Input should be less than or equal to 16"),
        (IMAGES, {"prompt": "a", "response_format": "url"}, 400, "response_format: Input should"),
    ],
)
def test_bad_input_is_told(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    for streamed in (False, True) if path == CHAT else (False,):
        sent = json.dumps({**body, "stream": True} if streamed else body)
        answer = client.post(path, content=sent, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert re.search(message, error["message"])
    assert client.get("/health").status_code == 200


def test_a_body_that_is_no_json(client: httpx.Client) -> None:
    answer = client.post(CHAT, content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "JSON" in answer.json()["error"]["message"]


def test_models_health_and_unknown_routes(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == NAME
    assert client.get(f"/v1/models/{NAME}").json() == model
    assert client.get("/health").json() == {"status": "ok"}
    for unknown in ("/v1/models/owner/other", "/v1/nothing"):
        answer = client.get(unknown)
        assert (answer.status_code, answer.json()["error"]["type"]) == (
            404,
            "invalid_request_error",
        )
    assert client.get(CHAT).json()["error"]["message"] == "Method Not Allowed"


def test_many_small_pictures_are_refused_before_they_are_cut_up(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[Image.Image] = []
    patchify = ImageProcessor.patchify

    def counted(self: ImageProcessor, image: Image.Image) -> Any:
        cut.append(image)
        return patchify(self, image)

    monkeypatch.setattr(ImageProcessor, "patchify", counted)
    part = {"type": "image_url", "image_url": {"url": picture_url()}}
    body = {"messages": [{"role": "user", "content": [part] * 1000}]}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 400
    assert "max_model_len is 512; send fewer" in answer.json()["error"]["message"]
    assert sum(image.width * image.height for image in cut) <= 512 * 28 * 28


def test_the_developer_is_the_system(client: httpx.Client) -> None:
    def ask(role: str) -> Any:
        messages = [{"role": role, "content": "Be brief"}, *HELLO]
        return client.post(CHAT, json={"messages": messages, "seed": 1}).json()["choices"]

    assert ask("developer") == ask("system")


def test_more_requests_than_are_taken(engine: Engine) -> None:
    with client_of(engine, max_requests=2) as client:
        answer = client.post(IMAGES, json={"prompt": "a", "n": 3, "steps": 1})
        assert answer.status_code == 400
        assert "n must be at most 2 here" in answer.json()["error"]["message"]
        for n, statuses in ((1, {200}), (2, {200, 429})):
            body = {"prompt": "a", "n": n, "steps": 30}
            with ThreadPoolExecutor(2) as pool:
                answers = list(pool.map(lambda _: client.post(IMAGES, json=body), range(2)))  # noqa: B023
            assert {answer.status_code for answer in answers} == statuses


def test_an_error_in_the_middle_of_a_stream_is_its_last_chunk(
    client: httpx.Client,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = engine.runner.blocks.launch

    def failing(plan: Any, after: Any = None) -> Any:
        if any(one.generated == 3 for one in plan.sequences):
            raise MemoryError("none left")
        return run(plan, after)

    monkeypatch.setattr(engine.runner.blocks, "launch", failing)
    body = {"messages": HELLO, "seed": 5, "max_tokens": 20}
    with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        *_, last = chunks(response.iter_lines())
    assert last["error"]["message"] == "MemoryError: none left"
    assert "none left" in caplog.text
    assert client.post(CHAT, json=body).status_code == 500
    monkeypatch.undo()
    assert client.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(
    slow_engine: Engine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    sampling = SamplingParams(0.0, max_blocks=400, ignore_eos=True)
    monkeypatch.setattr(ChatBody, "sampling", lambda _: sampling)
    before = slow_engine.stats().blocks
    with client_of(slow_engine) as client:
        body = {"messages": HELLO, "stream": stream}
        if stream:
            with client.stream("POST", CHAT, json=body) as response:
                assert next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(CHAT, json=body, timeout=httpx.Timeout(60, read=0.5))
        wait_until_idle(slow_engine)
        assert client.get("/health").json() == {"status": "ok"}
    assert slow_engine.stats().blocks - before < 400
