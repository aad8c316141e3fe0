"""The Block Decoder: its packed weights, and the in-block loop against plain float64 torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kelix_rt.models.language_model import KelixLM
from kelix_rt.ops.block_decoder import (
    BlockDecoderShape,
    block_decoder_shape,
    pack_block_decoder,
    unpack_block_decoder,
)
from tests.models import toy_llm as toy

HEAD = "model.model.output.weight"


def load(path: Path, state: toy.State | None = None) -> tuple[KelixLM, toy.PlainLM]:
    config = toy.config_json()
    state = toy.random_state(config, seed=3) if state is None else state
    return KelixLM.from_pretrained(toy.write(path, config, state)), toy.PlainLM(config, state)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[KelixLM, toy.PlainLM]:
    return load(tmp_path_factory.mktemp("toy"))


def states(count: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(count, toy.D, generator=torch.Generator().manual_seed(seed)) * scale


def decode(
    lm: KelixLM, hidden: Tensor, temperature: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    batch = hidden.shape[0]
    params = torch.tensor([temperature, 0, 1, 0]).expand(batch, toy.N + 1, 4)
    numbers = torch.arange(batch)
    with torch.inference_mode():
        return lm.decode_blocks(hidden, params, numbers + seed, numbers * 7)


def test_packing_round_trips_at_aligned_starts() -> None:
    shape = BlockDecoderShape(6, 2, 2, 5, 9, 4)
    state = {name: torch.randn(size) for name, size in shape.tensors()}
    packed = pack_block_decoder(state)
    assert packed.shape == (shape.packed_size,)
    assert all(start % 64 == 0 for *_, start in shape.layout())
    assert sum(t.numel() for t in state.values()) == int((packed != 0).sum())
    for name, view in unpack_block_decoder(packed, shape).items():
        assert torch.equal(view, state[name]), name
    assert block_decoder_shape(state, num_heads=2) == shape


def test_module_weights_are_views_of_the_packed_tensor(
    models: tuple[KelixLM, toy.PlainLM],
) -> None:
    decoder = models[0].block_decoder
    storage = decoder.packed.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in decoder.parameters())
    assert decoder.shape.num_slots == toy.N + 1
    assert decoder.position_embedding.weight.shape[0] == toy.N + 1


@torch.inference_mode()
def test_forward_matches_plain_torch(models: tuple[KelixLM, toy.PlainLM]) -> None:
    lm, plain = models
    inputs = torch.stack([states(toy.N + 1, seed) for seed in range(3)])
    want = torch.stack([plain.decoder_states(row.double()) for row in inputs])
    torch.testing.assert_close(lm.block_decoder(inputs).double(), want, atol=3e-5, rtol=0)


def test_greedy_blocks_match_plain_torch(models: tuple[KelixLM, toy.PlainLM]) -> None:
    lm, plain = models
    hidden = states(60)
    ids, logprobs = decode(lm, hidden)
    want = [plain.greedy_block(row.double()) for row in hidden]
    assert ids.tolist() == want
    visual = ids[:, 0] >= toy.V
    assert 5 < int(visual.sum()) < 55
    assert (logprobs[~visual, 1:] == 0).all()
    assert (logprobs[:, -1] == 0).all()
    assert (logprobs[visual, :-1] < 0).all()


def test_logprobs_are_those_of_the_admitted_ids(models: tuple[KelixLM, toy.PlainLM]) -> None:
    lm, plain = models
    hidden = states(30, seed=5)
    ids, logprobs = decode(lm, hidden, temperature=0.7)
    row = int((ids[:, 0] >= toy.V).nonzero()[0])
    for slot in range(toy.N):
        first = 0 if slot == 0 else toy.V + slot * toy.K
        logits = plain.slot_logits(hidden[row].double(), ids[row, :slot].tolist())
        logits[toy.IMAGE] = -torch.inf
        want = logits[first : toy.V + (slot + 1) * toy.K].log_softmax(-1)
        got = float(logprobs[row, slot])
        assert got == pytest.approx(float(want[ids[row, slot] - first]), abs=1e-4)


def test_drawn_blocks_are_well_formed_and_follow_the_first_slot(
    models: tuple[KelixLM, toy.PlainLM],
) -> None:
    lm, plain = models
    draws = 4000
    hidden = states(1, seed=9)
    temperature = 3.0
    ids, _ = decode(lm, hidden.expand(draws, -1), temperature)
    visual = ids[:, 0] >= toy.V
    assert 0 < int(visual.sum()) < draws
    assert not (ids == toy.IMAGE).any()
    assert (ids[~visual, 1:] == toy.Q).all()
    assert (ids[:, -1] == toy.Q).all()
    books = (ids[visual, :-1] - toy.V).div(toy.K, rounding_mode="floor")
    assert (books == torch.arange(toy.N)).all()
    logits = plain.slot_logits(hidden[0].double(), [])[: toy.V + toy.K] / temperature
    logits[toy.IMAGE] = -torch.inf
    probs = logits.softmax(-1)
    expected = probs * draws
    counts = torch.bincount(ids[:, 0], minlength=len(probs)).double()
    common = expected >= 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    degrees = int(common.sum())
    assert float(chi2) < degrees + 5 * (2 * degrees) ** 0.5


def test_a_draw_does_not_depend_on_the_batch(models: tuple[KelixLM, toy.PlainLM]) -> None:
    lm, _ = models
    hidden = states(12, seed=2)
    together, _ = decode(lm, hidden, temperature=1.0)
    params = torch.tensor([1.0, 0, 1, 0]).expand(1, toy.N + 1, 4)
    for row in range(12):
        with torch.inference_mode():
            alone, _ = lm.decode_blocks(
                hidden[row : row + 1], params, torch.tensor([row]), torch.tensor([row * 7])
            )
        assert torch.equal(alone[0], together[row])


def test_first_id_end_of_block_gives_an_empty_block(tmp_path: Path) -> None:
    state = toy.random_state(toy.config_json(), seed=3)
    hidden = states(1)
    lm, _ = load(tmp_path / "before", state)
    best = int(decode(lm, hidden)[0][0, 0])
    state[HEAD][toy.Q] = state[HEAD][best] * 1.1
    lm, _ = load(tmp_path / "after", state)
    ids, logprobs = decode(lm, hidden)
    assert ids.tolist() == [[toy.Q] * (toy.N + 1)]
    assert logprobs[0, 0] < 0
    assert (logprobs[0, 1:] == 0).all()
    assert lm.embed_blocks(ids).abs().sum() == 0


def test_image_placeholder_is_never_drawn(tmp_path: Path) -> None:
    state = toy.random_state(toy.config_json(), seed=3)
    hidden = states(1)
    lm, _ = load(tmp_path / "before", state)
    plain_block = decode(lm, hidden)[0]
    best = int(plain_block[0, 0])
    state[HEAD][toy.IMAGE] = state[HEAD][best] * 3
    lm, plain = load(tmp_path / "after", state)
    assert int(plain.slot_logits(hidden[0].double(), []).argmax()) == toy.IMAGE
    assert torch.equal(decode(lm, hidden)[0], plain_block)


def test_a_broken_state_gives_minus_one_and_spares_other_rows(
    models: tuple[KelixLM, toy.PlainLM],
) -> None:
    lm, _ = models
    hidden = states(3)
    want, _ = decode(lm, hidden)
    hidden[1, 4] = float("nan")
    ids, logprobs = decode(lm, hidden)
    assert torch.equal(ids[[0, 2]], want[[0, 2]])
    assert (ids[1] == -1).all()
    assert logprobs[1].isnan().all()
