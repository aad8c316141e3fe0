"""Kelix-LLM: next-block prediction through the stages of the report.

A text warm-up stands in for the pretrained Qwen3 of the report. Then: 1 aligns the visual codes
(backbone layers and text embedding frozen; a linear aligner maps the tokenizer's fused embedding
to the model's width); the aligned rows and the text rows become one table; 2.1 pictures and text
interleaved, all parameters; 2.2 all tasks; 3 annealing; 4 fine-tuning on single tasks. Of questions
only the answers count, in every stage; a picture beside its caption counts whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.vision_tokenizer import VisionTokenizer
from kelix_rt.train.chats import TASKS, ChatBuilder, Document
from kelix_rt.train.encoded import fingerprint
from kelix_rt.train.language_start import EMBEDDING_STD
from kelix_rt.train.loop import StageResult, run_stage
from kelix_rt.train.pictures import PictureCodes, Subject, scene_of
from kelix_rt.train.recipe import Recipe, Stage
from kelix_rt.train.states import load_modules

STAGES = ("warmup", "1", "2.1", "2.2", "3", "4")
WORDS = "warmup"  # the stage without pictures
ALIGNED = "1"  # the stage with an aligner instead of visual rows in the table


@dataclass(frozen=True)
class Batch:
    """Documents packed end to end.

    blocks: int64 [T, N+1]. lengths: positions of each document. targets: int64 [n] rows whose
    blocks are predicted, each from the state of the row before it.
    """

    blocks: Tensor
    lengths: Sequence[int]
    targets: Tensor


def pack(model: KelixLM, documents: Sequence[Document]) -> Batch:
    """Documents as one batch on the model's device."""
    blocks = [model.expand(torch.tensor(d.ids), d.codes) if len(d.codes) else
              model.expand(torch.tensor(d.ids)) for d in documents]  # fmt: skip
    counted = torch.tensor([flag for document in documents for flag in document.counted])
    device = model.device
    return Batch(
        torch.cat(blocks).to(device),
        [len(document.ids) for document in documents],
        counted.nonzero()[:, 0].to(device),
    )


def slot_weights(num_codes: int) -> tuple[float, float]:
    """Weights of a slot of a text block (2 slots) and of a visual block (N+1 slots).

    A text position and a visual position then weigh the same in total, (2 + (N+1)) / 2.
    """
    position = (2 + num_codes + 1) / 2
    return position / 2, position / (num_codes + 1)


