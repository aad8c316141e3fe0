from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.ops import _codes_forms as forms
from tests.models.plain_tokenizer import make_config, make_state, save_checkpoint


@pytest.mark.parametrize("mode", ["exact", "reference"])
def test_a_tuned_tokenizer_finds_the_same_codes(
    tmp_path: Path, mode: Literal["exact", "reference"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuned by a clock that finds the kernel slower than torch's product."""
    monkeypatch.setattr(forms, "CHOSEN", {})
    config = make_config()
    model = VisionTokenizer.from_pretrained(save_checkpoint(tmp_path, config, make_state(config)))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(32, 3, 14, 14, generator=generator) * 2 - 1
    grid = torch.tensor([[1, 4, 8]])
    before = model.encode(pixels, grid, mode)
    clock = iter([2.0, 1.0])
    monkeypatch.setattr("kelix_rt.testing.median_seconds", lambda call, device: next(clock))
    model.tune([len(before)], mode)
    assert [choice.name for choice in forms.CHOSEN.values()] == ["product"]
    product, calls = forms._float32_product, []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a.shape)
        return product(a, b)

    monkeypatch.setattr(forms, "_float32_product", counted)
    assert torch.equal(model.encode(pixels, grid, mode), before)
    assert len(calls) == 1, "the choice was not taken"
