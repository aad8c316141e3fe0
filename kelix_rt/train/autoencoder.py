"""The latent autoencoder: diffusers' AutoencoderDC at small size, trained to give pictures back.

Stage 1 on parts from anywhere in pictures. Stage 2, the decoder alone, on parts with things and
words, of plain pictures as well: edges of what is small are learned last. Latents are those of
stage 1.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kelix_rt.errors import ConfigError
from kelix_rt.train.ahead import Ahead, workers_for
from kelix_rt.train.loop import StageResult, run_stage
from kelix_rt.train.pictures import ALL_SCENES, scene_of, to_images, to_pixels
from kelix_rt.train.recipe import Recipe, Sizes
from kelix_rt.train.sheet import picture_rows
from kelix_rt.train.states import load_modules
from kelix_rt.train.world import draw
from kelix_rt.train.world_draw import BAND_HEIGHTS, CELL_CENTRES
from kelix_rt.train.world_scene import Scene, plain, strange

if TYPE_CHECKING:
    from diffusers import AutoencoderDC

STAGES = ("1", "2")
CLOSE = "2"  # the decoder's stage, close to things and words
CLOSE_MARGIN = 24  # least distance of their middles from the edge of a part, in pixels
SQUARE_WEIGHT = 4.0
LATENT_WEIGHT = 1e-3
CROP = 128  # side of what is cut out of a picture: four times the pictures for the same work
BRANCH_START = 0.1  # of the residual branches' norms; at 1, each adds noise as large as its input
MEASURED = 64  # pictures the scale of the latents is measured on
SHOWN, SHOWN_EVERY = 8, 500  # pictures on a sheet, steps between sheets
WIDEST, NARROWEST = 64, 8


def new_autoencoder(sizes: Sizes, device: torch.device | str, seed: int) -> AutoencoderDC:
    """A small AutoencoderDC of the recipe's compression and latent channels, random weights.

    Raises ConfigError for a compression that is no power of two.
    """
    from diffusers import AutoencoderDC
    from diffusers.models.autoencoders.autoencoder_dc import ResBlock

    levels = sizes.latent_rate.bit_length()
    if 2 ** (levels - 1) != sizes.latent_rate:
        raise ConfigError(f"latent_rate must be a power of two, got {sizes.latent_rate}")
    # Twice as wide at each level; shortcuts of the levels need widths that divide each other.
    widths = tuple(min(WIDEST, NARROWEST * 2**level) for level in range(levels))
    # Few layers where pixels are many: a step then takes a third of the time. The finest level only
    # resamples.
    layers = (0, *[1, 1, *[2] * levels][: levels - 1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderDC(
            latent_channels=sizes.latent_channels,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=layers,
            decoder_layers_per_block=layers,
            encoder_qkv_multiscales=((),) * levels,
            decoder_qkv_multiscales=((),) * levels,
            upsample_block_type="interpolate",  # as the release; a quarter of the other's weights
            scaling_factor=1.0,
        )
    for block in vae.modules():
        if isinstance(block, ResBlock):
            nn.init.constant_(block.norm.weight, BRANCH_START)
    return vae.to(device)


def picture_loss(got: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """loss = l1 + 4 squared: mean absolute and mean squared errors of pixels.

    Pixels [B, 3, H, W] in -1..1. Most of a picture is background: without the squares the median
    of a place, and so no thing at all, is a good answer for long.
    """
    error = (got - wanted).float()
    losses = {"l1": error.abs().mean(), "squared": error.square().mean()}
    return {"loss": losses["l1"] + SQUARE_WEIGHT * losses["squared"], **losses}


def close(starts: Sequence[int], size: int, place: float) -> Sequence[int]:
    """The starts of windows that hold a place, `CLOSE_MARGIN` from their ends, or all if none does.

    All in pixels; size: of a window.
    """
    ends = CLOSE_MARGIN, size - CLOSE_MARGIN
    return [start for start in starts if ends[0] <= place - start <= ends[1]] or starts


def _middles(scene: Scene) -> list[tuple[float, float]]:
    """Where things and the word lie, (x, y) as fractions of the side."""
    words = [] if scene.word is None else [(0.5, BAND_HEIGHTS[scene.band])]
    return [*(CELL_CENTRES[thing.cell] for thing in scene.things), *words]


@dataclass
class AutoencoderTrainer:
    """Everything the training needs. out: where the checkpoints go."""

    recipe: Recipe
    out: Path
    device: torch.device | str = "cpu"
    vae: AutoencoderDC = field(init=False)

    def __post_init__(self) -> None:
        self.vae = new_autoencoder(self.recipe.sizes, self.device, self.recipe.seed)

    def run(self, stages: Sequence[str] = STAGES, **options: Any) -> StageResult:
        """Trains the stages in order, each from the checkpoint of the one before it, then measures
        the scale of the latents.

        options: further arguments of `run_stage`. Raises as it does, and ConfigError where the
        checkpoint of an earlier stage is missing or does not fit.
        """
        result = None
        for name in stages:
            result = self._run(name, options)
        if result is None:
            raise ValueError("AutoencoderTrainer.run: no stage was named")
        return result

    def batch(self, name: str, step: int) -> Tensor:
        """Parts of pictures [B, 3, h, w] float32 in -1..1 of step `step`, on the CPU."""
        rng = random.Random(f"kelix autoencoder {self.recipe.seed} {name} {step}")
        count, sizes = self.recipe.autoencoder[name].batch, self.recipe.sizes
        scenes = [scene_of(rng.randrange(ALL_SCENES), self.recipe.seed) for _ in range(count)]
        scenes = [*scenes[count // 4 :], *(strange(s, rng) for s in scenes[: count // 4])]
        if name == CLOSE:
            scenes[::2] = map(plain, scenes[::2])
        size = min(CROP, sizes.drawn_side)
        starts = range(0, sizes.drawn_side - size + 1, sizes.latent_rate)
        parts = []
        for scene, picture in zip(scenes, self._drawn(scenes), strict=True):
            rows: Sequence[int] = starts
            columns: Sequence[int] = starts
            if name == CLOSE and (middles := _middles(scene)):
                across, down = (sizes.drawn_side * place for place in rng.choice(middles))
                rows, columns = close(starts, size, down), close(starts, size, across)
            y, x = rng.choice(rows), rng.choice(columns)
            parts.append(picture[:, y : y + size, x : x + size])
        return torch.stack(parts)

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """`picture_loss` of pictures and what comes back of them; latents are kept from growing."""
        pixels = pixels.to(self.device)
        latent = self.vae.encode(pixels).latent
        losses = picture_loss(self.vae.decode(latent).sample, pixels)
        losses["latent"] = latent.float().square().mean()
        return losses | {"loss": losses["loss"] + LATENT_WEIGHT * losses["latent"]}

    @torch.no_grad()
    def set_scale(self) -> None:
        """Sets the config's scaling_factor so that scaled latents have a standard deviation of 1.

        The DiT's noise has that scale.
        """
        parts = [
            self.vae.encode(self._pictures([i]).to(self.device)).latent.float()
            for i in range(min(MEASURED, self.recipe.pictures))
        ]
        self.vae.register_to_config(scaling_factor=1 / float(torch.cat(parts).std()))

    def export(self, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes the autoencoder as diffusers loads it; the trained one keeps its dtype."""
        twin = new_autoencoder(self.recipe.sizes, "cpu", 0)
        twin.load_state_dict(self.vae.state_dict())
        twin.register_to_config(scaling_factor=self.vae.config.scaling_factor)
        twin.to(dtype).save_pretrained(str(directory))

    def _pictures(self, indices: Sequence[int]) -> Tensor:
        return self._drawn([scene_of(i, self.recipe.seed) for i in indices])

    def _drawn(self, scenes: Sequence[Scene]) -> Tensor:
        return to_pixels([draw(scene, self.recipe.sizes.drawn_side) for scene in scenes])

    @torch.no_grad()
    def _show(self, name: str, step: int) -> None:
        """Every so often: pictures above what comes back of them, as autoencoder-<stage>.png."""
        if step % SHOWN_EVERY and step != self.recipe.autoencoder[name].steps:
            return
        pixels = self._pictures(list(range(SHOWN)))
        again = self.vae.decode(self.vae.encode(pixels.to(self.device)).latent).sample
        rows = to_images(pixels), to_images(again)
        picture_rows(rows).save(self.out / f"autoencoder-{name}.png")

    def _run(self, name: str, options: Mapping[str, Any]) -> StageResult:
        stage, order = self.recipe.autoencoder[name], STAGES.index(name)
        if order:
            load_modules(self.out / f"autoencoder-{STAGES[order - 1]}.pt", {"vae": self.vae})
        self.vae.requires_grad_(True).train()
        self.vae.encoder.requires_grad_(name != CLOSE)
        batches = Ahead(lambda step: self.batch(name, step), stage.steps, workers_for(self.device))
        result = run_stage(
            f"autoencoder-{name}",
            modules={"vae": self.vae},
            parameters=self.vae.parameters(),
            loss_fn=lambda step: self.losses(batches(step)),
            steps=stage.steps,
            lr=stage.lr,
            warmup=stage.warmup,
            lr_floor=stage.lr_floor,
            out=self.out,
            seed=self.recipe.seed,
            device=self.device,
            config=self.recipe.facts(batch=stage.batch),
            on_log=lambda step: self._show(name, step),
            **options,
        )
        self.vae.requires_grad_(False).eval()
        self.set_scale()
        return result
