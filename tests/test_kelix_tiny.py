"""The bundled checkpoint: it loads as every other, agrees with itself, and sees and draws."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from kelix_rt import Engine, RenderParams, SamplingParams
from kelix_rt.assets import BUNDLED, bundled
from kelix_rt.models.language_model import KelixLM
from kelix_rt.request import Prompt
from kelix_rt.train.evaluate import Amounts, drawings, judged, reconstruction
from kelix_rt.train.export import MAX_BYTES, require_checkpoint_world
from kelix_rt.train.world import draw, make_sample

GREEDY = SamplingParams(temperature=0.0, max_blocks=40)
ASKED = 16  # pictures of the test split
RIGHT = 0.9  # of their questions; what is measured on all is in docs/kelix-tiny.md


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(BUNDLED, device="cpu", dtype="float32")


def prompts(engine: Engine) -> tuple[list[Prompt], list[str]]:
    found, answers = [], []
    for index in range(ASKED):
        sample = make_sample("test", index)
        picture = draw(sample.scene, 224)
        for question in sample.questions:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]
            found.append(engine.chat_prompt([{"role": "user", "content": content}]))
            answers.append(question.answer)
    return found, answers


def texts(engine: Engine, asked: list[Prompt]) -> list[str]:
    return [(output.text or "").strip() for output in engine.generate(asked, GREEDY)]


def test_it_is_small_and_of_this_world() -> None:
    folder = bundled(BUNDLED)
    assert folder is not None
    require_checkpoint_world(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size <= MAX_BYTES
    assert bundled("kelix-huge") is None


def test_it_answers_alike_in_float32_bfloat16_and_int8(engine: Engine) -> None:
    asked, expected = prompts(engine)
    exact = texts(engine, asked)
    for dtype, quantization in (("bfloat16", None), ("float32", "int8")):
        other = Engine.from_pretrained(
            BUNDLED, device="cpu", dtype=dtype, quantization=quantization
        )
        rounded = texts(other, asked)
        agree = sum(a == b for a, b in zip(exact, rounded, strict=True)) / len(asked)
        assert agree >= 0.95, (dtype, quantization)
    assert sum(a == b for a, b in zip(exact, expected, strict=True)) / len(asked) >= RIGHT


def admitted(model: KelixLM, ids: list[int]) -> slice:
    """What may follow in a block that began so: text or the first book, then book by book."""
    qwen, end = model.config.qwen_config, model.config.block_end
    if not ids:
        return slice(0, qwen.vocab_size + qwen.codes_per_book)
    if ids[0] < qwen.vocab_size or len(ids) == model.config.num_codes:
        return slice(end, end + 1)
    start = qwen.vocab_size + len(ids) * qwen.codes_per_book
    return slice(start, start + qwen.codes_per_book)


def recomputed(model: KelixLM, blocks: torch.Tensor, count: int) -> torch.Tensor:
    """`count` greedy blocks after `blocks` [S, N+1], each from the whole sequence anew."""
    end = model.config.block_end
    for _ in range(count):
        hidden = model.backbone.run_whole(model.embed_blocks(blocks))[-1:]
        inputs, ids = hidden.unsqueeze(0), []
        while len(ids) < blocks.shape[1] and end not in ids:
            logits = model.head_logits(model.block_decoder(inputs))[0, -1]
            allowed = admitted(model, ids)
            ids.append(allowed.start + int(logits[allowed].argmax()))
            row = F.embedding(torch.tensor([[ids[-1]]]), model.embeddings)
            inputs = torch.cat((inputs, row), dim=1)
        row = torch.full((1, blocks.shape[1]), end)
        row[0, : len(ids)] = torch.tensor(ids)
        blocks = torch.cat((blocks, row))
    return blocks[-count:]


def test_blocks_are_those_of_a_full_recomputation(engine: Engine) -> None:
    """A whole drawing, and an answer about a picture."""
    prompt = engine.drawing_prompt(make_sample("test", 1).prompt.text)
    for given in (prompt, prompts(engine)[0][0]):
        number = engine.add_request(given, replace(GREEDY, max_blocks=100))
        sequence = engine._requests[number]
        output = engine._run_one(number)
        rows = torch.from_numpy(sequence.rows[: sequence.length])
        count = len(output.blocks)
        with torch.inference_mode():
            expected = recomputed(engine.runner.model, rows[:-count], count)
        assert torch.equal(rows[-count:], expected)
    assert count < 40  # the answer was short; the drawing had a picture's blocks


def test_a_given_picture_stands_where_a_drawing_has_it(engine: Engine) -> None:
    """Between vision_start and vision_end, with the position markers of training."""
    image = engine.encode_image(draw(make_sample("test", 0).scene, 224))
    number = engine.add_reconstruction(image)
    sequence = engine._requests[number]
    first = sequence.rows[: sequence.length, 0].tolist()
    engine.discard([number])
    layout = engine.processor.image_ids(image.grid)
    config = engine.config.qwen_config
    assert first[0] == config.vision_start_token_id and first[-1] == config.vision_end_token_id
    codes = [id_ for id_ in first if id_ >= config.vocab_size]
    assert len(codes) == len(image.codes) == 64
    assert [id_ for id_ in first[1:-1] if id_ < config.vocab_size] == [
        id_ for id_ in layout if id_ != config.image_token_id
    ]


def test_it_draws_what_codes_and_prompts_say(engine: Engine) -> None:
    """Codes are painted well, prompts followed in part (docs/kelix-tiny.md has all figures)."""
    amounts = Amounts(reconstructed=16, steps=10)
    painted = reconstruction(engine, amounts)
    assert painted["count"]["accuracy"] >= 0.9 and painted["location"]["accuracy"] >= 0.9
    assert painted["colour"]["accuracy"] >= 0.9 and painted["background"]["accuracy"] >= 0.9
    samples = [make_sample("test", index) for index in range(40)]
    drawn = judged(samples, drawings(engine, samples, amounts))
    assert drawn["background"]["accuracy"] >= 0.9 and drawn["count"]["accuracy"] >= 0.75
    assert drawn["shape"]["accuracy"] >= 0.7 and drawn["colour"]["accuracy"] >= 0.65


LOAD = """
import sys, time
import torch
from kelix_rt import Engine
start = time.process_time()
engine = Engine.from_pretrained("kelix-tiny", device="cpu")
print(time.process_time() - start)
slow = [name for name in ("diffusers", "transformers", "torch._dynamo") if name in sys.modules]
assert not slow, f"loading imports {slow}"
"""
WARM_UP = """
engine.warm_up()
assert "diffusers" in sys.modules
"""
TRIES = 3  # a busy machine slows even processor time down: the best one counts


def test_loading_is_quick() -> None:
    """Under 2 s of work in a new process: what is slow to import waits for its first use."""
    tries: list[float] = []
    while len(tries) < TRIES and min(tries, default=2.0) >= 2:
        code = LOAD if tries else LOAD + WARM_UP
        run = subprocess.run(
            [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
        )
        tries.append(float(run.stdout.split()[0]))
    assert min(tries) < 2, f"loading worked {tries} s"  # measured 0.2 s


def test_it_draws_in_time(engine: Engine) -> None:
    """Under 10 s of processor time, on the one thread that tests have; measured half a second
    where nothing is left to import."""
    tries = []
    for _ in range(TRIES):
        start = time.process_time()
        picture = engine.generate_image("draw a red circle.", render=RenderParams(steps=20, seed=1))
        tries.append(time.process_time() - start)
        assert picture.image.size == (256, 256)
    assert min(tries) < 10, f"drawing worked {tries} s"
