"""The render stage: condition -> latent, one denoise step per call -> image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kelix_rt.errors import ConfigError, InputError, KelixError
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.vae import Autoencoder, decode, to_uint8
from kelix_rt.params import SEED_LIMIT
from kelix_rt.request import RenderParams
from kelix_rt.stages.denoise import Denoiser, RenderState, sample

if TYPE_CHECKING:
    from PIL import Image

    from kelix_rt.weights import OnTensor

__all__ = ["RenderStage", "RenderState", "sample", "to_picture"]

MAX_CONDITION_LENGTH = 720
MAX_PIXELS = 2048 * 2048


class RenderStage:
    """Owns the image DiT and its autoencoder; takes requests through start, step..., finish.

    max_condition_length: longer conditions are cut; it is also the padded length that rotary
    positions are laid out for, and the most rows of the unconditional embedding that guidance
    uses. max_pixels: of one drawing. Raises ConfigError when the autoencoder does not fit the DiT's
    latents.
    """

    def __init__(
        self,
        dit: KelixDiT,
        vae: Autoencoder,
        max_condition_length: int = MAX_CONDITION_LENGTH,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        config = dit.config
        pairs = (
            ("vae_downsample_rate", config.vae_downsample_rate, vae.rate),
            ("in_channels", config.in_channels, vae.latent_channels),
        )
        for field, expected, got in pairs:
            if expected != got:
                raise ConfigError(
                    f"{field} must agree between DiT and autoencoder, got {expected} and {got}"
                )
        self.dit = dit
        self.vae = vae
        self.max_condition_length = max_condition_length
        self.max_pixels = max_pixels
        self.denoiser = Denoiser(dit)

    @classmethod
    def from_pretrained(
        cls,
        dit: str | Path,
        vae: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        max_condition_length: int = MAX_CONDITION_LENGTH,
        max_pixels: int = MAX_PIXELS,
        on_tensor: OnTensor | None = None,
    ) -> RenderStage:
        """Loads the DiT and opens the autoencoder; dtype None takes what the DiT stores.

        on_tensor: called with (name, bytes) after each tensor of the DiT.
        """
        model = KelixDiT.from_pretrained(dit, device, dtype, on_tensor)
        own = Autoencoder(vae, device, model.dtype)
        return cls(model, own, max_condition_length, max_pixels)

    def start(self, condition: Tensor, params: RenderParams) -> RenderState:
        """Prepares one image from the hidden states of its blocks, [n, K] or [1, n, K].

        The starting noise is params.latent, or float32 normal values drawn on the CPU from
        params.seed (a fresh seed when None), so one seed gives one image on every device. The
        release draws on its GPU in bfloat16: its noise for a seed is another one.
        Raises InputError for a size or latent that does not fit, or a condition that is empty,
        misshapen or not finite.
        """
        if condition.dim() == 2:
            condition = condition.unsqueeze(0)
        if condition.dim() != 3 or len(condition) != 1 or condition.shape[1] == 0:
            raise InputError(
                f"condition must have shape [n, K] or [1, n, K] with n above 0, "
                f"got {list(condition.shape)}"
            )
        latent, seed = self._noise(params)
        cache = self.dit.prepare_condition(
            condition[:, : self.max_condition_length],
            grid_length=condition.shape[1],
            capacity=self.max_condition_length,
        )
        return self.denoiser.start(
            cache, latent, params.steps, params.cfg, params.shift, params.scheduler, seed
        )

    def step(self, states: Sequence[RenderState]) -> None:
        """One denoise step of every state, batched where latent sizes agree."""
        self.denoiser.step(states)

    def finish(self, state: RenderState) -> Image.Image:
        """Decodes a state that has taken all its steps. Raises InputError before that, KelixError
        where what was painted are no numbers."""
        pixels, finite = self.pixels(state)
        return to_picture(pixels.cpu(), finite.cpu())

    def pixels(self, state: RenderState) -> tuple[Tensor, Tensor]:
        """As `finish`, but pixels uint8 [H, W, 3] and whether they are of numbers, bool [], on the
        device, which is not waited for."""
        if not state.done:
            raise InputError(f"finish: {state.index} of {state.steps} steps were taken")
        self.denoiser.release(state)
        painted = decode(self.vae.module, state.latent)
        return to_uint8(painted)[0], painted.isfinite().all()

    def sized(self, params: RenderParams) -> RenderParams:
        """The same with both sides in pixels, and with a copy of its latent, which is read when
        all blocks are there. Raises what `latent_shape` raises."""
        rate = self.dit.config.vae_downsample_rate
        height, width = (side * rate for side in self.latent_shape(params)[2:])
        latent = None if params.latent is None else params.latent.detach().clone()
        return replace(params, height=height, width=width, latent=latent)

    def latent_shape(self, params: RenderParams) -> tuple[int, int, int, int]:
        """[1, C, h, w] of a request; sizes not given come from its latent, else the model's.

        Raises InputError for sizes that are not multiples of what one patch covers or more than
        `max_pixels`, and for a latent of another shape or not finite.
        """
        config = self.dit.config
        rate = config.vae_downsample_rate
        given = params.latent
        if given is not None and not (isinstance(given, Tensor) and given.is_floating_point()):
            kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise InputError(f"latent must be a floating tensor, got {kind}")
        sides = [config.input_size * rate] * 2
        if given is not None and given.dim() == 4:
            sides = [side * rate for side in given.shape[2:]]
        height = sides[0] if params.height is None else params.height
        width = sides[1] if params.width is None else params.width
        unit = rate * config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size < unit or size % unit:
                raise InputError(f"{name} must be a positive multiple of {unit}, got {size}")
        if height * width > self.max_pixels:
            raise InputError(
                f"a drawing must have at most {self.max_pixels} pixels (max_drawn_pixels), got "
                f"{height} x {width}"
            )
        shape = (1, config.in_channels, height // rate, width // rate)
        if given is not None and tuple(given.shape) != shape:
            raise InputError(
                f"latent must have shape {list(shape)} for {height}x{width} pixels, "
                f"got {list(given.shape)}"
            )
        if given is not None and not math.isfinite(float(given.float().abs().max())):
            raise InputError("latent holds NaN or infinity")
        return shape

    def _noise(self, params: RenderParams) -> tuple[Tensor, int | None]:
        shape = self.latent_shape(params)
        if params.latent is not None:
            return params.latent, None
        generator = torch.Generator()
        seed = generator.seed() % SEED_LIMIT if params.seed is None else params.seed
        return torch.randn(shape, generator=generator.manual_seed(seed)), seed


def to_picture(pixels: Tensor, finite: Tensor) -> Image.Image:
    """A picture of pixels uint8 [H, W, 3] on the CPU. Raises KelixError unless they are finite."""
    from PIL import Image

    if not bool(finite):
        raise KelixError(
            "drawing: the painted pixels are not finite; the weights of the DiT or its VAE, the "
            "guidance or the dtype drive them out of range"
        )
    return Image.fromarray(pixels.numpy())
