"""What a trained checkpoint can do, measured through the engine on pictures it has never seen.

Understanding: answers to questions about pictures of the test split, right when they equal the only
right answer, and about relations when they come to it. Drawing: pictures drawn from test prompts,
read by the checker, which is no model; only what a prompt states is judged. Reconstruction: drawn
from the codes of a picture. Codebooks: how many codes of each sub-codebook the validation pictures
use.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from kelix_rt.engine import Engine
from kelix_rt.params import GREEDY_DRAWING
from kelix_rt.request import Prompt, RenderParams, RequestDone, SamplingParams
from kelix_rt.train.checker import judge
from kelix_rt.train.sheet import contact_sheet
from kelix_rt.train.states import write_whole
from kelix_rt.train.world import Sample, draw, make_sample, make_scenes, make_text
from kelix_rt.train.world_text import conclusion

SHEET_PICTURES = 16
_TOGETHER = 32


@dataclass(frozen=True)
class Amounts:
    """How much is measured. side: of the pictures shown, in pixels. steps: denoise steps."""

    questioned: int = 300
    drawn: int = 100
    reconstructed: int = 50
    encoded: int = 300
    side: int = 224
    steps: int = 20
    cfg: float = 1.0
    seed: int = 0

    def scaled(self, share: float) -> Amounts:
        """A share of the samples, at least one of each kind."""
        names = ("questioned", "drawn", "reconstructed", "encoded")
        return replace(self, **{name: max(1, round(share * getattr(self, name))) for name in names})


class Score:
    """Right and asked, by name."""

    def __init__(self) -> None:
        self.right: dict[str, int] = defaultdict(int)
        self.asked: dict[str, int] = defaultdict(int)

    def add(self, name: str, right: bool) -> None:
        """Counts one case."""
        self.right[name] += right
        self.asked[name] += 1

    def table(self) -> dict[str, dict[str, float]]:
        """{name: accuracy, right, asked}, by name."""
        return {
            name: {
                "accuracy": self.right[name] / asked,
                "right": self.right[name],
                "asked": asked,
            }
            for name, asked in sorted(self.asked.items())
        }


def evaluate(engine: Engine, amounts: Amounts, out: Path) -> dict[str, Any]:
    """Measures all of it; writes `evaluation.json` and `contact-sheet.png` to `out`.

    The sheet shows the first 16 test prompts by seed with what was drawn. An engine that cannot
    draw is measured without.
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "amounts": vars(amounts),
        "understanding": understanding(engine, amounts),
        "codebooks": codebook_usage(engine, amounts),
    }
    if engine.runner.render is not None:
        samples = [make_sample("test", i, amounts.seed) for i in range(amounts.drawn)]
        pictures = drawings(engine, samples, amounts)
        found["drawing"] = judged(samples, pictures)
        found["reconstruction"] = reconstruction(engine, amounts)
        prompts = [sample.prompt.text for sample in samples[:SHEET_PICTURES]]
        contact_sheet(prompts, pictures[:SHEET_PICTURES]).save(out / "contact-sheet.png")
    write_whole(out / "evaluation.json", (json.dumps(found, indent=2) + "\n").encode())
    return found


def understanding(engine: Engine, amounts: Amounts) -> dict[str, dict[str, float]]:
    """Accuracy by kind of question, single turns, greedy."""
    score = Score()
    cases = _questions(amounts)
    while batch := [case for _, case in zip(range(_TOGETHER), cases, strict=False)]:
        prompts = [_prompt(engine, picture, text) for _, picture, text, _ in batch]
        greedy = SamplingParams(temperature=0.0, max_blocks=40)
        outputs = engine.generate(prompts, greedy)
        for (kind, _, _, answer), output in zip(batch, outputs, strict=True):
            score.add(kind, _right(kind, (output.text or "").strip(), answer))
    return score.table()


def drawings(
    engine: Engine, samples: Sequence[Sample], amounts: Amounts
) -> list[Image.Image | None]:
    """Pictures of the samples' prompts, None where drawing one failed."""
    found: list[Image.Image | None] = []
    for start in range(0, len(samples), _TOGETHER):
        numbers = [
            engine.add_request(
                engine.drawing_prompt(sample.prompt.text),
                GREEDY_DRAWING,
                render=_render(amounts, start + number),
            )
            for number, sample in enumerate(samples[start : start + _TOGETHER])
        ]
        for event in engine.run_to_end(numbers):
            image = event.output.image if isinstance(event, RequestDone) else None
            found.append(None if image is None else image.image)
    return found


