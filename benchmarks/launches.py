"""Kernel launches of a block and of a denoise step at the released size: `python -m
benchmarks.launches`.

Counted on the meta device, where a step runs without values, so no GPU is needed: every operator
that is no view is one launch, those of this package as many as their launchers make, attention of
torch one. cuBLAS may split a product in two kernels, which is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kelix_rt.models.dit import KelixDiT
from kelix_rt.models.dit_condition import ConditionCache
from kelix_rt.models.language_model import KelixLM
from kelix_rt.models.sequences import PagedKV, StepContext
from kelix_rt.release import BLOCKS, Sizes
from kelix_rt.stages.denoise import Denoiser
from kelix_rt.stages.generate import BlockBatch, GenerateStage

META = torch.device("meta")
DTYPE = torch.bfloat16
PAGE_SIZE = 16
RESIDENT_ROWS = 8  # kMaxResidentRows: up to here the in-block loop is one launch
WIDE = 16384  # kWidestNarrowRow: wider rows are drawn in three launches
# Operators of torch that launch nothing and are not marked as views.
SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach"}
# Least time on an H100 of one block and of one denoise step, as memory and tensor cores allow it.
FLOORS = {"visual block": 4.8e-3, "denoise step": 0.19 / 50}
HOST_COSTS = (5e-6, 10e-6, 20e-6)  # what the host may need for one launch, Python included


def in_block_loop(args: tuple[Any, ...]) -> int:
    """Launches of `block_decode`, as csrc/kernels/block_decoder.cu makes them."""
    rows, head, num_codes, text_vocab, num_layers = (
        len(args[0]), args[4], args[8], args[9], args[14],
    )  # fmt: skip
    if rows <= RESIDENT_ROWS:
        return 2  # a counter is cleared, then everything
    codes = (len(head) - text_vocab) // num_codes
    draws = [3 if width > WIDE else 1 for width in [text_vocab + codes, *[codes] * (num_codes - 1)]]
    return num_codes * (5 + 8 * num_layers) + sum(draws)


LAUNCHES: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "block_decode": in_block_loop,
    "paged_attention": lambda _: 2,  # the parts of a context, and their merge
    "relu_linear_attention": lambda args: 2 if args[1] is None else 3,  # with norms: their scales
}


class _Attention(TorchFunctionMode):
    """Counts torch's attention as the one kernel that it is on a GPU."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.counts["scaled_dot_product_attention"] += 1
            return torch.empty_like(args[0])  # of its shape; an operator that launches nothing
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in SILENT:
            self.counts[name] += LAUNCHES.get(name, lambda _: 1)(args)
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], object]) -> Counter[str]:
    """Launches of a step by operator."""
    counts: Counter[str] = Counter()
    with _Attention(counts), _Operators(counts):
        step()
    return counts


def visual_block(rows: int = 1, sizes: Sizes | None = None) -> Counter[str]:
    """Of a decode step of that many requests, each in the middle of a drawing."""
    config = (sizes or Sizes()).kelix
    with META:
        model = KelixLM(config).to(DTYPE).eval()
        pages = -(-BLOCKS // PAGE_SIZE)
        kv = PagedKV.allocate(config.qwen_config, rows * pages, PAGE_SIZE, META, DTYPE)
        context = StepContext(
            positions=torch.empty(rows, dtype=torch.int32),
            slots=torch.empty(rows, dtype=torch.int64),
            page_table=torch.empty(rows, pages, dtype=torch.int32),
            context_lens=torch.empty(rows, dtype=torch.int32),
            query_start=torch.empty(rows + 1, dtype=torch.int32),
        )
        width = config.num_codes + 1
        numbers = torch.empty(rows, dtype=torch.int64)
        params = torch.empty(rows, width, 4)
        ids = torch.empty(rows, width, dtype=torch.int64)
    batch = BlockBatch(ids, context, numbers, params, numbers, numbers, numbers, rows)
    stage = GenerateStage(model, kv)
    return count(lambda: stage.step(batch))


def denoise_step(rows: int = 1, sizes: Sizes | None = None) -> Counter[str]:
    """Of that many drawings in one batch without guidance, after their first step."""
    config = (sizes or Sizes()).dit
    dit = KelixDiT(config).to(DTYPE).eval()
    denoiser = Denoiser(dit)
    heads = (1, config.num_heads, BLOCKS, config.hidden_size // config.num_heads)

    def condition() -> ConditionCache:
        parts: list[tuple[Tensor, ...]] = [
            tuple(torch.empty(heads, dtype=DTYPE, device=META) for _ in range(config.depth))
            for _ in "kv"
        ]
        return ConditionCache(parts[0], parts[1], None, (BLOCKS,), BLOCKS, BLOCKS)

    side = config.input_size
    latent = torch.empty(1, config.in_channels, side, side, device=META)
    states = [denoiser.start(condition(), latent, steps=50) for _ in range(rows)]
    denoiser.step(states)
    return count(lambda: denoiser.step(states))


@dataclass(frozen=True)
class Row:
    """One line of the table: what is counted, its launches, its least time on an H100."""

    name: str
    launches: int
    floor: float

    def idle(self, host_cost: float) -> float:
        """Seconds that the GPU waits for launches of this cost; a prediction, kernels all equal."""
        return max(0.0, self.launches * host_cost - self.floor)

    def text(self) -> str:
        """The line in Markdown."""
        idle = " | ".join(f"{self.idle(cost) * 1e3:.1f} ms" for cost in HOST_COSTS)
        return f"| {self.name} | {self.launches} | {self.floor * 1e3:.1f} ms | {idle} |"


def table() -> list[str]:
    """The lines of the table, as docs/performance.md has them."""
    costs = " | ".join(f"idle at {cost * 1e6:.0f} us" for cost in HOST_COSTS)
    lines = [f"| batch 1 | launches | least GPU time | {costs} |", "|---" * 6 + "|"]
    for name, step in (("visual block", visual_block), ("denoise step", denoise_step)):
        lines.append(Row(name, step().total(), FLOORS[name]).text())
    return lines


def main() -> None:
    """Prints the table, and what the launches are."""
    print(*table(), sep="\n")
    for name, counts in (
        ("visual block", visual_block()),
        ("visual block, 16 requests", visual_block(16)),
        ("denoise step", denoise_step()),
        ("denoise step, 2 drawings", denoise_step(2)),
    ):
        print(f"\n{name}: {counts.total()}")
        print(*(f"  {number:4} {operator}" for operator, number in counts.most_common()), sep="\n")


if __name__ == "__main__":
    main()
