from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from kelix_rt import Engine
from kelix_rt.train import evaluate as module
from kelix_rt.train.evaluate import Amounts, Score, evaluate, judged, show, usage
from kelix_rt.train.sheet import contact_sheet
from kelix_rt.train.world import draw, make_sample, make_scenes, make_text
from tests.train import tiny

FEW = Amounts(questioned=1, drawn=2, reconstructed=1, encoded=2, side=56, steps=1)


@pytest.fixture(scope="module")
def engine(golden: Path) -> Engine:
    parts = {name: golden / "e2e_dit" / name for name in ("dit", "vae")}
    return Engine.from_pretrained(tiny.CHECKPOINT, device="cpu", max_condition_length=12, **parts)


def test_usage_by_hand() -> None:
    codes = torch.tensor([[0, 1], [0, 1], [1, 1], [1, 1]])
    found = usage(codes, 4)
    assert found["utilisation"] == [0.5, 0.25]
    assert found["perplexity"] == pytest.approx([2.0, 1.0])


def test_only_what_a_prompt_states_is_judged() -> None:
    samples = [make_sample("test", i) for i in range(12)]
    pictures = [draw(sample.scene, 256) for sample in samples]
    right = judged(samples, pictures)
    for name, row in right.items():
        assert row["asked"] == sum(name in sample.prompt.states for sample in samples)
        assert row["accuracy"] == 1.0, name
    wrong = judged(samples, [Image.new("RGB", (64, 64), "orange")] * 12)
    missing = judged(samples, [None] * 12)
    assert all(row["right"] == 0 for row in missing.values())
    assert all(missing[name]["asked"] == right[name]["asked"] for name in right)
    assert wrong["object"]["right"] == 0


def test_reconstruction_asks_for_what_a_picture_has(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words where there are words, objects where there are objects: not of every picture."""

    class Same:
        def __init__(self, picture: Image.Image) -> None:
            self.image = picture

    amounts = replace(FEW, reconstructed=20)
    monkeypatch.setattr(engine, "reconstruct", lambda picture, render: Same(picture))
    found = module.reconstruction(engine, amounts)
    scenes = [*make_scenes("test", 20)]
    words = sum(scene.word is not None for scene in scenes)
    assert 0 < words < 20
    assert found["word"]["asked"] == words and found["no word"]["asked"] == 20 - words
    assert found["object"]["asked"] == sum(bool(scene.things) for scene in scenes)
    assert all(row["accuracy"] == 1 for row in found.values())


def test_answers_are_compared_whole(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that knows one sentence: it is right where that is the answer."""
    sample, text = make_sample("test", 0), make_text("test", 0)
    answers = [q.answer for q in (*sample.questions, text)]
    said = answers[0]

    class Reply:
        text = said

    monkeypatch.setattr(engine, "generate", lambda prompts, sampling: [Reply()] * len(prompts))
    found = module.understanding(engine, FEW)
    assert sum(row["asked"] for row in found.values()) == len(answers)
    assert sum(row["right"] for row in found.values()) == answers.count(said)


def test_relations_are_right_when_they_come_to_the_right_one() -> None:
    told = "the star is in the top left and the ring in the top right: left"
    other = "the star is in the bottom left and the ring in the top right: left"
    assert module._right("relation", other, told) and module._right("relation", "left", told)
    assert not module._right("relation", told.replace(": left", ": right"), told)
    assert not module._right("inventory", other, told)


def test_everything_is_measured_and_written(engine: Engine, tmp_path: Path) -> None:
    found = evaluate(engine, FEW, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert {"understanding", "codebooks", "drawing", "reconstruction"} <= set(found)
    assert len(found["codebooks"]["utilisation"]) == 8
    assert all(0 <= row["accuracy"] <= 1 for row in found["understanding"].values())
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.width > 4 * 256
    console = Console(record=True, width=100, file=io.StringIO())
    show(found, console)
    printed = console.export_text()
    assert "Answers on the test split" in printed and "perplexity" in printed


def test_sheet_leaves_a_failed_picture_gray() -> None:
    sheet = contact_sheet(["a", "b c " * 60], [Image.new("RGB", (32, 32), "red"), None], side=64)
    assert sheet.getpixel((20, 20)) == (255, 0, 0)
    assert sheet.getpixel((80 + 20, 20)) == (211, 211, 211)


def test_score() -> None:
    score = Score()
    for right in (True, False, True):
        score.add("count", right)
    assert score.table() == {"count": {"accuracy": 2 / 3, "right": 2, "asked": 3}}
