"""The package's language model decoding a batch at a fixed context, without an engine around it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.checkpoints import MID_SIZE
from kelix_rt.models.backbone import PagedKV, StepContext
from kelix_rt.models.language_model import KelixLM
from kelix_rt.testing import randn

QWEN = MID_SIZE["qwen_config"]
BOOK = QWEN["codebook_size"] // QWEN["n_q_tokens"]
PAGE = 16
GREEDY = (0.0, 1.0, 1.0, 0.0)
SAMPLED = (0.7, 50.0, 0.9, 0.0)  # temperature, top-k, top-p, min-p


def text_rows(count: int) -> Tensor:
    """Text rows [count, N + 1]."""
    rows = torch.full((count, QWEN["n_q_tokens"] + 1), QWEN["q_eos_token"])
    rows[:, 0] = torch.arange(count) + 100
    return rows


def visual_row() -> Tensor:
    """One row of codes [1, N + 1]."""
    slots = torch.arange(QWEN["n_q_tokens"])
    codes = QWEN["vocab_size"] + slots * BOOK + 7
    return torch.cat((codes, torch.tensor([QWEN["q_eos_token"]]))).unsqueeze(0)


class DecodeLoop:
    """`step()` feeds one block per request and draws the next ones.

    The context is computed when it is short. A long one is filled with noise instead: a prefill of
    65,536 positions would take longer than everything that is timed.
    """

    def __init__(
        self, lm: KelixLM, batch: int, context: int, sampling: tuple[float, ...], fed: Tensor
    ) -> None:
        self.lm, self.batch = lm, batch
        pages = -(-(context + 1) // PAGE)
        self.kv = PagedKV.allocate(lm.config.qwen_config, batch * pages, PAGE, lm.device, lm.dtype)
        tables = [list(range(b * pages, (b + 1) * pages)) for b in range(batch)]
        if context <= 64:
            prefill = StepContext.of_chunks(
                tables, [0] * batch, [context] * batch, PAGE, device=lm.device
            )
            self.lm(text_rows(context).repeat(batch, 1).to(lm.device), prefill, self.kv)
        else:
            for seed, cache in enumerate((self.kv.k, self.kv.v)):
                cache.copy_(randn(*cache.shape[2:], dtype=lm.dtype, seed=seed))
        self.context = StepContext.of_chunks(
            tables, [context] * batch, [1] * batch, PAGE, device=lm.device
        )
        self.rows = fed.repeat(batch, 1).to(lm.device)
        params = torch.tensor(sampling, device=lm.device)
        self.params = params.expand(batch, QWEN["n_q_tokens"] + 1, 4).contiguous()
        self.seeds = torch.arange(batch, device=lm.device)
        self.steps = torch.zeros(batch, dtype=torch.int64, device=lm.device)

    def step(self) -> Tensor:
        """The next blocks [batch, N + 1]."""
        hidden = self.lm(self.rows, self.context, self.kv)
        ids, _ = self.lm.decode_blocks(hidden, self.params, self.seeds, self.steps)
        return ids
