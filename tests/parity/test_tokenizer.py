from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.parity.report import failures
from kelix_rt.parity.tokenizer import compare, pad_embeds, run


@pytest.fixture(scope="module")
def loaded(golden: Path) -> tuple[VisionTokenizer, dict[str, Tensor]]:
    path = golden / "tokenizer" / "tok_a"
    return VisionTokenizer.from_pretrained(path), load_file(path / "fixtures.safetensors")


def test_every_fixture_is_compared(loaded: tuple[VisionTokenizer, dict[str, Tensor]]) -> None:
    model, golden = loaded
    names = {check.name for check in compare(model, golden, 1000)}
    inputs = {"pixel_values", "image_grid_thw"}
    others = ("bf16.", "eager_joint", "image")
    assert names == {k for k in golden if k not in inputs and not k.startswith(others)}


def test_absent_fixtures_give_no_row(loaded: tuple[VisionTokenizer, dict[str, Tensor]]) -> None:
    model, golden = loaded
    few = {k: golden[k] for k in ("pixel_values", "image_grid_thw", "ln_post")}
    assert [check.name for check in compare(model, few)] == ["ln_post"]
    assert compare(model, {}) == []


@pytest.mark.parametrize("key", ["ln_post", "indices", "aligned_ids", "token_embeds", "gap_rel"])
def test_changed_fixtures_fail(loaded: tuple[VisionTokenizer, dict[str, Tensor]], key: str) -> None:
    model, golden = loaded
    changed = golden[key].clone()
    changed.view(-1)[0] += 1
    checks = compare(model, {**golden, key: changed}, 1000)
    assert [check.name for check in failures(checks)] == [key]


def test_joint_attention_would_be_noticed(
    loaded: tuple[VisionTokenizer, dict[str, Tensor]], golden: Path
) -> None:
    """The release's eager attention lets images see each other; one segment for all does so too."""
    model, data = loaded
    frames = torch.tensor([[1, 2, int(data["pixel_values"].shape[0]) // 2]])
    checks = compare(model, {**data, "image_grid_thw": frames})
    assert "ln_post" in [check.name for check in failures(checks)]


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_tokenizer_inside_a_language_model(golden: Path, name: str) -> None:
    checks = run(golden / "llm" / name, prefix="visual_tokenizer.", keys="vis/")
    assert {"indices", "aligned_ids"} <= {check.name for check in checks}
    assert not failures(checks)


def test_padding_cuts_and_fills() -> None:
    embeds = torch.arange(12.0).view(6, 2)
    padded, mask = pad_embeds(embeds, torch.tensor([[1, 4, 4], [1, 2, 4]]), 3)
    assert padded[0].tolist() == embeds[:3].tolist()
    assert padded[1].tolist() == [*embeds[4:].tolist(), [0.0, 0.0]]
    assert mask.tolist() == [[[[1.0, 1.0, 1.0]]], [[[1.0, 1.0, 0.0]]]]
