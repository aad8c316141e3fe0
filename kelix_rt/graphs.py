"""Steps that are recorded once and launched whole: CUDA graphs behind two small interfaces.

A recorded step reads and writes memory at fixed addresses, so what changes from step to step is
copied there before it runs, and its results are read from there after. Recording happens at
start-up only. A step that was not recorded runs kernel by kernel, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import torch

from kelix_rt.step_layout import buckets

if TYPE_CHECKING:
    from kelix_rt.batch import StepBuffer
    from kelix_rt.plans import BlockPlan
    from kelix_rt.stages.generate import BlockResult, GenerateStage

Captured: TypeAlias = Callable[[], None]  # runs the recorded work again, on the current stream
Recorder: TypeAlias = Callable[[Callable[[], object]], Captured]
Result = TypeVar("Result")

WARM_UP_CALLS = 2  # lazy set-up (kernels, cuBLAS) happens in these: it cannot be captured


@dataclass
class GraphCounts:
    """Steps that ran as one graph, and steps that could not while graphs were there."""

    replays: int = 0
    misses: int = 0

    def add(self, other: GraphCounts) -> None:
        """Counts what `other` counted too."""
        self.replays += other.replays
        self.misses += other.misses


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The same for all recorders: cuBLAS keeps a workspace for every stream it was called on."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Records work as CUDA graphs, which share one memory pool and are never run together.

    What one graph leaves in the pool is therefore gone once another one runs. Whatever a graph
    reads from outside of the pool has to stay where it is as long as the graph is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], object]) -> Captured:
        """Runs `work` and records it; the work must not wait for the device."""
        with torch.cuda.device(self._stream.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP_CALLS):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads of the process do meanwhile is no business of ours.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        return graph.replay


class Recorded(Generic[Result]):
    """Work that was recorded, and what it returned: tensors that every replay writes anew."""

    def __init__(self, work: Callable[[], Result], recorder: Recorder) -> None:
        def run() -> None:
            self._result = work()

        self._replay = recorder(run)

    def replay(self) -> Result:
        """Runs the work on what its inputs hold now; the result holds until the next replay."""
        self._replay()
        return self._result


class DecodeGraphs:
    """One recorded block step per bucket of decoding rows: embedding, backbone, blocks, draws.

    Nothing is recorded until `capture`. verify_head asks for work that is not recorded.
    """

    def __init__(self, stage: GenerateStage, buffer: StepBuffer, counts: GraphCounts) -> None:
        self._stage = stage
        self._buffer = buffer
        self._counts = counts
        self._steps: dict[int, Recorded[BlockResult]] = {}

    @property
    def is_captured(self) -> bool:
        """Whether steps were recorded."""
        return bool(self._steps)

    def capture(self, recorder: Recorder) -> None:
        """Records the step of every bucket, on rows that stand for no request."""
        if self._stage.verify_head:
            return
        steps = {}
        for rows in reversed(buckets(self._buffer.max_rows)):  # smaller ones fit in its memory
            batch = self._buffer.pad(rows)
            steps[rows] = Recorded(partial(self._stage.step, batch), recorder)
        self._steps = steps

    def forget(self) -> None:
        """Gives the memory of the recorded steps back."""
        self._steps.clear()

    def choose(self, plan: BlockPlan) -> int | None:
        """The bucket to run a plan in; None, which counts as a miss, for one that fits in none.

        A plan fits when each of its requests has one row and draws ancestrally.
        """
        if not self._steps:
            return None
        rows = len(plan.spans)
        if rows <= max(self._steps) and all(
            span.count == 1 and span.sequence.sampling.rule == "ancestral" for span in plan.spans
        ):
            return min(bucket for bucket in self._steps if bucket >= rows)
        self._counts.misses += 1
        return None

    def replay(self, bucket: int) -> BlockResult:
        """Runs the recorded step on what the step buffer holds, padded to the bucket.

        The blocks [bucket, N+1] and hidden states [bucket, D] hold until the next replay; only
        the rows of the plan mean something.
        """
        self._counts.replays += 1
        return self._steps[bucket].replay()
