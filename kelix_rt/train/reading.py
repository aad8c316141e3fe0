"""The auxiliary decoder of the tokenizer's training: text from the fused embeddings of a picture.

It is thrown away afterwards; what it reads through is what the codes must carry.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kelix_rt import ops
from kelix_rt.config import QwenConfig
from kelix_rt.models.backbone import Backbone
from kelix_rt.processing import TextTokenizer
from kelix_rt.train.world_questions import questions
from kelix_rt.train.world_scene import Scene
from kelix_rt.train.world_text import caption, caption_question

EMBEDDING_STD = 0.05


@dataclass(frozen=True)
class Reading:
    """What is read from one picture: text ids, and which of them are the reader's own words."""

    ids: list[int]
    counted: list[bool]


def read_scene(
    scene: Scene,
    text: TextTokenizer,
    end_id: int,
    rng: random.Random,
    num_questions: int,
    with_caption: bool,
) -> Reading:
    """Questions with their answers, of different kinds where there are enough, then a caption.

    Only answers and captions, each closed by end_id, are counted.
    """
    asked = [(q.text, q.answer) for q in questions(scene, rng)]
    turns = rng.sample(asked, min(num_questions, len(asked)))
    if with_caption:
        turns.append((caption_question(rng), caption(scene, rng)))
    ids: list[int] = []
    counted: list[bool] = []
    for question, answer in turns:
        asked_ids, answer_ids = text.encode(question + "\n"), [*text.encode(answer), end_id]
        ids += asked_ids + answer_ids
        counted += [False] * len(asked_ids) + [True] * len(answer_ids)
    return Reading(ids, counted)


def reader_config(vocab: int, width: int, layers: int, max_positions: int) -> QwenConfig:
    """A small Qwen3 of this width: heads of 32 channels, two query heads to a key head."""
    heads = max(2, width // 32)
    return QwenConfig(
        vocab_size=vocab,
        embed_dim=width,
        num_layers=layers,
        tie_word_embeddings=False,
        num_heads=heads,
        num_kv_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=32,
        intermediate_dim=2 * width,
        max_seq_len=max_positions,
        eos_token_id=None,
        vision_start_token_id=None,
        vision_end_token_id=None,
    )


class Reader(nn.Module):
    """The package's own backbone with one table for text in and out; pictures come as a prefix."""

    def __init__(self, config: QwenConfig, seed: int = 0) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.table = nn.Parameter(torch.empty(config.vocab_size, config.embed_dim))
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)
                continue
            std = EMBEDDING_STD if name == "table" else parameter.shape[1] ** -0.5
            if name.endswith(("output.weight", "down.weight")):
                std *= depth
            nn.init.normal_(parameter, std=std, generator=generator)
        self.backbone.prepare("cpu")

    def forward(self, fused: Tensor, tokens: Sequence[int], readings: Sequence[Reading]) -> Tensor:
        """Mean cross-entropy of the counted ids.

        fused: [T, D] embeddings of all pictures' tokens. tokens: how many each picture has.
        """
        device = fused.device
        pieces: list[Tensor] = []
        lengths: list[int] = []
        rows: list[int] = []
        wanted: list[int] = []
        start = 0
        for part, reading in zip(fused.split(list(tokens)), readings, strict=True):
            ids = torch.tensor(reading.ids, device=device)
            pieces += [part, F.embedding(ids, self.table).to(part.dtype)]
            first = start + len(part) - 1  # the state in front of the first text id
            rows += [first + i for i, flag in enumerate(reading.counted) if flag]
            wanted += [i for i, flag in zip(reading.ids, reading.counted, strict=True) if flag]
            lengths.append(len(part) + len(reading.ids))
            start += lengths[-1]
        hidden = self.backbone.run_whole(torch.cat(pieces), lengths=lengths)
        states = hidden[torch.tensor(rows, device=device)]
        normed = ops.rms_norm(states, self.backbone.norm, self.backbone.config.norm_eps)
        logits = F.linear(normed, self.table).float()
        return F.cross_entropy(logits, torch.tensor(wanted, device=device))
