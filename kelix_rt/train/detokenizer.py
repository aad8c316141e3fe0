"""Kelix-DiT: flow matching from noise to the latents of the frozen autoencoder.

The condition is what the frozen language model thinks while it reads the picture: its last hidden
states from vision_start to vision_end, of one teacher-forced pass over request and picture.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor

from kelix_rt.models.condition import build_condition, find_condition
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.dit_condition import merge_conditions
from kelix_rt.models.dit_positions import grid_positions
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.vae import decode
from kelix_rt.stages.denoise import sample
from kelix_rt.stages.schedules import TRAIN_STEPS
from kelix_rt.train.chats import ChatBuilder, Document, drawing
from kelix_rt.train.detokenizer_start import look_where_it_lies
from kelix_rt.train.encoded import fingerprint
from kelix_rt.train.language import STAGES as LANGUAGE_STAGES
from kelix_rt.train.language import pack
from kelix_rt.train.loop import StageResult, run_stage
from kelix_rt.train.pictures import PictureCodes, scene_of, to_images
from kelix_rt.train.place_weights import WEIGHTS, place_weights
from kelix_rt.train.recipe import Recipe
from kelix_rt.train.sheet import picture_rows
from kelix_rt.train.states import load_modules, steps_done
from kelix_rt.train.world_text import prompt

if TYPE_CHECKING:
    from diffusers import AutoencoderDC

STAGES = ("1", "2")
# Stage of the language model that each stage reads: the first one need not wait for the last. What
# the change of states costs was measured (docs/kelix-tiny.md).
READS = {"1": "2.1", "2": LANGUAGE_STAGES[-1]}
SHIFT = 3.0
# How often pictures as they are, plain ones that answer requests, and strange ones are drawn.
SHARES, ANSWERS = (0.3, 0.5, 0.2), 1
_TOGETHER, _STARTED_FROM = 32, 256
SHOWN, SHOWN_EVERY, SHOWN_STEPS = 8, 500, 12  # pictures on a sheet, steps between, denoise steps


@torch.no_grad()
def conditions(
    model: KelixLM, documents: Sequence[Document], max_length: int
) -> tuple[Tensor, Tensor]:
    """Conditions [B, max_length, D] of drawings and their masks [B, max_length] int64.

    The rows are those the renderer takes from a generated picture (`find_condition`).
    """
    batch = pack(model, documents)
    qwen = model.config.qwen_config
    assert qwen.vision_start_token_id is not None and qwen.vision_end_token_id is not None
    hidden = model.backbone.run_whole(model.embed_blocks(batch.blocks), lengths=batch.lengths)
    found = []
    sizes = list(batch.lengths)
    for blocks, states in zip(batch.blocks.split(sizes), hidden.split(sizes), strict=True):
        rows = find_condition(
            blocks, 1, qwen.vision_start_token_id, qwen.vision_end_token_id, qwen.vocab_size,
            max_length,
        )  # fmt: skip
        found.append(build_condition(states, rows, max_length))
    embeds, masks, _ = zip(*found, strict=True)
    return torch.stack(embeds), torch.stack(masks)


def noise_levels(batch: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Random sigmas and timesteps [B] float32: logit-normal indices of the shifted schedule.

    Index k = floor(1000 sigmoid(N(0, 1))) gives sigma = 3u / (1 + 2u) with u = k / 1000, and the
    model's time is 1000 sigma.
    """
    index = (TRAIN_STEPS * torch.sigmoid(torch.randn(batch))).floor().clamp(0, TRAIN_STEPS - 1)
    u = index / TRAIN_STEPS
    sigma = (SHIFT * u / (1 + (SHIFT - 1) * u)).to(device)
    return sigma, sigma * TRAIN_STEPS


