"""What narrower weights change in kelix-tiny: `python -m benchmarks.deviation`.

Every option against float32: hidden states and logits of the same drawings,
teacher-forced, and greedy answers about the first pictures of the test split. Prints a Markdown
table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kelix_rt import Engine, SamplingParams
from kelix_rt.assets import BUNDLED
from kelix_rt.request import Prompt
from kelix_rt.train.world import draw, make_sample

DRAWN, BLOCKS = 4, 60  # prompts, and blocks of each drawing
ASKED, SIDE = 8, 224  # pictures, and their sides in pixels
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float32, int8": {"dtype": "float32", "quantization": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, int8": {"dtype": "bfloat16", "quantization": "int8"},
}


@dataclass(frozen=True)
class Behaviour:
    """What an engine makes of the same input: float32 states [T, D], logits [T, N + 1, VT]."""

    hidden: Tensor
    logits: Tensor
    answers: list[str]


def drawn_blocks(engine: Engine) -> list[Tensor]:
    """The float32 engine's greedy drawings, with their prompts in front: [S, N + 1] each."""
    greedy = SamplingParams(temperature=0.0, max_blocks=BLOCKS)
    prompts = [engine.drawing_prompt(make_sample("test", i).prompt.text) for i in range(DRAWN)]
    return [engine.generate_blocks(prompt.ids, sampling=greedy).ids for prompt in prompts]


def questions(engine: Engine) -> tuple[list[Prompt], list[str]]:
    """Prompts about the first test pictures, and the right answers."""
    prompts, answers = [], []
    for index in range(ASKED):
        sample = make_sample("test", index)
        picture = {"type": "image", "image": draw(sample.scene, SIDE)}
        for question in sample.questions:
            content = [picture, {"type": "text", "text": question.text}]
            prompts.append(engine.chat_prompt([{"role": "user", "content": content}]))
            answers.append(question.answer)
    return prompts, answers


@torch.inference_mode()
def behaviour(engine: Engine, drawings: list[Tensor], prompts: list[Prompt]) -> Behaviour:
    """States and logits of the drawings, and greedy answers."""
    model = engine.runner.model
    states = torch.cat([model.hidden_states(ids)[-1].float() for ids in drawings])
    logits = torch.cat([model.teacher_forced_logits(ids) for ids in drawings])
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_blocks=40))
    return Behaviour(states, logits, [(output.text or "").strip() for output in outputs])


def main() -> None:
    """Prints the table."""
    exact: Behaviour | None = None
    drawings: list[Tensor] = []
    print("| | states, relative error | logits | same best ids | equal answers | right answers |")
    print("|---|---|---|---|---|---|")
    for name, options in OPTIONS.items():
        engine = Engine.from_pretrained(BUNDLED, device="cpu", **options)
        drawings = drawings or drawn_blocks(engine)
        prompts, right = questions(engine)
        found = behaviour(engine, drawings, prompts)
        exact = exact or found
        best = found.logits.argmax(-1) == exact.logits.argmax(-1)
        equal = sum(a == b for a, b in zip(found.answers, exact.answers, strict=True))
        hits = sum(a == b for a, b in zip(found.answers, right, strict=True))
        print(
            f"| {name} | {_error(found.hidden, exact.hidden):.4f} "
            f"| {_error(found.logits, exact.logits):.4f} | {int(best.sum())} / {best.numel()} "
            f"| {equal} / {len(right)} | {hits} / {len(right)} |"
        )


def _error(found: Tensor, exact: Tensor) -> float:
    finite = exact.isfinite()  # a banned id has no logit
    return float((found - exact)[finite].norm() / exact[finite].norm())


if __name__ == "__main__":
    main()
