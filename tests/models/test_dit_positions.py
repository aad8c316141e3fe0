"""Position tables: the rules the golden outputs do not reach."""

from __future__ import annotations

import math

import pytest
import torch

from kelix_rt.models.dit_positions import (
    condition_grid,
    condition_positions,
    grid_positions,
    rotary_angles,
    rotate,
    sincos_table,
    timestep_embedding,
)


@pytest.mark.parametrize(
    ("capacity", "length", "grid"),
    [
        (720, 442, (26, 17)),
        (720, 443, (26, 18)),
        (720, 720, (26, 28)),
        (720, 1, (26, 1)),
        (720, 900, (26, 35)),
        (1, 1, (1, 1)),
        (25, 25, (5, 5)),
    ],
)
def test_condition_grid(capacity: int, length: int, grid: tuple[int, int]) -> None:
    assert condition_grid(capacity, length) == grid


def test_grid_larger_than_the_capacity_is_cut() -> None:
    positions = condition_positions(720, 720)
    assert positions.shape == (720, 2)
    assert torch.equal(positions, grid_positions(26, 28)[:720])


def test_grid_smaller_than_the_capacity_is_followed_by_zeros() -> None:
    positions = condition_positions(24, 13)
    assert torch.equal(positions[:16], grid_positions(4, 4))
    assert not positions[16:].any()


def test_position_scale_is_a_fraction_and_never_shrinks() -> None:
    """9/4 of 0..3 is 0, 2.25, 4.5, 6.75; with 9 // 4 it would be 0, 2, 4, 6."""
    rows = condition_positions(24, 13, image_grid=9)[:16, 0].unique()
    assert rows.tolist() == [0, 2, 4, 6]
    rows = condition_positions(24, 13, image_grid=11)[:16, 0].unique()
    assert rows.tolist() == [0, 2, 5, 8]
    assert torch.equal(condition_positions(24, 13, image_grid=2), condition_positions(24, 13))


def test_timesteps_are_truncated_toward_zero() -> None:
    got = timestep_embedding(torch.tensor([874.99994, 0.9]))
    assert torch.equal(got, timestep_embedding(torch.tensor([874.0, 0.0])))
    assert got.dtype == torch.float32 and got.shape == (2, 256)
    assert got[0, 5].item() == pytest.approx(
        math.cos(874 * math.exp(-math.log(1e4) * 5 / 128)), abs=1e-4
    )


def test_rotation_keeps_lengths_and_depends_on_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, generator=generator).unbind(0)

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        angles = rotary_angles(torch.tensor([a, b]), 8)
        turned = [rotate(x, y.cos(), y.sin()) for x, y in zip((q, k), angles, strict=True)]
        assert turned[0].norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
        return float((turned[0] * turned[1]).sum())

    assert score((1, 2), (4, 9)) == pytest.approx(score((3, 0), (6, 7)), abs=1e-5)
    assert score((1, 2), (4, 9)) != pytest.approx(score((2, 1), (9, 4)), abs=1e-3)


def test_sincos_table_puts_columns_first() -> None:
    table = sincos_table(2, 3, 8, 3, 1.0, torch.float64, torch.device("cpu"))
    assert table.shape == (6, 8)
    assert torch.equal(table[0, :4], table[3, :4]) and torch.equal(table[0, 4:], table[2, 4:])
    assert table[1, 0].item() == pytest.approx(math.sin(1.0))
    assert table[3, 4].item() == pytest.approx(math.sin(1.5))  # 2 rows stretched over 3
