"""Where the packed patches of several images lie: segments, positions, merge order.

Patches of all images are one sequence, each image in raster order (frame, row, column).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kelix_rt.errors import InputError

MERGE = 2  # patches are merged 2x2 into one token
PATCHES_PER_TOKEN = MERGE * MERGE

Grid = tuple[int, int, int]


def read_grids(image_grid_thw: Tensor) -> tuple[Grid, ...]:
    """Integer tensor [n, 3] of (frames, rows, columns) in patches as tuples.

    Raises InputError for another shape or dtype, empty grids, and odd rows or columns.
    """
    if (
        image_grid_thw.ndim != 2
        or image_grid_thw.shape[1] != 3
        or image_grid_thw.is_floating_point()
    ):
        raise InputError(
            "image_grid_thw must be integers of shape [images, 3], got "
            f"{image_grid_thw.dtype} {list(image_grid_thw.shape)}"
        )
    grids = tuple((int(t), int(h), int(w)) for t, h, w in image_grid_thw.tolist())
    if not grids or any(min(grid) < 1 or grid[1] % MERGE or grid[2] % MERGE for grid in grids):
        raise InputError(
            "image_grid_thw must hold positive numbers of patches with even rows and columns, "
            f"got {[list(grid) for grid in grids]}"
        )
    return grids


def check_patches(pixel_values: Tensor, grids: tuple[Grid, ...], channels: int, side: int) -> None:
    """Raises InputError unless pixel_values is floating [patches, channels, side, side]."""
    patches = sum(t * h * w for t, h, w in grids)
    expected = (patches, channels, side, side)
    if tuple(pixel_values.shape) != expected or not pixel_values.is_floating_point():
        raise InputError(
            f"pixel_values must be floating with shape {list(expected)} for grids "
            f"{[list(grid) for grid in grids]}, got {pixel_values.dtype} {list(pixel_values.shape)}"
        )


def rope_table(base: float, head_dim: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [size, head_dim / 4] of the angles of positions 0..size-1 along one axis.

    The released model computes frequencies, angles, cos and sin in the dtype of the queries; in
    bfloat16 the angles are off by up to 0.2 rad at 74 positions, and the weights were trained so.
    """
    steps = torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2)
    inv_freq = (1.0 / base**steps).to(dtype)
    angles = torch.arange(size).to(dtype)[:, None] * inv_freq
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of x [N, heads, hd] by cos and sin [N, 1, hd / 2], float32 inside."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def resample_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Learned positions [G * G, D] stretched to [rows * columns, D]: bilinear, edges not aligned.

    Interpolated in float32 and rounded once to the table's dtype.
    """
    side = round(table.shape[0] ** 0.5)
    if (rows, columns) == (side, side):
        return table
    square = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(rows, columns), mode="bilinear", align_corners=False)
    return resized[0].permute(1, 2, 0).reshape(rows * columns, -1).to(table.dtype)


@dataclass(frozen=True)
class PatchLayout:
    """Everything about a packed sequence that does not depend on the pixels.

    grids: (frames, rows, columns) per image. lengths: patches per image, one attention segment each
    (all frames of an entry together). cos, sin: [N, 1, hd / 2] float32. merge_order: [N] int64, the
    patches of token 0, then of token 1, ...
    """

    grids: tuple[Grid, ...]
    lengths: tuple[int, ...]
    cos: Tensor
    sin: Tensor
    merge_order: Tensor

    @classmethod
    def of(
        cls,
        grids: tuple[Grid, ...],
        rope_base: float,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PatchLayout:
        """Builds the layout on the CPU and moves it to `device` at once."""
        cells = [
            torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w))
            for t, h, w in grids
        ]
        _, row, column = torch.cat(cells).unbind(1)
        tables = rope_table(rope_base, head_dim, max(max(h, w) for _, h, w in grids), dtype)
        cos, sin = (
            torch.cat([table[row], table[column]], dim=-1).float().unsqueeze(1).to(device)
            for table in tables
        )
        lengths = tuple(t * h * w for t, h, w in grids)
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        order = [start + _merge_order(grid) for start, grid in zip(starts, grids, strict=True)]
        return cls(grids, lengths, cos, sin, torch.cat(order).to(device))


def _merge_order(grid: Grid) -> Tensor:
    frames, rows, columns = grid
    index = torch.arange(frames * rows * columns)
    windows = index.view(frames, rows // MERGE, MERGE, columns // MERGE, MERGE)
    return windows.transpose(2, 3).reshape(-1)
