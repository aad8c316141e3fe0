"""Position tables of the image DiT: timestep embedding, 2-D sine table, 2-D rotary angles.

None of them is stored in a checkpoint. Tables that depend on sizes alone are cached per device.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from kelix_rt.config import SanaConfig

MAX_PERIOD = 10000.0
PIXELS_PER_CONDITION_TOKEN = 28


def timestep_embedding(timestep: Tensor, width: int = 256) -> Tensor:
    """[cos(t f), sin(t f)] with geometric frequencies; timestep [B] -> [B, width] float32.

    The timestep is truncated to an integer first: the model was trained on integers and differs
    visibly (13 % of the velocity at tiny size) when it sees the fraction.
    """
    frequencies = _time_frequencies(width // 2, timestep.device)
    angles = timestep.to(torch.int64).float().unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # an inference tensor kept here could never be trained with
def _time_frequencies(count: int, device: torch.device) -> Tensor:
    """Computed on the CPU for all devices: a GPU's exp is another in the last place of some, and a
    timestep near 1000 turns that into a visibly other velocity."""
    steps = torch.arange(count, dtype=torch.float32)
    return torch.exp(-math.log(MAX_PERIOD) * steps / count).to(device)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # an inference tensor kept here could never be trained with
def sincos_table(
    height: int,
    width: int,
    channels: int,
    base: int,
    interpolation: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """2-D sine position table [height * width, channels], row-major over a grid of tokens.

    The first half of the channels encodes the column, the second half the row; positions are
    scaled so that `base` tokens span the trained side, then divided by `interpolation`.
    """
    quarter = channels // 4
    order = torch.arange(quarter, dtype=torch.float64)
    frequencies = MAX_PERIOD ** (-order / quarter)

    def encode(count: int) -> Tensor:
        line = torch.arange(count, dtype=torch.float32) / (count / base) / interpolation
        angles = line.double().unsqueeze(1) * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    columns = encode(width).repeat(height, 1)
    rows = encode(height).repeat_interleave(width, dim=0)
    return torch.cat((columns, rows), dim=1).to(dtype=dtype, device=device)


def grid_positions(height: int, width: int) -> Tensor:
    """Row-major (row, column) of a height x width grid: [height * width, 2] int64."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((rows.reshape(-1), columns.reshape(-1)), dim=1)


def condition_grid(capacity: int, length: int) -> tuple[int, int]:
    """Rows and columns of the grid on which `length` condition tokens are laid.

    The rows are those of the largest square that `capacity` (the padded condition length) holds;
    the columns are as many as the tokens need. The tokens' true structure plays no part.
    """
    rows = max(1, math.isqrt(capacity))
    return rows, max(1, math.ceil(length / rows))


def condition_positions(capacity: int, length: int, image_grid: int | None = None) -> Tensor:
    """(row, column) of each of `capacity` condition tokens, [capacity, 2] int64.

    length: valid tokens before truncation. Tokens past the grid get (0, 0). image_grid: side of
    the image in condition tokens; given, positions are stretched onto it (never shrunk).
    """
    rows, columns = condition_grid(capacity, length)
    grid = grid_positions(rows, columns)
    if image_grid is not None:
        # An int64 tensor times a Python number is float32; the truncation depends on it.
        stretched = (
            grid[:, 0] * max(1.0, image_grid / rows),
            grid[:, 1] * max(1.0, image_grid / columns),
        )
        grid = torch.stack(stretched, dim=1).long()
    positions = grid.new_zeros(capacity, 2)
    used = min(capacity, len(grid))
    positions[:used] = grid[:used]
    return positions


def rotary_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Angles [..., head_dim / 2] float32 of (row, column) positions [..., 2].

    The first half turns with the row, the second with the column. The angles are float32
    whatever the model's dtype, because bfloat16 ones would carry 8 significant bits.
    """
    order = torch.arange(head_dim // 4, dtype=torch.float32)
    frequencies = MAX_PERIOD ** (-2 * order / (head_dim // 2))
    frequencies = frequencies.to(positions.device)
    return (positions.float().unsqueeze(-1) * frequencies).flatten(-2)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # an inference tensor kept here could never be trained with
def image_rotary(
    height: int, width: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [height * width, 1, head_dim / 2] float32 for the image tokens."""
    angles = rotary_angles(grid_positions(height, width), head_dim).unsqueeze(1).to(device)
    return angles.cos(), angles.sin()


def latent_tables(
    config: SanaConfig, grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """What tells the tokens of a latent their places, each None where the config has no such thing.

    The table that is added to them, [h * w, C], and the rotation of their queries (cos, sin).
    """
    added = rotary = None
    if config.use_pe:
        base = config.input_size // config.patch_size
        width, scale = config.hidden_size, config.pe_interpolation
        added = sincos_table(*grid, width, base, scale, dtype, device)
    if config.use_cross_attn_rope:
        rotary = image_rotary(*grid, config.hidden_size // config.num_heads, device)
    return added, rotary


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of the last dimension in float32, returned in x's dtype.

    x [..., heads, D]; cos, sin broadcast to [..., heads, D / 2].
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
