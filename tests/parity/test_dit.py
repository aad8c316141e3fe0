"""The image DiT's parity run: it notices damage, and reports only what it compared."""

from __future__ import annotations

import json
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


def test_positions_are_laid_out_as_the_notes_say(golden: Path, tmp_path: Path) -> None:
    """Rotary positions depend on the untruncated token count and on the side of the picture."""
    path = tmp_path / "copy"
    shutil.copytree(golden / "dit" / "tiny_alt", path, copy_function=shutil.copyfile)
    notes = json.loads((path / "fixtures.json").read_text())
    call = notes["pos_args_call"]
    for field, value in (("token_embed_lengths", [31]), ("image_size", 512)):
        changed = {**notes, "pos_args_call": {**call, field: value}}
        (path / "fixtures.json").write_text(json.dumps(changed))
        failed = {check.name for check in failures(dit.run(path))}
        assert {"fwd.velocity", "sample.cfg1.latents", "sample.cfg1.v_cond"} <= failed


@pytest.mark.parametrize("stacked", [False, True])
def test_samples_of_several_pictures(copied: Path, stacked: bool) -> None:
    tensors = load_file(copied / "fixtures.safetensors")
    shape = tensors["sample.latent0"].shape
    for key in ("sample.cond_embeds", "sample.mask", "sample.latent0"):
        tensors[key] = torch.cat((tensors[key], tensors[key]))
    for key in [key for key in tensors if key.startswith(("sample.cfg", "dpm.latents"))]:
        if tensors[key].shape[1:] == shape[1:] and "bf16" not in key:
            both = torch.stack((tensors[key], tensors[key]), dim=1)
            tensors[key] = both if stacked else both.flatten(0, 1)
    kept = {key: value for key, value in tensors.items() if "bf16" not in key}
    save_file(kept, copied / "fixtures.safetensors")
    checks = dit.run(copied)
    assert {"sample.cfg1.latents", "sample.cfg1.v_cond"} <= {check.name for check in checks}
    assert not failures(checks)
