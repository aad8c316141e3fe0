"""KelixDiT: condition tokens and a noisy latent in, flow velocity out (SANA, Xie et al. 2024).

A sampler pays for the condition and for the timesteps once (`prepare_condition`,
`prepare_modulation`) and then runs `forward_cached` per denoise step, which neither reads the
condition again nor synchronises with the host. `velocity` does all of it in one call.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kelix_rt import ops
from kelix_rt.config import SanaConfig, read_config
from kelix_rt.errors import ConfigError, InputError
from kelix_rt.models.dit_blocks import NORM_EPS, Block, Rotary
from kelix_rt.models.dit_condition import ConditionCache, length_mask, pack_condition
from kelix_rt.models.dit_patches import patch_grid, patchify, unpatchify
from kelix_rt.models.dit_positions import (
    PIXELS_PER_CONDITION_TOKEN,
    condition_positions,
    latent_tables,
    rotary_angles,
    timestep_embedding,
)
from kelix_rt.models.dit_weights import UNUSED, check_options, condition_rows, weight_map
from kelix_rt.models.products import Linear
from kelix_rt.weights import Checkpoint, OnTensor, load_weights

__all__ = ["KelixDiT", "weight_map"]

Layout = tuple[int, int, int | None]  # capacity, grid_length, image_size: see ConditionCache

CONNECTOR_EPS = 1e-5
TIME_WIDTH = 256
MODULATIONS = 6  # shift, scale, gate of the self-attention, then of the feed-forward


class KelixDiT(nn.Module):
    """The image de-tokenizer. Built on the meta device; `load_weights` with `weight_map` fills it.

    condition_rows: rows of the unconditional embedding, which the checkpoint's tensor decides
    (`dit_weights.condition_rows`); config.model_max_length when None. Raises ConfigError for
    rotary cross-attention with patch_size > 1, whose positions are undefined.
    """

    def __init__(self, config: SanaConfig, condition_rows: int | None = None) -> None:
        super().__init__()
        if config.use_cross_attn_rope and config.patch_size > 1:
            raise ConfigError(
                "use_cross_attn_rope must be false with patch_size > 1 (positions are those of "
                f"latent pixels, not patches), got patch_size {config.patch_size}"
            )
        self.config = config
        width, captions = config.hidden_size, config.caption_channels
        rows = condition_rows or config.model_max_length
        area = config.patch_size**2
        self.out_channels = config.in_channels * (2 if config.pred_sigma else 1)
        with torch.device("meta"):
            self.x_embedder = Linear(config.in_channels * area, width)
            self.time_in = Linear(TIME_WIDTH, width)
            self.time_out = Linear(width, width)
            self.time_modulation = Linear(width, MODULATIONS * width)
            if config.use_connector:
                self.connector_in = Linear(config.connector_channels or captions, captions)
                self.connector_out = Linear(captions, captions)
                self.connector_norm = nn.Parameter(torch.empty(captions))
            self.caption_in = Linear(captions, width)
            self.caption_out = Linear(width, width)
            self.y_norm = nn.Parameter(torch.empty(width)) if config.y_norm else None
            self.y_embedding = nn.Parameter(torch.empty(rows, captions))
            self.modulation_table = nn.Parameter(torch.empty(MODULATIONS * config.depth + 2, width))
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.final = Linear(width, area * self.out_channels)
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        on_tensor: OnTensor | None = None,
    ) -> KelixDiT:
        """Loads a checkpoint directory; dtype None keeps its own, on_tensor as in `load_weights`.

        Raises ConfigError, or WeightError for missing, misshapen or non-finite tensors and for
        config options that the tensors contradict.
        """
        config = read_config(path)
        if not isinstance(config, SanaConfig):
            raise ConfigError(f"KelixDiT: {path} must hold a SanaConfig, got {type(config)}")
        checkpoint = Checkpoint(path)
        check_options(config, checkpoint)
        model = cls(config, condition_rows(checkpoint))
        load_weights(
            model,
            checkpoint,
            weight_map(config),
            device=device,
            dtype=dtype,
            unused=UNUSED,
            on_tensor=on_tensor,
        )
        return model.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return self.x_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.x_embedder.weight.device

    @property
    def condition_channels(self) -> int:
        """Channels of a condition token: the connector's input, or the caption space without it."""
        config = self.config
        return (config.use_connector and config.connector_channels) or config.caption_channels

    def velocity(
        self,
        latent: Tensor,
        timestep: Tensor | float,
        condition: Tensor,
        mask: Tensor | None = None,
        grid_length: int | None = None,
        image_size: int | None = None,
    ) -> Tensor:
        """One evaluation: latent [B, Cin, h, w] -> velocity (noise - clean) of the same shape.

        timestep [B], or one number for all, truncated to integers; condition [B, L, K] or
        [B, 1, L, K]; mask [B, L] or [B, 1, 1, L], non-zero = real. grid_length, image_size: see
        `prepare_condition`. The result has the model's dtype. Raises InputError for shapes that do
        not fit and for empty conditions.
        """
        cache = self.prepare_condition(condition, mask, grid_length, image_size=image_size)
        times = torch.as_tensor(timestep)
        if times.dim() == 0:
            times = times.repeat(latent.shape[0])
        return self.forward_cached(latent, self.prepare_modulation(times), cache)

    def prepare_condition(
        self,
        condition: Tensor,
        mask: Tensor | None = None,
        grid_length: int | None = None,
        capacity: int | None = None,
        image_size: int | None = None,
    ) -> ConditionCache:
        """Connector, caption projection and every block's cross-attention keys and values.

        Masked tokens are dropped, so rows may have different lengths and padding costs nothing.
        With rotary cross-attention, positions depend on the padded length (capacity; L when None),
        on one token count for the whole batch (grid_length; row 0's when None, as in the release)
        and, stretched onto the picture, on its side in pixels (image_size; the config's when
        None). Without it none plays a part. Raises InputError as `pack_condition` does.
        """
        packed = pack_condition(condition, mask, self.condition_channels)
        tokens = self.connect(packed.tokens.to(device=self.device, dtype=self.dtype))
        capacity = capacity or packed.capacity
        grid_length = grid_length or packed.lengths[0]
        layout = (capacity, grid_length, image_size)
        return self._cache(tokens, packed.lengths, layout, packed.index)

    def unconditional(
        self,
        batch: int,
        capacity: int | None = None,
        grid_length: int | None = None,
        image_size: int | None = None,
    ) -> ConditionCache:
        """The condition of the guidance's other half: the stored embedding, all rows attended.

        At most `capacity` rows (all when None); grid_length and image_size as in
        `prepare_condition`. The embedding is already in caption space and passes no connector.
        Rows share their memory.
        """
        rows = self.y_embedding[:capacity].unsqueeze(0)
        length = rows.shape[1]
        layout = (capacity or length, grid_length or length, image_size)
        one = self._cache(rows, (length,), layout, None)
        keys = tuple(k.expand(batch, -1, -1, -1) for k in one.keys)
        values = tuple(v.expand(batch, -1, -1, -1) for v in one.values)
        return ConditionCache(keys, values, None, (length,) * batch, *layout)

    def prepare_modulation(self, timesteps: Tensor) -> Tensor:
        """timesteps [S] -> [6 * depth + 2, S, C]: per block shift, scale, gate twice, then final.

        A sampler prepares all its timesteps at once and hands `forward_cached` the columns of
        its batch. Raises InputError for another shape.
        """
        if timesteps.dim() != 1 or len(timesteps) == 0:
            raise InputError(f"timesteps must have shape [B], got {list(timesteps.shape)}")
        time = self.embed_time(timesteps)
        shared = self.block_time(time).unflatten(1, (MODULATIONS, -1)).transpose(0, 1)
        table = self.modulation_table.unsqueeze(1)
        blocks = table[:-2] + shared.repeat(self.config.depth, 1, 1)
        return torch.cat((blocks, table[-2:] + time))

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """timesteps [S] -> time embedding [S, C]; the final layer adds it without activation."""
        waves = timestep_embedding(timesteps.to(self.device), TIME_WIDTH).to(self.dtype)
        return self.time_out(F.silu(self.time_in(waves)))

    def block_time(self, time: Tensor) -> Tensor:
        """Time embedding [S, C] -> the modulation all blocks share, [S, 6C]."""
        return self.time_modulation(F.silu(time))

    def connect(self, condition: Tensor) -> Tensor:
        """Condition [B, L, K] -> caption space [B, L, P]; the identity without a connector."""
        if not self.config.use_connector:
            return condition
        hidden = F.gelu(self.connector_in(condition), approximate="tanh")
        return ops.rms_norm(self.connector_out(hidden), self.connector_norm, CONNECTOR_EPS)

    def project_caption(self, tokens: Tensor) -> Tensor:
        """Caption space [B, L, P] -> the model's width [B, L, C]."""
        return self.caption_out(F.gelu(self.caption_in(tokens), approximate="tanh"))

    def normalise_caption(self, y: Tensor) -> Tensor:
        """The norm in front of all cross-attentions; the identity if the config has none."""
        return y if self.y_norm is None else ops.rms_norm(y, self.y_norm, self.config.norm_eps)

    def _cache(
        self,
        tokens: Tensor,
        lengths: tuple[int, ...],
        layout: Layout,
        index: Tensor | None,
    ) -> ConditionCache:
        rotary = self._condition_rotary(layout, tokens.shape[1], index)
        y = self.normalise_caption(self.project_caption(tokens))
        pairs = [block.cross.keys_values(y, rotary) for block in self.blocks]  # type: ignore[union-attr, operator]
        keys, values = zip(*pairs, strict=True)
        mask = length_mask(lengths, self.device)
        return ConditionCache(keys, values, mask, lengths, *layout)

    def _condition_rotary(self, layout: Layout, length: int, index: Tensor | None) -> Rotary | None:
        config = self.config
        if not config.use_cross_attn_rope:
            return None
        capacity, grid_length, image_size = layout
        pixels = image_size or config.input_size * config.vae_downsample_rate
        side = pixels // PIXELS_PER_CONDITION_TOKEN
        positions = condition_positions(
            capacity, grid_length, side if config.use_position_scale else None
        ).to(self.device)
        positions = positions[:length] if index is None else positions[index.to(self.device)]
        angles = rotary_angles(positions, config.hidden_size // config.num_heads).unsqueeze(-2)
        return angles.cos(), angles.sin()

    def forward_cached(self, latent: Tensor, modulation: Tensor, cache: ConditionCache) -> Tensor:
        """latent [B, Cin, h, w], modulation [6 * depth + 2, B, C], B cached conditions -> velocity.

        Any float dtype of latent; the result has the model's. Raises InputError for other shapes.
        """
        grid = self._grid(latent, modulation, cache)
        x = self.embed_latent(latent)
        places, rotary = latent_tables(self.config, grid, x.dtype, x.device)
        if places is not None:
            x = x + places
        for i, block in enumerate(self.blocks):
            part = modulation[MODULATIONS * i : MODULATIONS * (i + 1)]
            x = block(x, part, grid, cache.keys[i], cache.values[i], cache.mask, rotary)
        return self.read_out(self.project_out(x, modulation), grid)

    def _grid(self, latent: Tensor, modulation: Tensor, cache: ConditionCache) -> tuple[int, int]:
        grid = patch_grid(latent, self.config.in_channels, self.config.patch_size)
        batch = len(latent)
        if modulation.shape[1] != batch or cache.batch != batch:
            raise InputError(
                f"latent, timesteps and condition must have one batch size, got {batch}, "
                f"{modulation.shape[1]} and {cache.batch}"
            )
        return grid

    def embed_latent(self, latent: Tensor) -> Tensor:
        """latent [B, Cin, h, w] -> tokens [B, N, C]: a convolution with stride = kernel = patch."""
        latent = latent.to(device=self.device, dtype=self.dtype)
        return self.x_embedder(patchify(latent, self.config.patch_size))

    def project_out(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Final layer: tokens [B, N, C] -> [B, N, patch * patch * out_channels]."""
        return self.final(ops.modulate(x, modulation[-2], modulation[-1], NORM_EPS))

    def read_out(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of the final layer -> velocity [B, Cin, height, width].

        A predicted variance (pred_sigma) is the second half of the channels and is dropped.
        """
        config = self.config
        return unpatchify(tokens, grid, config.patch_size, self.out_channels)[
            :, : config.in_channels
        ]
