from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kelix_rt.models.vision_layout import (
    PatchLayout,
    resample_positions,
    rope_table,
    rotate,
)


@pytest.fixture(scope="module")
def ops_golden(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "tokenizer" / "ops" / "ops.safetensors")


@pytest.mark.parametrize(("name", "dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_rope_table_has_the_roundings_of_the_release(
    ops_golden: dict[str, Tensor], name: str, dtype: torch.dtype
) -> None:
    cos, sin = rope_table(10000.0, 72, 128, dtype)
    if dtype == torch.bfloat16:
        assert torch.equal(cos, ops_golden["rope72.bf16.cos"])
        assert torch.equal(sin, ops_golden["rope72.bf16.sin"])
    else:
        torch.testing.assert_close(cos, ops_golden["rope72.f32.cos"], rtol=0, atol=1e-6)
        torch.testing.assert_close(sin, ops_golden["rope72.f32.sin"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("f32", torch.float32), ("bf16", torch.bfloat16)])
def test_rotation(ops_golden: dict[str, Tensor], name: str, dtype: torch.dtype) -> None:
    layout = PatchLayout.of(((1, 6, 10),), 10000.0, 72, dtype, torch.device("cpu"))
    got = rotate(ops_golden["rope72.x"].to(dtype), layout.cos, layout.sin)
    want = ops_golden[f"rope72.{name}.y"]
    if dtype == torch.bfloat16:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", ["10x44", "16x16", "27x27", "36x36", "70x70"])
def test_learned_positions(ops_golden: dict[str, Tensor], size: str) -> None:
    rows, columns = (int(side) for side in size.split("x"))
    table = ops_golden["posemb.table27"]
    got = resample_positions(table, rows, columns)
    torch.testing.assert_close(got, ops_golden[f"posemb.f32.{size}"], rtol=0, atol=3e-6)
    want = ops_golden[f"posemb.bf16.{size}"]
    rounded = resample_positions(table.bfloat16(), rows, columns)
    # neighbouring bfloat16 numbers have neighbouring bit patterns
    steps = (rounded.view(torch.int16).int() - want.view(torch.int16).int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 1e-3


def test_merge_order_is_row_major_in_two_by_two_windows() -> None:
    layout = PatchLayout.of(((1, 2, 4), (2, 2, 2)), 100.0, 8, torch.float32, torch.device("cpu"))
    assert layout.merge_order.tolist() == [
        *(0, 1, 4, 5), *(2, 3, 6, 7), *(8, 9, 10, 11), *(12, 13, 14, 15),
    ]  # fmt: skip
    assert layout.lengths == (8, 8)


def test_positions_restart_per_image_and_per_frame() -> None:
    args = (100.0, 8, torch.float32, torch.device("cpu"))
    both = PatchLayout.of(((1, 4, 2), (2, 2, 4)), *args)
    frame = PatchLayout.of(((1, 2, 4),), *args)
    assert torch.equal(both.cos[8:16], frame.cos)
    assert torch.equal(both.cos[16:], frame.cos)
    assert both.cos.shape == (24, 1, 4)
