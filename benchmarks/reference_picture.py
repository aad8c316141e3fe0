"""Prompt -> picture as the release does it: block after block, then the padded denoising loop."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reference_dit import ReferenceSampler
from benchmarks.reference_llm import ReferenceLM
from kelix_rt.models.vae import decode, to_uint8

CONDITION_LENGTH = 720  # the release pads every condition to it


class ReferencePicture:
    """The released pipeline around the plain transcriptions; both sides share diffusers' VAE."""

    def __init__(self, lm: ReferenceLM, sampler: ReferenceSampler, vae: torch.nn.Module) -> None:
        self.lm, self.sampler, self.vae = lm, sampler, vae

    def blocks(self, prompt: list[int], count: int) -> tuple[Tensor, Tensor]:
        """Greedy blocks [count, N+1] after a prompt that ends with vision_start, and the states
        [count, D] from vision_start on; the last block is not fed."""
        self.lm.reset()
        ids = torch.full((len(prompt), self.lm.num_codes + 1), self.lm.block_end)
        ids[:, 0] = torch.tensor(prompt)
        drawn, states = [], []
        for _ in range(count):
            hidden = self.lm.backbone(ids)
            logits, _ = self.lm.next_block(hidden)
            block = self.lm.draw(logits, temperature=0.7, top_k=1, top_p=0.9)
            drawn.append(block)
            states.append(hidden[-1])
            ids = block.unsqueeze(0)
        return torch.stack(drawn), torch.stack(states)

    def draw(
        self, prompt: list[int], count: int, steps: int, latent: Tensor
    ) -> tuple[Tensor, np.ndarray]:
        """The blocks and the picture, uint8 [H, W, 3]."""
        blocks, states = self.blocks(prompt, count)
        condition = F.pad(states, (0, 0, 0, CONDITION_LENGTH - count)).unsqueeze(0)
        mask = (torch.arange(CONDITION_LENGTH) < count).long().unsqueeze(0)
        state = self.sampler.start(condition, mask, latent, steps)
        for _ in range(steps):
            self.sampler.step(state)
        return blocks, to_uint8(decode(self.vae, state.latent))[0].numpy()