class NextBlockLoss(nn.Module):
    """The training loss of a language model, as a module so that its table can be replaced."""

    def __init__(self, model: KelixLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the whole vocabulary of all slots up to the end of the block.

        loss: weighted by `slot_weights`, divided by the number of slots. text, image, end: plain
        means over text ids, visual codes, and the end-of-block ids of both.
        """
        model, blocks = self.model, batch.blocks
        hidden = model.backbone.run_whole(model.embed_blocks(blocks), lengths=batch.lengths)
        visual = blocks[batch.targets, 0] >= model.config.qwen_config.vocab_size
        text_rows, visual_rows = batch.targets[~visual], batch.targets[visual]
        text = self._slots(hidden, blocks, text_rows, 2)
        image = self._slots(hidden, blocks, visual_rows, blocks.shape[1])
        text_weight, visual_weight = slot_weights(model.config.num_codes)
        weighted = text_weight * text.sum() + visual_weight * image.sum()
        losses = {"loss": weighted / (text.numel() + image.numel())}
        if text.numel():
            losses["text"] = text[:, 0].mean()
        if image.numel():
            losses["image"] = image[:, :-1].mean()
        losses["end"] = torch.cat((text[:, -1], image[:, -1])).mean()
        return losses

    def _slots(self, hidden: Tensor, blocks: Tensor, rows: Tensor, slots: int) -> Tensor:
        """Cross-entropy [n, slots] float32 of the blocks in `rows`, given the states before."""
        if not len(rows):
            return hidden.new_zeros(0, slots, dtype=torch.float32)
        wanted = blocks[rows, :slots]
        previous = F.embedding(wanted[:, :-1], self.model.embeddings)
        inputs = torch.cat((hidden[rows - 1].unsqueeze(1), previous), dim=1)
        logits = self.model.head_logits(self.model.block_decoder(inputs))
        flat = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        return flat.view(wanted.shape)


class Aligner(nn.Module):
    """Stage 1's linear up-projector: the tokenizer's fused embedding to the model's width."""

    fused: Tensor

    def __init__(self, tokenizer: VisionTokenizer, width: int, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(tokenizer.config.output_dim, width, bias=False)
        self.register_buffer("fused", fused_rows(tokenizer).float(), persistent=False)
        books = tokenizer.config.n_q_tokens
        # A block's sum of N rows starts at the scale of a text embedding.
        scale = EMBEDDING_STD / (self.fused.square().mean().sqrt() * books**0.5)
        std = float(scale) * self.fused.shape[1] ** -0.5
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=std, generator=generator)

    def table(self, embeddings: Tensor) -> Tensor:
        """The table [VT, D] whose visual rows are the aligned codes; text rows as given."""
        text_rows = len(embeddings) - len(self.fused)
        return torch.cat((embeddings[:text_rows], self.linear(self.fused)))


@torch.no_grad()
def fused_rows(tokenizer: VisionTokenizer) -> Tensor:
    """Every code's own part of the fused embedding, [S, O] in the order of the unified ids.

    The parts of a block's codes sum to `VisionTokenizer.embed`. Raises ValueError without
    up-projectors.
    """
    if tokenizer.up_projectors is None:
        raise ValueError("fused_rows: the tokenizer has no up_projectors")
    rows = torch.einsum("jkd,jod->jko", tokenizer.codebooks, tokenizer.up_projectors)
    share = 1.0 if tokenizer.config.fusion_type == "sum" else 1 / len(rows)
    return rows.flatten(0, 1) * share


@dataclass(frozen=True)
class LanguageTrainer:
    """Everything the stages of the language model need. out: where their checkpoints go.

    tokenizer, pictures: called by stages with pictures, which the warm-up is not; pictures once per
    document, so it must keep what it made.
    """

    model: KelixLM
    tokenizer: Callable[[], VisionTokenizer]
    chats: ChatBuilder
    pictures: Callable[[], PictureCodes]
    recipe: Recipe
    out: Path

    def run(self, stages: Sequence[str] = STAGES, **options: Any) -> StageResult:
        """Trains the stages in order, each from the checkpoint of the one before it.

        options: further arguments of `run_stage`. Raises ConfigError where the checkpoint of an
        earlier stage is missing or does not fit.
        """
        result = None
        for name in stages:
            result = self._run(name, options)
        if result is None:
            raise ValueError("LanguageTrainer.run: no stage was named")
        return result

    def documents(self, stage: Stage, name: str, step: int) -> list[Document]:
        """What step `step` of a stage learns from: at least `stage.batch` positions."""
        rng = random.Random(f"kelix language {self.recipe.seed} {name} {step}")
        tasks, weights = list(stage.tasks), list(stage.tasks.values())
        found: list[Document] = []
        while sum(len(document.ids) for document in found) < stage.batch:
            index = rng.randrange(self.recipe.pictures)
            subject = Subject(scene_of(index, self.recipe.seed), self.pictures, index)
            found.append(TASKS[rng.choices(tasks, weights)[0]](self.chats, subject, rng))
        return found

    def _run(self, name: str, options: Mapping[str, Any]) -> StageResult:
        stage, model = self.recipe.language[name], self.model
        self._start_from(name)
        seen = {}
        if name != WORDS:
            self.pictures()  # made before the loop, whose precision is not theirs
            seen["tokenizer"] = fingerprint(self.tokenizer())
        modules: dict[str, nn.Module] = {"model": model}
        aligner = None
        if name == ALIGNED:
            modules["aligner"] = aligner = self._new_aligner()
            model.requires_grad_(False)
            model.block_decoder.requires_grad_(True)
            model.head.requires_grad_(True)
            model.backbone.norm.requires_grad_(True)  # it stands in front of the head
        else:
            model.requires_grad_(True)
        loss = NextBlockLoss(model)

        def loss_fn(step: int) -> dict[str, Tensor]:
            batch = pack(model, self.documents(stage, name, step))
            if aligner is None:
                return loss(batch)
            table = {"model.embeddings": aligner.table(model.embeddings)}
            return functional_call(loss, table, (batch,))

        model.train()
        result = run_stage(
            f"language-{name}",
            modules=modules,
            parameters=[p for module in modules.values() for p in module.parameters()],
            loss_fn=loss_fn,
            steps=stage.steps,
            lr=stage.lr,
            warmup=stage.warmup,
            lr_floor=stage.lr_floor,
            out=self.out,
            seed=self.recipe.seed,
            device=model.device,
            dtype=torch.bfloat16,
            config=self.recipe.facts(
                pictures=self.recipe.pictures, tasks=dict(stage.tasks), batch=stage.batch, **seen
            ),
            **options,
        )
        model.eval()
        return result

    def _new_aligner(self) -> Aligner:
        width = self.model.config.qwen_config.embed_dim
        return Aligner(self.tokenizer(), width, self.recipe.seed).to(self.model.device)

    @torch.no_grad()
    def _start_from(self, name: str) -> None:
        """Loads the stage before `name`; after the alignment, makes the two tables one."""
        order = STAGES.index(name)
        if order == 0:
            return
        before = STAGES[order - 1]
        modules: dict[str, nn.Module] = {"model": self.model}
        aligner = self._new_aligner() if before == ALIGNED else None
        if aligner is not None:
            modules["aligner"] = aligner
        load_modules(self.out / f"language-{before}.pt", modules)
        if aligner is not None:
            self.model.embeddings.copy_(aligner.table(self.model.embeddings))
