"""The ablations of the Kelix report that fit this size: what the tokenizer's parts are worth.

Every variant starts from the warmed-up vision transformer of a run, gets adapters, codes and a
reader of its own, goes through short stages, and is measured on pictures of the val split.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kelix_rt.config import TokenizerConfig
from kelix_rt.train.quantizer import SimVQ
from kelix_rt.train.recipe import Recipe, Stage, tokenizer_config
from kelix_rt.train.states import load_modules, write_whole
from kelix_rt.train.token_labels import KINDS
from kelix_rt.train.tokenizer import TokenizerTrainer
from kelix_rt.train.world import make_scenes

SHARED_PARTS = ("patch_embedding.", "positions", "layers.", "final_norm.", "merger.")
STAGES = {  # of the learning: adapters, then codes, then everything
    "warmup": Stage(150, 1e-3, 20, 6),
    "1": Stage(150, 1e-3, 20, 6),
    "2": Stage(500, 5e-4, 20, 6, lr_floor=0.05),
}
MEASURED_TASK = (4, True)
_TOGETHER = 8


class SharedCodebook(SimVQ):
    """All sub-vectors of a token look up the first sub-codebook."""

    def codebooks(self) -> Tensor:
        """[N, K, d], N times the same."""
        return super().codebooks()[:1].expand(self.config.n_q_tokens, -1, -1).contiguous()


@dataclass(frozen=True)
class Variant:
    """One row of the table. changes: of the tokenizer's config."""

    name: str
    books: int
    fusion: Literal["sum", "mean"] = "sum"
    shared: bool = False

    def config(self, recipe: Recipe) -> TokenizerConfig:
        """The variant's tokenizer; the codes of a sub-codebook stay as many as in the recipe."""
        sizes = replace(recipe.sizes, books=self.books)
        return replace(tokenizer_config(sizes), fusion_type=self.fusion)


def variants(books: int) -> list[Variant]:
    """Halvings of N down to 1, then the full N with mean fusion and with one shared codebook."""
    counts = [n for n in range(1, books + 1) if books % n == 0 and (books // n).bit_count() == 1]
    rows = [Variant(f"N = {n}", n) for n in counts]
    rows.append(Variant(f"N = {books}, mean instead of sum", books, fusion="mean"))
    rows.append(Variant(f"N = {books}, one shared codebook", books, shared=True))
    return rows


def ablate(base: TokenizerTrainer, pictures: int, out: Path, **options: Any) -> dict[str, Any]:
    """Trains and measures every variant; writes `ablations.json` to `out`.

    base: of a run whose warm-up is done. pictures: of the val split, for measuring. options:
    further arguments of `run_stage`. Raises ConfigError when the warm-up's checkpoint is missing.
    """
    load_modules(base.out / "tokenizer-warmup.pt", base.modules)
    start = base.model.state_dict()
    shared = {name: value for name, value in start.items() if name.startswith(SHARED_PARTS)}
    recipe = replace(base.recipe, tokenizer=short_stages(base.recipe))
    found: dict[str, Any] = {}
    for variant in variants(base.recipe.sizes.books):
        folder = out / variant.name.replace(" ", "-").replace(",", "").replace("=", "")
        trainer = TokenizerTrainer(
            replace(recipe, sizes=replace(recipe.sizes, books=variant.books)),
            variant.config(recipe), base.text, base.images, folder, base.device, shared,
        )  # fmt: skip
        if variant.shared:
            trainer.quantizer = SharedCodebook(trainer.config).to(base.device)
        trainer.run(tuple(STAGES), **options)
        found[variant.name] = measure(trainer, pictures)
    write_whole(out / "ablations.json", (json.dumps(found, indent=2) + "\n").encode())
    return found


def short_stages(recipe: Recipe) -> dict[str, Stage]:
    """The short stages; a recipe shorter than they are shortens them too."""
    longest = recipe.tokenizer["2"].steps
    return {
        name: replace(stage, steps=min(stage.steps, longest), warmup=min(stage.warmup, longest))
        for name, stage in STAGES.items()
    }


@torch.no_grad()
def measure(trainer: TokenizerTrainer, pictures: int) -> dict[str, float]:
    """Losses on the first val pictures, and the share of labels right by kind."""
    rng = random.Random("kelix ablations")
    scenes = list(make_scenes("val", pictures, trainer.recipe.seed))
    sums: dict[str, list[float]] = {}
    for first in range(0, pictures, _TOGETHER):
        part = scenes[first : first + _TOGETHER]
        batch = trainer.views.pictures(part, (), trainer.recipe.sizes.side, MEASURED_TASK, rng)
        losses = trainer.losses(batch, continuous=False)
        values = {name: float(losses[name]) for name in ("text", "pixels")}
        for name, value in (values | trainer.label_accuracy()).items():
            sums.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def show(found: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Prints the table: losses, then percentages of labels right."""
    table = Table("", "text loss", "pixel MSE", *(f"{kind} %" for kind in KINDS))
    table.title, table.title_justify = "Variants of the visual tokenizer, val split", "left"
    for name, row in found.items():
        shares = [f"{100 * row[kind]:.1f}" if kind in row else "" for kind in KINDS]
        table.add_row(name, f"{row['text']:.3f}", f"{row['pixels']:.4f}", *shares)
    console.print(table)