def flow_loss(
    dit: KelixDiT,
    clean: Tensor,
    condition: Tensor,
    mask: Tensor,
    dropout: float,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Mean squared error of the velocity (noise - clean) at random noise levels.

    clean: [B, C, h, w] latents. dropout: share of samples that see the stored unconditional rows
    instead of their connected condition, as many as the condition has. weights: float32 [B, h, w]
    of the places of samples with a condition, None: all alike.
    """
    batch, device = len(clean), clean.device
    sigma, time = noise_levels(batch, device)
    noise = torch.randn(clean.shape).to(device)
    dropped = torch.rand(batch) < dropout
    order = torch.argsort(dropped.to(torch.int8), stable=True)  # conditional samples first
    kept = batch - int(dropped.sum())
    caches = []
    if kept:
        first = order[:kept].to(device)
        caches.append(dit.prepare_condition(condition[first], mask[first]))
    for row in order[kept:].tolist():
        caches.append(dit.unconditional(1, capacity=int(mask[row].sum())))
    cache = merge_conditions(caches)
    order = order.to(device)
    level = sigma.view(-1, 1, 1, 1)
    noisy, wanted = (1 - level) * clean + level * noise, noise - clean
    velocity = dit.forward_cached(noisy[order], dit.prepare_modulation(time[order]), cache)
    errors = (velocity.float() - wanted[order].float()).square().mean(1)
    if weights is None:
        return {"loss": errors.mean()}
    weights = weights[order]
    weights[kept:] = 1  # without a condition they would pull towards what weighs much
    return {"loss": (weights * errors).sum() / weights.sum()}


@dataclass(frozen=True)
class DetokenizerTrainer:
    """Everything the stages of the DiT need. latents: [3 * pictures, C, h, w] as `encode_latents`
    gives them: of pictures as they are, plain, and strange.

    A plain picture answers a request; the others stand alone, as `Engine.reconstruct` has them.
    language: folder of the language model's checkpoints. model: what they are loaded into.
    vae: what the latents are of, to show what is drawn.
    """

    dit: KelixDiT
    model: KelixLM
    chats: ChatBuilder
    pictures: PictureCodes
    latents: Tensor
    vae: AutoencoderDC
    recipe: Recipe
    language: Path
    out: Path

    def run(self, stages: Sequence[str] = STAGES, **options: Any) -> StageResult:
        """Trains the stages in order; options and errors as `LanguageTrainer.run`."""
        result = None
        for name in stages:
            result = self._run(name, options)
        if result is None:
            raise ValueError("DetokenizerTrainer.run: no stage was named")
        return result

    def read_pictures(self, name: str) -> tuple[Tensor, Tensor]:
        """Conditions [3 * pictures, L, D] bfloat16 and masks [3 * pictures, L] of stage `name` in
        the order of the latents, on the model's device.

        Raises ConfigError where the language model's checkpoint is missing.
        """
        self._load_language(name)
        length = len(self.dit.y_embedding)
        found = []
        indices = range(len(self.latents))
        for start in track(indices[::_TOGETHER], description="reading the training pictures"):
            documents = [self._document(index) for index in indices[start : start + _TOGETHER]]
            embeds, mask = conditions(self.model, documents, length)
            found.append((embeds.bfloat16(), mask))
        return torch.cat([embeds for embeds, _ in found]), torch.cat([mask for _, mask in found])

    def _load_language(self, name: str) -> None:
        load_modules(self.language / f"language-{READS[name]}.pt", {"model": self.model})
        self.model.requires_grad_(False)

    def indices(self, name: str, step: int) -> list[int]:
        """Which latents one step learns from."""
        rng = random.Random(f"kelix detokenizer {self.recipe.seed} {name} {step}")
        size, count = self.recipe.detokenizer[name].batch, self.pictures.count
        kinds = rng.choices(range(len(SHARES)), SHARES, k=size)
        return [kind * count + rng.randrange(count) for kind in kinds]

    def targets(
        self, read: tuple[Tensor, Tensor], indices: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents float32, conditions and masks of these indices; read: of `read_pictures`."""
        condition, mask = read
        clean = self.latents[indices].to(self.dit.device, torch.float32)
        return clean, condition[indices].float(), mask[indices]

    def place_weights(self) -> Tensor:
        """What the places of every picture weigh, float32 [pictures, h, w] on the DiT's device."""
        scenes = [scene_of(index, self.recipe.seed) for index in range(self.pictures.count)]
        side = self.latents.shape[-1]
        return torch.stack([place_weights(scene, side) for scene in scenes]).to(self.dit.device)

    def _document(self, number: int) -> Document:
        """What the language model reads of latent `number`."""
        kind, index = divmod(number, self.pictures.count)
        if kind != ANSWERS:
            alone = self.pictures.stranger if kind else self.pictures.drawing
            return self.chats.plain(self.chats.image, [alone(index)])
        rng = random.Random(f"kelix detokenizer {self.recipe.seed} {index}")
        request = prompt(scene_of(index, self.recipe.seed), rng)
        return drawing(self.chats, request.text, self.pictures.answer(index))

    def _places(self) -> Tensor:
        """Row and column [L, 2] of the latent that each row of a condition belongs to, or -1."""
        rows, columns = (length // 2 for length in self.pictures.drawing(0).grid[1:])
        side = self.latents.shape[-1]
        flags = torch.tensor(self.chats.codes_of_image(self._document(0)))
        places = torch.full((len(self.dit.y_embedding), 2), -1)
        scale = torch.tensor([rows, columns])
        places[: len(flags)][flags] = grid_positions(rows, columns) * side // scale
        return places

    def _show(self, read: tuple[Tensor, Tensor], name: str, step: int) -> None:
        """Every so often: decoded latents above what is drawn, as detokenizer-<stage>.png."""
        if step % SHOWN_EVERY and step != self.recipe.detokenizer[name].steps:
            return
        half, count = SHOWN // 2, self.pictures.count
        shown = [start + i for start in (0, count) for i in range(min(half, count))]
        clean, condition, mask = self.targets(read, shown)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        drawn = sample(self.dit, condition, mask, noise, SHOWN_STEPS)[-1]
        rows = [to_images(decode(self.vae, latent)) for latent in (clean, drawn)]
        picture_rows(rows).save(self.out / f"detokenizer-{name}.png")

    def _run(self, name: str, options: Mapping[str, Any]) -> StageResult:
        stage, dit = self.recipe.detokenizer[name], self.dit
        order = STAGES.index(name)
        self._load_language(name)
        made_of = {"language": fingerprint(self.model), "autoencoder": fingerprint(self.vae)}
        read = cache(lambda: self.read_pictures(name))
        if order:
            load_modules(self.out / f"detokenizer-{STAGES[order - 1]}.pt", {"dit": dit})
        elif not (self.out / f"detokenizer-{name}.pt").exists():
            places = self._places().to(dit.device)
            look_where_it_lies(dit, read()[0][:_STARTED_FROM].float(), places, self.recipe.seed)
        if steps_done(self.out / f"detokenizer-{name}.pt") < stage.steps:
            read()  # before the loop, whose precision is not theirs
        dropout, weights = dit.config.class_dropout_prob, cache(self.place_weights)

        def loss_fn(step: int) -> dict[str, Tensor]:
            indices = self.indices(name, step)
            own = weights()[torch.tensor(indices) % self.pictures.count]
            return flow_loss(dit, *self.targets(read(), indices), dropout, own)

        return run_stage(
            f"detokenizer-{name}",
            modules={"dit": dit},
            parameters=dit.parameters(),
            loss_fn=loss_fn,
            steps=stage.steps,
            lr=stage.lr,
            warmup=stage.warmup,
            lr_floor=stage.lr_floor,
            out=self.out,
            seed=self.recipe.seed,
            device=dit.device,
            dtype=torch.bfloat16,
            config=self.recipe.facts(
                pictures=self.recipe.pictures, batch=stage.batch, weights=WEIGHTS, **made_of
            ),
            on_log=lambda step: self._show(read(), name, step),
            **options,
        )
