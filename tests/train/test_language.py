from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kelix_rt.errors import ConfigError
from kelix_rt.train.chats import Document
from kelix_rt.train.language import (
    STAGES,
    Aligner,
    NextBlockLoss,
    fused_rows,
    pack,
    slot_weights,
)
from kelix_rt.train.loop import StageResult
from kelix_rt.train.states import load_modules
from tests.train import tiny

QUIET: dict[str, Any] = {"save_every_seconds": 0.0, "log_every": 1}


def documents() -> list[Document]:
    """A text document and one with two codes; positions 0 and 3 of the second do not count."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 32, (2, 8), generator=generator) + torch.arange(8) * 32 + 640
    return [
        Document([5, 6, 7], torch.empty(0, 8, dtype=torch.int64), [False, True, True]),
        Document([8, 359, 359, 9, 10], codes, [False, True, True, False, True]),
    ]


def by_hand(model: Any, documents: list[Document]) -> Tensor:
    """The loss from whole logits of one document at a time, slot by slot."""
    total, slots = torch.zeros(()), 0
    for document in documents:
        blocks = model.expand(torch.tensor(document.ids), document.codes if len(document.codes)
                              else None)  # fmt: skip
        logits = model.teacher_forced_logits(blocks)
        for row, counted in enumerate(document.counted):
            if not counted:
                continue
            visual = int(blocks[row, 0]) >= 640
            width = 9 if visual else 2
            entropies = F.cross_entropy(
                logits[row - 1, :width], blocks[row, :width], reduction="none"
            )
            total = total + entropies.sum() * (11 / 2 / 9 if visual else 11 / 2 / 2)
            slots += width
    return total / slots


def test_slot_weights() -> None:
    text, visual = slot_weights(8)
    assert text == 2.75
    assert visual == pytest.approx(0.611, abs=2e-4)
    for num_codes in (1, 2, 4, 8):
        text, visual = slot_weights(num_codes)
        assert 2 * text == pytest.approx((num_codes + 1) * visual)  # every position weighs the same
        assert 2 * text == pytest.approx((num_codes + 3) / 2)


def test_loss_equals_the_sum_over_documents() -> None:
    model = tiny.model()
    losses = NextBlockLoss(model)(pack(model, documents()))
    torch.testing.assert_close(losses["loss"], by_hand(model, documents()))
    assert losses["image"].item() == pytest.approx(math.log(896), rel=0.3)
    assert set(losses) == {"loss", "text", "image", "end"}


def test_text_alone_has_no_image_loss() -> None:
    model = tiny.model()
    losses = NextBlockLoss(model)(pack(model, documents()[:1]))
    assert set(losses) == {"loss", "text", "end"}


def test_codes_fuse_as_the_tokenizer_fuses_them() -> None:
    tokenizer = tiny.tokenizer()
    codes = torch.randint(0, 32, (5, 8), generator=torch.Generator().manual_seed(0))
    rows = fused_rows(tokenizer)[codes + torch.arange(8) * 32]
    torch.testing.assert_close(rows.sum(1), tokenizer.embed(codes))


def test_aligned_table_keeps_the_text() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    aligner = Aligner(tokenizer, 64)
    table = aligner.table(model.embeddings)
    assert table.shape == model.embeddings.shape
    assert torch.equal(table[:640], model.embeddings[:640])
    codes = torch.randint(0, 32, (200, 8), generator=torch.Generator().manual_seed(0))
    blocks = table[codes + torch.arange(8) * 32 + 640].sum(1).detach()
    text = model.embeddings[:640].detach()
    assert blocks.std().item() == pytest.approx(text.std().item(), rel=0.5)


def test_the_loss_of_a_fixed_batch_falls() -> None:
    model = tiny.model().requires_grad_(True)
    batch, loss = pack(model, documents()), NextBlockLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        losses = loss(batch)
        losses["loss"].backward()
        optimizer.step()
        values.append(losses["loss"].item())
    assert values[-1] < 0.05 * values[0]
    # The packed Block Decoder follows its parameters: the engine's path has learned it too.
    hidden = model.backbone.run_whole(model.embed_blocks(batch.blocks[3:]), lengths=[5])
    params = torch.zeros(1, 9, 4)
    zero = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        ids, _ = model.decode_blocks(hidden[:1], params, zero, zero)
    assert torch.equal(ids[0], batch.blocks[4])


def test_stages_follow_each_other(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    states = []
    for name in STAGES:
        trainer.run([name], **QUIET)
        states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    warm, aligned, interleaved = states[:3]
    changed = {name for name in warm if not torch.equal(warm[name], aligned[name])}
    assert all(name.startswith("block_decoder") or name in ("head", "backbone.norm")
               for name in changed)  # fmt: skip
    assert {"head", "backbone.norm"} < changed
    # Unification: stage 2.1 starts from the aligned rows, and from then on all of it moves.
    aligner = Aligner(trainer.tokenizer(), 64)
    load_modules(trainer.out / "language-1.pt", {"aligner": aligner})
    unified = aligner.table(aligned["embeddings"])
    assert (interleaved["embeddings"] - unified).abs().max() < 0.02
    assert (interleaved["embeddings"] - unified)[640:].abs().max() > 0
    assert all(not torch.equal(aligned[name], interleaved[name]) for name in aligned)


def test_stages_resume(tmp_path: Path) -> None:
    whole, broken = tiny.trainer(tmp_path / "a"), tiny.trainer(tmp_path / "b")
    whole.run(["warmup", "1"], **QUIET)

    def cut(step: int) -> None:
        raise KeyboardInterrupt

    broken.run(["warmup"], **QUIET)
    with pytest.raises(KeyboardInterrupt):
        # The first logged step stops it, before the second checkpoint.
        broken.run(["1"], log_every=2, save_every_seconds=0.0, on_log=cut)
    again = tiny.trainer(tmp_path / "b", seed=1)
    assert again.run(["1"], **QUIET).resumed_from == 1
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_stage_needs_the_one_before_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"language-2\.1\.pt does not exist"):
        tiny.trainer(tmp_path).run(["2.2"])


def test_the_warm_up_has_no_pictures(tmp_path: Path) -> None:
    def absent() -> Any:
        raise AssertionError("nothing has codes yet")

    trainer = replace(tiny.trainer(tmp_path), tokenizer=absent, pictures=absent)
    assert trainer.run(["warmup"], **QUIET).steps == 2


def test_pictures_are_made_before_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loop products have bfloat16 factors where that is fast: other codes would come out."""
    trainer = tiny.trainer(tmp_path)
    trainer.run(["warmup", "1", "2.1"], **QUIET)
    asked: list[str] = []
    watched = replace(trainer, pictures=lambda: asked.append("") or trainer.pictures())

    def loop(name: str, **options: Any) -> StageResult:
        assert asked, "the loop began without codes"
        return StageResult(tmp_path, 0, 0)

    monkeypatch.setattr("kelix_rt.train.language.run_stage", loop)
    watched.run(["2.2"])
