"""The image DiT's parity run: it notices damage, and reports only what it compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kelix_rt.parity import dit
from kelix_rt.parity.report import failures


@pytest.fixture
def copied(golden: Path, tmp_path: Path) -> Path:
    """A writable copy of a golden directory."""
    path = tmp_path / "copy"
    shutil.copytree(golden / "dit" / "tiny_release", path, copy_function=shutil.copyfile)
    return path


def test_absent_fixtures_give_no_row(copied: Path) -> None:
    names = {check.name for check in dit.run(copied)}
    tensors = load_file(copied / "fixtures.safetensors")
    gone = {"fwd.y_norm", "schedule50.sigmas", "dpm.latents"}
    save_file({k: v for k, v in tensors.items() if k not in gone}, copied / "fixtures.safetensors")
    assert names - {check.name for check in dit.run(copied)} == gone


def test_a_damaged_weight_fails(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["blocks.2.cross_attn.to_v.bias"][0] += 1e-3
    save_file(tensors, copied / "model.safetensors")
    failed = {check.name for check in failures(dit.run(copied))}
    assert {"fwd.velocity", "sample.cfg1.latents"} <= failed
    assert "fwd.y_norm" not in failed


def test_another_shape_fails(copied: Path) -> None:
    tensors = load_file(copied / "fixtures.safetensors")
    tensors["fwd.velocity"] = torch.zeros(1, 8, 8, 8)
    save_file(tensors, copied / "fixtures.safetensors")
    assert [check.name for check in failures(dit.run(copied))] == ["fwd.velocity"]
