"""Kelix-DiT: flow matching from noise to the latents of the frozen autoencoder.

The condition is what the frozen language model thinks while it reads the picture: its last hidden
states from vision_start to vision_end, of one teacher-forced pass over request and picture.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt.config import SanaConfig
from kelix_rt.models.condition import build_condition, find_condition
from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.dit_condition import merge_conditions
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.vae import decode
from kelix_rt.stages.denoise import sample
from kelix_rt.stages.schedules import TRAIN_STEPS
from kelix_rt.train.chats import ChatBuilder, Document, drawing
from kelix_rt.train.language import pack
from kelix_rt.train.loop import StageResult, run_stage
from kelix_rt.train.pictures import PictureCodes, scene_of, to_images
from kelix_rt.train.recipe import Recipe
from kelix_rt.train.sheet import picture_rows
from kelix_rt.train.states import load_modules
from kelix_rt.train.world_text import prompt

if TYPE_CHECKING:
    from diffusers import AutoencoderDC

STAGES = ("1", "2")
SHIFT = 3.0
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
    dit: KelixDiT, clean: Tensor, condition: Tensor, mask: Tensor, dropout: float
) -> dict[str, Tensor]:
    """Mean squared error of the velocity (noise - clean) at random noise levels, unweighted.

    clean: [B, C, h, w] latents. dropout: share of samples that see the stored unconditional rows
    instead of their connected condition, as many as the condition has.
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
    return {"loss": F.mse_loss(velocity.float(), wanted[order].float())}


def new_dit(config: SanaConfig, device: torch.device | str, seed: int) -> KelixDiT:
    """A DiT with random weights.

    As SANA starts: Linear layers Xavier-uniform with zero biases, time and caption layers normal
    with standard deviation 0.02, the final layer zero. As Kelix-DiT starts: the connector's norm
    weight zero, so that the condition begins as nothing. The cross-attention's output layers are
    not zero, as SANA's would be: with a zero condition they would never get a gradient.
    """
    dit = KelixDiT(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in dit.named_parameters():
        if name == "modulation_table":
            nn.init.normal_(parameter, std=config.hidden_size**-0.5, generator=generator)
        elif name == "y_embedding":
            nn.init.xavier_uniform_(parameter, generator=generator)
        elif name == "connector_norm" or name.startswith("final.") or name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name == "y_norm":
            nn.init.constant_(parameter, config.y_norm_scale_factor)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)  # norms of queries and keys
        elif name.startswith(("time_", "caption_")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif "depth_weight" in name:
            nn.init.uniform_(parameter, -1 / 3, 1 / 3, generator=generator)
        else:
            nn.init.xavier_uniform_(parameter, generator=generator)
    dit.requires_grad_(True)
    dit.y_embedding.requires_grad_(False)  # a buffer in the release: never optimised
    return dit.to(device)


@dataclass(frozen=True)
class DetokenizerTrainer:
    """Everything the stages of the DiT need. latents: [pictures, C, h, w] in the DiT's scale.

    vae: what the latents are of, to show what is drawn.
    """

    dit: KelixDiT
    model: KelixLM
    chats: ChatBuilder
    pictures: PictureCodes
    latents: Tensor
    vae: AutoencoderDC
    recipe: Recipe
    out: Path

    def run(self, stages: Sequence[str] = STAGES, **options: Any) -> StageResult:
        """Trains the stages in order; options and errors as `LanguageTrainer.run`."""
        result = None
        for name in stages:
            result = self._run(name, options)
        if result is None:
            raise ValueError("DetokenizerTrainer.run: no stage was named")
        return result

    def batch(self, name: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, conditions and masks of one step; every request is worded anew."""
        rng = random.Random(f"kelix detokenizer {self.recipe.seed} {name} {step}")
        size = self.recipe.detokenizer[name].batch
        return self._targets([rng.randrange(self.pictures.count) for _ in range(size)], rng)

    def _targets(self, indices: Sequence[int], rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        documents = [self._document(index, rng) for index in indices]
        condition, mask = conditions(self.model, documents, len(self.dit.y_embedding))
        clean = self.latents[indices].to(self.dit.device, torch.float32)
        return clean, condition, mask

    def _document(self, index: int, rng: random.Random) -> Document:
        request = prompt(scene_of(index, self.recipe.seed), rng)
        return drawing(self.chats, request.text, self.pictures.drawing(index))

    def _show(self, name: str, step: int) -> None:
        """Every so often: decoded latents above what is drawn, as detokenizer-<stage>.png."""
        if step % SHOWN_EVERY and step != self.recipe.detokenizer[name].steps:
            return
        shown = range(min(SHOWN, self.pictures.count))
        clean, condition, mask = self._targets(shown, random.Random("kelix detokenizer sheet"))
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        drawn = sample(self.dit, condition, mask, noise, SHOWN_STEPS)[-1]
        rows = [to_images(decode(self.vae, latent)) for latent in (clean, drawn)]
        picture_rows(rows).save(self.out / f"detokenizer-{name}.png")

    def _run(self, name: str, options: Mapping[str, Any]) -> StageResult:
        stage, dit = self.recipe.detokenizer[name], self.dit
        order = STAGES.index(name)
        if order:
            load_modules(self.out / f"detokenizer-{STAGES[order - 1]}.pt", {"dit": dit})
        self.model.requires_grad_(False)
        dropout = dit.config.class_dropout_prob

        def loss_fn(step: int) -> dict[str, Tensor]:
            return flow_loss(dit, *self.batch(name, step), dropout)

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
            config=self.recipe.facts(pictures=self.recipe.pictures, batch=stage.batch),
            on_log=lambda step: self._show(name, step),
            **options,
        )