def judged(
    samples: Sequence[Sample], pictures: Sequence[Image.Image | None]
) -> dict[str, dict[str, float]]:
    """Share of pictures that show each attribute, of those whose prompts state it."""
    score = Score()
    for sample, picture in zip(samples, pictures, strict=True):
        stated = sample.prompt.states
        verdict = dict.fromkeys(stated, False) if picture is None else judge(sample.scene, picture)
        for name in sorted(stated & verdict.keys()):
            score.add(name, verdict[name])
    return score.table()


def reconstruction(engine: Engine, amounts: Amounts) -> dict[str, dict[str, float]]:
    """Share of test pictures whose attributes survive encoding and drawing from the codes."""
    score = Score()
    scenes = make_scenes("test", amounts.reconstructed, amounts.seed)
    for number, scene in enumerate(scenes):
        picture = draw(scene, amounts.side)
        again = engine.reconstruct(picture, render=_render(amounts, number)).image
        for name, right in judge(scene, again).items():
            score.add(name, right)
    return score.table()


def codebook_usage(engine: Engine, amounts: Amounts) -> dict[str, list[float]]:
    """Utilisation and perplexity of each sub-codebook over validation pictures."""
    size = engine.config.tokenizer_config.codes_per_book
    scenes = make_scenes("val", amounts.encoded, amounts.seed)
    codes = torch.cat([engine.encode_image(draw(s, amounts.side)).codes.cpu() for s in scenes])
    return usage(codes, size)


def usage(codes: torch.Tensor, size: int) -> dict[str, list[float]]:
    """Codes [T, N] -> per sub-codebook the share of codes used, and exp of their entropy."""
    counts = torch.stack([torch.bincount(book, minlength=size) for book in codes.T]).double()
    shares = counts / counts.sum(1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(1)
    return {
        "utilisation": (counts > 0).double().mean(1).tolist(),
        "perplexity": entropy.exp().tolist(),
    }


def show(found: Mapping[str, Any], console: Console) -> None:
    """Prints the results as tables."""
    titles = {
        "understanding": "Answers on the test split",
        "drawing": "Drawings of test prompts, by what the prompt states",
        "reconstruction": "Pictures drawn from codes",
    }
    for part, title in titles.items():
        if part not in found:
            continue
        table = Table("", "right", "of", "%", title=title, title_justify="left")
        for name, row in found[part].items():
            share = f"{100 * row['accuracy']:.1f}"
            table.add_row(name, str(row["right"]), str(row["asked"]), share)
        console.print(table)
    books = found["codebooks"]
    table = Table("sub-codebook", "used %", "perplexity", title="Codebooks on the val split",
                  title_justify="left")  # fmt: skip
    for number, (used, perplexity) in enumerate(zip(*books.values(), strict=True)):
        table.add_row(str(number), f"{100 * used:.1f}", f"{perplexity:.1f}")
    console.print(table)


def _questions(amounts: Amounts) -> Iterator[tuple[str, Image.Image | None, str, str]]:
    """(kind, picture, question, answer) over the test split."""
    for index in range(amounts.questioned):
        sample = make_sample("test", index, amounts.seed)
        picture = draw(sample.scene, amounts.side)
        for question in sample.questions:
            yield question.kind, picture, question.text, question.answer
        text = make_text("test", index, amounts.seed)
        yield text.kind, None, text.text, text.answer


def _right(kind: str, said: str, answer: str) -> bool:
    if kind == "relation":  # the places in front are how it got there
        return conclusion(said) == conclusion(answer)
    return said == answer


def _prompt(engine: Engine, picture: Image.Image | None, text: str) -> Prompt:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if picture is not None:
        parts.insert(0, {"type": "image", "image": picture})
    return engine.chat_prompt([{"role": "user", "content": parts}])


def _render(amounts: Amounts, number: int) -> RenderParams:
    seed = 1_000_000 * amounts.seed + number
    return RenderParams(steps=amounts.steps, cfg=amounts.cfg, seed=seed)
