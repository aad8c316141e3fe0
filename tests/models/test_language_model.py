"""The language model against golden outputs and, where those do not reach, plain float64 torch."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kelix_rt import ops
from kelix_rt.errors import ConfigError, InputError, WeightError
from kelix_rt.models.language_model import KelixLM
from kelix_rt.ops.sampling import kept_scores
from kelix_rt.parity import llm
from tests.models import toy_llm as toy

HEAD, OTHER_HEAD = "model.model.output.weight", "lm_head.weight"
CODES = toy.image((0, 1, 2), (7, 3, 5))
# Text rows between the rows of an image, as the released model writes row markers.
MARKED = torch.cat((toy.text(1, toy.VISION_START, 45), CODES, toy.text(45, 3, 46), CODES))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[KelixLM, toy.PlainLM]:
    config = toy.config_json()
    state = toy.random_state(config, seed=1)
    path = toy.write(tmp_path_factory.mktemp("toy"), config, state)
    return KelixLM.from_pretrained(path), toy.PlainLM(config, state)


def reference_rows(
    lm: KelixLM, hidden: Tensor, temperature: float, top_k: float, top_p: float
) -> tuple[Tensor, Tensor]:
    row = torch.tensor([temperature, top_k, top_p, 0.0])
    numbers = torch.arange(len(hidden))
    params = row.expand(len(hidden), lm.config.num_codes + 1, 4)
    with torch.inference_mode():
        return lm.decode_blocks(hidden, params, numbers, numbers, reference=True)


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_golden_parity(golden: Path, name: str, dtype: torch.dtype) -> None:
    checks = llm.run(golden / "llm" / name, "cpu", dtype)
    failed = [check for check in checks if not check.ok]
    assert not failed
    names = {check.name for check in checks}
    assert {"quirk/embeds", "gen0/ids", "gen2/last_hidden", "sample/0/probs"} <= names


@torch.inference_mode()
def test_marker_rows_between_codes_match_plain_torch(
    models: tuple[KelixLM, toy.PlainLM],
) -> None:
    lm, plain = models
    got = lm.hidden_states(MARKED)
    torch.testing.assert_close(got[0].double(), plain.embed(MARKED), atol=1e-5, rtol=0)
    torch.testing.assert_close(got[-1].double(), plain.hidden(MARKED), atol=3e-5, rtol=0)


@torch.inference_mode()
def test_teacher_forced_logits_see_the_next_row_and_wrap_around(
    models: tuple[KelixLM, toy.PlainLM],
) -> None:
    lm, plain = models
    ids = torch.cat((CODES[:1], toy.text(5), CODES[1:]))
    hidden = plain.hidden(ids)
    logits = lm.teacher_forced_logits(ids)
    assert logits.shape == (len(ids), toy.N + 1, toy.TOTAL)
    for position in range(len(ids)):
        following = ids[(position + 1) % len(ids)].tolist()
        fed = following[: toy.N] if following[0] >= toy.V else [following[0]] * toy.N
        for slot in range(toy.N + 1):
            want = plain.slot_logits(hidden[position], fed[:slot])
            torch.testing.assert_close(logits[position, slot].double(), want, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_full_logits_follow_the_greedy_chain_or_the_given_ids(
    models: tuple[KelixLM, toy.PlainLM],
) -> None:
    lm, plain = models
    hidden = torch.randn(8, toy.D, generator=torch.Generator().manual_seed(4)) * 3
    chain = lm.full_logits(hidden)
    given = lm.full_logits(hidden, CODES[:1].expand(8, -1))
    for row in range(8):
        previous: list[int] = []
        for slot in range(toy.N + 1):
            want = plain.slot_logits(hidden[row].double(), previous)
            want[toy.IMAGE] = -torch.inf
            torch.testing.assert_close(chain[row, slot].double(), want, atol=1e-4, rtol=0)
            previous.append(int(want.argmax()))
            if previous[-1] == toy.Q:
                assert (chain[row, slot + 1 :] <= 0).all()
                break
        want = plain.slot_logits(hidden[row].double(), CODES[0, :2].tolist())
        want[toy.IMAGE] = -torch.inf
        torch.testing.assert_close(given[row, 2].double(), want, atol=1e-4, rtol=0)


def test_head_escapes_are_counted(golden: Path) -> None:
    lm = KelixLM.from_pretrained(golden / "llm" / "tiny_a")
    fixtures = llm.load_file(golden / "llm" / "tiny_a" / "fixtures.safetensors")
    prompt, ids = fixtures["gen0/prompt_ids2d"], fixtures["gen0/ids"]
    drawn, hidden = ids[len(prompt) :], fixtures["gen0/last_hidden"][len(prompt) - 1 :]
    assert lm.count_head_escapes(hidden, drawn).tolist() == [0] * len(drawn)
    visual = int((drawn[:, 0] >= lm.config.qwen_config.vocab_size).nonzero()[0])
    wrong = drawn[visual : visual + 1].clone()
    wrong[0, 0] = 5  # after a text id the end-of-block is due, the head may want otherwise
    logits = lm.full_logits(hidden[visual : visual + 1], wrong)
    expected = int(logits[0, 1].argmax() != lm.config.block_end)
    assert lm.count_head_escapes(hidden[visual : visual + 1], wrong).tolist() == [expected]


def test_reference_rule_with_top_k_1_is_greedy(golden: Path) -> None:
    lm = KelixLM.from_pretrained(golden / "llm" / "tiny_b")
    fixtures = llm.load_file(golden / "llm" / "tiny_b" / "fixtures.safetensors")
    prompt, ids = fixtures["gen0/prompt_ids2d"], fixtures["gen0/ids"]
    hidden = fixtures["gen0/last_hidden"][len(prompt) - 1 :]
    drawn, logprobs = reference_rows(lm, hidden, 0.7, 1, 0.9)
    assert torch.equal(drawn, ids[len(prompt) :])
    assert torch.equal(llm.greedy_blocks(lm, hidden), drawn)
    assert (logprobs <= 0).all()


def test_reference_rule_redraws_each_slot_and_ends_at_the_first_end(
    models: tuple[KelixLM, toy.PlainLM],
) -> None:
    lm, _ = models
    draws = 3000
    hidden = torch.randn(1, toy.D, generator=torch.Generator().manual_seed(8)) * 3
    ids, logprobs = reference_rows(lm, hidden.expand(draws, -1), 4.0, 20, 0.95)
    assert not (ids == toy.IMAGE).any()
    assert (ids[:, -1] == toy.Q).all()
    ended = (ids == toy.Q).cumsum(-1) > 0
    assert (ids[ended] == toy.Q).all()
    assert (logprobs[:, -1] == 0).all()
    params = torch.tensor([[4.0, 20, 0.95, 0]])
    probs = kept_scores(lm.full_logits(hidden)[0, :1], params, reference=True).softmax(-1)[0]
    frequency = torch.bincount(ids[:, 0], minlength=toy.TOTAL) / draws
    error = (frequency - probs).abs() / (probs * (1 - probs) / draws).sqrt().clamp(min=1e-9)
    assert (frequency[probs == 0] == 0).all()
    assert float(error[probs > 0].max()) < 5


def test_expansion_fills_placeholders_in_order(models: tuple[KelixLM, toy.PlainLM]) -> None:
    lm, _ = models
    image_ids = CODES[:, : toy.N]
    ids = torch.tensor([1, toy.IMAGE, 2, toy.IMAGE])
    want = torch.stack((toy.text(1)[0], CODES[0], toy.text(2)[0], CODES[1]))
    assert torch.equal(lm.expand(ids, image_ids), want)
    assert torch.equal(lm.expand(want), want)
    # A placeholder anywhere makes expanded rows be read by their first id alone.
    mixed = torch.cat((CODES[:1], toy.text(toy.IMAGE)))
    again = lm.expand(mixed, image_ids[:1])
    assert again[0].tolist() == [int(CODES[0, 0])] + [toy.Q] * toy.N
    assert torch.equal(again[1], CODES[0])


@pytest.mark.parametrize(
    ("ids", "image_ids", "message"),
    [
        (torch.tensor([1, toy.IMAGE]), None, "got 0 rows for 1 placeholders"),
        (torch.tensor([1]), CODES[:, : toy.N], "got 2 rows for 0 placeholders"),
        (CODES, CODES[:1, : toy.N], "got 1 rows for 0 placeholders"),
        (torch.tensor([toy.IMAGE, toy.IMAGE]), CODES, r"shape \[n, N=3\], got \[2, 4\]"),
        (torch.tensor([1, toy.TOTAL]), None, r"ids must be in \[0, 72\), got 1 .. 72"),
        (torch.tensor([toy.IMAGE]), torch.tensor([[0, 1, -1]]), r"image_ids must be in \[0, 72\)"),
        (torch.tensor([[1, 2]]), None, r"shape \[S\] or \[S, N\+1=4\], got \[1, 2\]"),
        (torch.tensor([1.0]), None, "ids must be int64"),
    ],
)
def test_impossible_prompts_are_refused(
    models: tuple[KelixLM, toy.PlainLM], ids: Tensor, image_ids: Tensor | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        models[0].expand(ids, image_ids)


@pytest.mark.parametrize("kept", ["equal", "differ", "output", "lm_head"])
def test_which_head_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: str) -> None:
    config = toy.config_json()
    state = toy.random_state(config)
    head = state[HEAD]
    other = {"equal": head.clone(), "differ": head + 1, "lm_head": head.clone()}.get(kept)
    if other is not None:
        state[OTHER_HEAD] = other
    if kept == "lm_head":
        del state[HEAD]
    with caplog.at_level(logging.WARNING):
        lm = KelixLM.from_pretrained(toy.write(tmp_path, config, state))
    assert torch.equal(lm.head, head)
    warned = any("differ" in record.getMessage() for record in caplog.records)
    assert warned == (kept == "differ")


def test_missing_tensors_and_short_blocks_are_errors(tmp_path: Path) -> None:
    config = toy.config_json()
    state = toy.random_state(config)
    del state[HEAD], state["model.model.norm.scale"]
    with pytest.raises(WeightError, match=r"output\.weight.*norm\.scale|norm.*output"):
        KelixLM.from_pretrained(toy.write(tmp_path / "missing", config, state))
    short = toy.config_json(decoder={"max_length": toy.N})
    with pytest.raises(ConfigError, match="max_length"):
        KelixLM.from_pretrained(toy.write(tmp_path / "short", short, toy.random_state(short)))


def test_a_shorter_chain_never_computes_the_last_slot(tmp_path: Path) -> None:
    config = toy.config_json(decoder={"max_length": toy.N + 1})
    lm = KelixLM.from_pretrained(toy.write(tmp_path, config, toy.random_state(config)))
    hidden = torch.randn(4, toy.D) * 3
    last = lm.full_logits(hidden)[:, -1]
    assert ((last == 0) | (last == -torch.inf)).all()


def test_dtype_and_embedding_follow_the_request(golden: Path) -> None:
    lm = KelixLM.from_pretrained(golden / "llm" / "tiny_b", dtype=torch.bfloat16)
    assert {p.dtype for p in lm.backbone.parameters()} == {torch.bfloat16}
    assert lm.block_decoder.packed.dtype == torch.bfloat16
    assert lm.backbone.cos_sin.dtype == torch.float32
    ids = lm.expand(torch.tensor([1, 2]))
    vocab = lm.config.qwen_config.vocab_size
    want = ops.block_embed_ref(ids, lm.embeddings, vocab, lm.config.block_end)
    assert torch.equal(lm.embed_blocks(ids), want)
