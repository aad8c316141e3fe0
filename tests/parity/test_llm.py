"""The language model's parity run: it notices damage, and reports only what it compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kelix_rt.models.language_model import KelixLM
from kelix_rt.parity import llm


@pytest.fixture
def copied(golden: Path, tmp_path: Path) -> Path:
    """A writable copy of a golden directory without what the tests here do not need."""
    path = tmp_path / "copy"
    shutil.copytree(golden / "llm" / "tiny_b", path, copy_function=shutil.copyfile)
    return path


def edit(file: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(file)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file)


def test_absent_fixtures_give_no_row(copied: Path) -> None:
    names = {check.name for check in llm.run(copied)}
    edit(copied / "fixtures.safetensors", **{"quirk/embeds": None, "gen0/last_hidden": None})
    assert names - {check.name for check in llm.run(copied)} == {
        "quirk/embeds",
        "gen0/last_hidden",
    }


def test_absent_notes_leave_out_what_needs_them(copied: Path) -> None:
    checks = {check.name for check in llm.run(copied)}
    (copied / "fixtures.json").unlink()
    without = llm.run(copied)
    assert all(check.ok for check in without)
    left_out = checks - {check.name for check in without}
    assert left_out
    assert {name.split("/")[0] for name in left_out} <= {"cond", "sample"}


def test_a_damaged_fixture_fails_alone(copied: Path) -> None:
    fixtures = copied / "fixtures.safetensors"
    tensors = load_file(fixtures)
    embeds = tensors["quirk/embeds"] + 1e-3
    edit(fixtures, **{"quirk/embeds": embeds, "gen0/ids": tensors["gen0/ids"][:-1].contiguous()})
    failed = {check.name: check for check in llm.run(copied) if not check.ok}
    assert set(failed) == {"quirk/embeds", "gen0/ids"}
    assert failed["quirk/embeds"].error == pytest.approx(1e-3, rel=1e-2)
    assert "shape" in failed["gen0/ids"].note


def test_greedy_stops_at_eos_and_at_the_cap(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    lm = KelixLM.from_pretrained(path)
    prompt = load_file(path / "fixtures.safetensors")["gen0/prompt_ids2d"]
    full = llm.greedy(lm, prompt, None, 100)
    assert int(full.ids[-1, 0]) == lm.config.qwen_config.eos_token_id
    assert full.ids.shape[0] == len(prompt) + 29
    assert full.hidden.shape[0] == full.ids.shape[0] - 1
    cut = llm.greedy(lm, prompt, None, 6)
    assert torch.equal(cut.ids, full.ids[: len(prompt) + 6])
