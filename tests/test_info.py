"""What kelix info collects."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kelix_rt
from kelix_rt import ConfigError, EngineConfig, InputError, info
from kelix_rt.memory import plan


def test_the_installation_names_its_versions_and_what_was_built() -> None:
    facts = info.installation()
    assert facts["kelix_rt"] == kelix_rt.__version__
    assert facts["torch"] == torch.__version__
    assert facts["native"]["isa"] in ("baseline", "avx2", "avx512")
    assert all(target[:2].isdigit() for target in facts["native"]["cuda"])
    assert len(facts["gpus"]) == torch.cuda.device_count()


def test_a_missing_library_is_told_not_raised() -> None:
    code = """
import sys
from kelix_rt import info
from kelix_rt.errors import NativeError
class NotBuilt:
    def find_spec(self, name, path=None, target=None):
        if name == "kelix_rt.ops":
            raise NativeError("it is not built")
sys.modules.pop("kelix_rt.ops", None)
sys.meta_path.insert(0, NotBuilt())
assert info.native() == {"error": "it is not built"}, info.native()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_language_model_is_described_from_its_headers(golden: Path) -> None:
    path = golden / "llm" / "tiny_a"
    facts = info.checkpoint(path)
    assert facts["kind"] == "Kelix language model"
    assert facts["ids"] == "640 text, 8 x 32 visual"
    assert facts["text tokenizer"] is True
    assert facts["memory"]["total"] == plan(path).total_bytes
    assert facts["memory"]["rows"][-1] == {"name": "total", "bytes": plan(path).total_bytes}
    # keys and values, 3 layers, 2 heads of 16, 4 bytes
    assert facts["memory"]["kv_bytes_per_block"] == 2 * 3 * 2 * 16 * 4
    assert info.checkpoint(golden / "llm" / "tiny_b")["text tokenizer"] is False


def test_dtype_and_options_change_the_ledger(golden: Path) -> None:
    path, options = golden / "llm" / "tiny_a", EngineConfig(num_pages=3)
    half = info.checkpoint(path, options=options, dtype=torch.bfloat16)["memory"]
    full = info.checkpoint(path, options=options)["memory"]
    assert (half["dtype"], full["dtype"]) == ("bfloat16", "float32")
    assert half["kv_bytes_per_block"] * 2 == full["kv_bytes_per_block"]
    assert full["rows"][-2]["bytes"] == 3 * 16 * full["kv_bytes_per_block"]


def test_a_model_that_does_not_fit_is_still_described(golden: Path) -> None:
    facts = info.checkpoint(golden / "llm" / "tiny_a", free_bytes=1000)
    assert "only 80% of 0 bytes are free" in facts["memory"]["error"]
    assert facts["memory"]["total"] > 1000


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("tokenizer/tok_a", "vision tokenizer"),
        ("dit/tiny_release", "image DiT"),
        ("e2e_dit/vae", "diffusers AutoencoderDC"),
    ],
)
def test_other_models_are_described(golden: Path, path: str, kind: str) -> None:
    facts = info.checkpoint(golden / path)
    assert facts["kind"] == kind
    assert facts["memory"]["total"] > 0


def test_parts_in_subfolders_are_described_too(golden: Path, tmp_path: Path) -> None:
    parts = info.checkpoint(golden / "e2e_dit")["parts"]
    assert [part["kind"] for part in parts] == ["image DiT", "diffusers AutoencoderDC"]
    shutil.copytree(golden / "llm" / "tiny_b", tmp_path / "m")
    shutil.copytree(golden / "e2e_dit" / "dit", tmp_path / "m" / "dit")
    facts = info.checkpoint(tmp_path / "m")
    assert facts["kind"] == "Kelix language model"
    assert [part["kind"] for part in facts["parts"]] == ["image DiT"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        info.checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json"):
        info.checkpoint(tmp_path)
