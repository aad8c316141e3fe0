"""Runs an engine for long on random requests, and looks for what must not happen.

    python -m benchmarks.soak --requests 2000 [--model DIR] [--dit DIR --vae DIR] [--seed 0]

Requests of all routes come in a random order and number, some are aborted, and the pages never
suffice for all of them. Afterwards no page may be held, every finished request must have the
blocks it has alone, and the memory of the process must not have grown in the second half.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from kelix_rt import Engine, Prompt, RenderParams, RequestDone, RequestFailed, SamplingParams
from kelix_rt.assets import BUNDLED
from kelix_rt.request import Output

IN_FLIGHT = 12
MAX_BLOCKS = 24
DRIFT_LIMIT = 0.02  # of the memory of the process, from the middle of a run to its end
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """A request, and after how many steps it is aborted (None: never)."""

    prompt: Prompt
    sampling: SamplingParams
    render: RenderParams | None
    hidden: bool
    abort_after: int | None


@dataclass
class Report:
    """What a run came to. wrong: requests whose blocks differ from those they have alone."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    failed: list[str] = field(default_factory=list)
    preemptions: int = 0
    blocks: int = 0
    cached_blocks: int = 0
    pictures: int = 0
    drafts_accepted: int = 0
    drafts_rejected: int = 0
    image_hits: int = 0
    leaked_pages: int = 0
    seconds: float = 0.0
    wrong: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)  # bytes, after every request

    @property
    def drift(self) -> float:
        """Growth of the resident memory in the second half, as a share."""
        half = self.resident[len(self.resident) // 2 :]
        part = max(len(half) // 4, 1)
        before, after = np.median(half[:part]), np.median(half[-part:])
        return float((after - before) / before)


def resident_bytes() -> int:
    """Memory of this process that is in main memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def make_engines(
    model: str | Path, dit: Path | None = None, vae: Path | None = None
) -> tuple[Engine, Engine]:
    """A crowded engine with too few pages and small caches, and one that serves a request alone."""
    parts: dict[str, Any] = {"dit": dit, "vae": vae, "device": "cpu", "dtype": "float32"}
    crowd = Engine.from_pretrained(
        model, **parts, page_size=4, num_pages=44, max_batch=8, max_step_tokens=48,
        image_cache_bytes=3 * 64 * 8 * 4,
    )  # fmt: skip
    alone = Engine.from_pretrained(
        model, **parts, max_batch=1, prefix_cache=False, speculate_markers=False,
        image_cache_bytes=0,
    )  # fmt: skip
    return crowd, alone


def make_job(engine: Engine, rng: np.random.Generator) -> Job:
    """A random request of any route that the engine serves."""
    abort_after = int(rng.integers(0, 30)) if rng.random() < 0.15 else None
    sampling = _sampling(rng)
    if engine.runner.render is not None and rng.random() < 0.15:
        render = RenderParams(steps=int(rng.integers(1, 4)), seed=int(rng.integers(1 << 30)))
        subject = ("a red circle.", "two blue squares.", "a green star.")[int(rng.integers(3))]
        prompt = Prompt(engine.processor.encode_image_prompt(f"draw {subject}"))
        return Job(prompt, replace(sampling, max_blocks=100), render, False, abort_after)
    if rng.random() < 0.3:
        prompt = engine.chat_prompt([{"role": "user", "content": _about_pictures(rng)}])
    else:
        prompt = Prompt(_text_ids(engine.config.qwen_config.vocab_size, rng))
    return Job(prompt, sampling, None, bool(rng.random() < 0.2), abort_after)


def _about_pictures(rng: np.random.Generator) -> list[dict[str, Any]]:
    """One or two of five pictures, so that the caches have something to find."""
    content: list[dict[str, Any]] = []
    for _ in range(int(rng.integers(1, 3))):
        pixels = np.random.default_rng(rng.integers(5)).integers(0, 256, (56, 84, 3))
        content.append({"type": "image", "image": Image.fromarray(pixels.astype(np.uint8))})
    return [*content, {"type": "text", "text": "what is this?"}]


def _text_ids(vocab: int, rng: np.random.Generator) -> list[int]:
    """Random ids; half of them begin like one of three others."""
    shared = [[7 + i] * 9 for i in range(3)][int(rng.integers(3))] if rng.random() < 0.5 else []
    ids: list[int] = rng.integers(1, vocab // 3, rng.integers(1, 30)).tolist()
    return shared + ids


def _sampling(rng: np.random.Generator) -> SamplingParams:
    blocks = int(rng.integers(1, MAX_BLOCKS))
    if rng.random() < 0.4:
        return SamplingParams(temperature=0.0, max_blocks=blocks)
    rule: Literal["ancestral", "reference"]
    rule = "reference" if rng.random() < 0.25 else "ancestral"
    seed = int(rng.integers(1 << 30))
    return SamplingParams(1.0, 0, 1.0, seed=seed, max_blocks=blocks, rule=rule)


def soak(
    crowd: Engine, alone: Engine, requests: int, seed: int, progress: Progress | None = None
) -> Report:
    """Runs random requests through `crowd` and compares each with `alone`.

    Both are engines of one model; `crowd` should have too few pages. progress(done, all) follows
    every request that ended.
    """
    rng = np.random.default_rng(seed)
    report = Report(requests)
    jobs: dict[int, tuple[Job, int]] = {}
    started = 0
    steps = 0
    begin = time.perf_counter()
    while started < requests or jobs:
        while started < requests and len(jobs) < IN_FLIGHT:
            job = make_job(crowd, rng)
            jobs[_add(crowd, job)] = (job, steps)
            started += 1
        for number, (job, since) in list(jobs.items()):
            if job.abort_after is not None and steps - since >= job.abort_after:
                crowd.abort(number)
        for event in crowd.step():
            if not isinstance(event, RequestDone | RequestFailed):
                continue
            job, _ = jobs.pop(event.request_id)
            if isinstance(event, RequestDone):
                _book(report, job, event.output, alone)
            else:
                report.failed.append(f"{event.request_id}: {event.error!r}")
            report.resident.append(resident_bytes())
            if progress is not None:
                progress(len(report.resident), requests)
        steps += 1
    report.seconds = time.perf_counter() - begin
    _close(report, crowd)
    return report


def _add(engine: Engine, job: Job) -> int:
    return engine.add_request(job.prompt, job.sampling, render=job.render, return_hidden=job.hidden)


def _book(report: Report, job: Job, output: Output, alone: Engine) -> None:
    report.preemptions += output.usage.preemptions
    report.cached_blocks += output.usage.cached_blocks
    (event,) = alone.run_to_end([_add(alone, job)])
    assert isinstance(event, RequestDone)
    if output.finish_reason == "abort":
        report.aborted += 1
        blocks = event.output.blocks[: len(output.blocks)]
        same = np.array_equal(output.blocks, blocks)
    else:
        report.finished += 1
        same = _same(output, event.output)
    if not same:
        report.wrong.append(output.request_id)


def _same(first: Output, second: Output) -> bool:
    """Whether outputs agree: ids exactly, states and pictures up to the roundings of a batch."""
    same = first.finish_reason == second.finish_reason
    if not same or not np.array_equal(first.blocks, second.blocks):
        return False
    if first.hidden is not None and second.hidden is not None:
        same &= torch.allclose(first.hidden, second.hidden, atol=1e-4, rtol=1e-4)
    if first.image is not None and second.image is not None:
        pixels = [np.asarray(drawn.image, dtype=int) for drawn in (first.image, second.image)]
        same &= int(np.abs(pixels[0] - pixels[1]).max()) <= 1
    return bool(same)


def _close(report: Report, engine: Engine) -> None:
    stats, pool = engine.stats(), engine.scheduler.pool
    report.blocks, report.pictures = stats.blocks, stats.pictures
    report.drafts_accepted, report.drafts_rejected = stats.drafts_accepted, stats.drafts_rejected
    report.image_hits = stats.image_hits
    report.leaked_pages = pool.num_pages - pool.num_available
    pool.check()


def problems(report: Report) -> list[str]:
    """What must not have happened and did, in words."""
    found = {
        f"requests failed: {report.failed}": bool(report.failed),
        f"requests {report.wrong} differ from those alone": bool(report.wrong),
        f"{report.leaked_pages} pages are held by nobody": report.leaked_pages > 0,
        f"memory grew by {report.drift:.1%} in the second half": report.drift > DRIFT_LIMIT,
        "pages never ran out, so nothing was put to the test": report.preemptions == 0,
    }
    return [text for text, true in found.items() if true]


def print_progress(done: int, requests: int) -> None:
    """A line every twentieth of the way."""
    if done * 20 // requests != (done - 1) * 20 // requests:
        memory = resident_bytes() >> 20
        print(f"{done}/{requests} requests, {memory} MiB resident", file=sys.stderr, flush=True)


def main(args: Sequence[str] | None = None) -> int:
    """The command line; 1 when something happened that must not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--dit", type=Path)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    torch.set_num_threads(1)  # the models it is made for are too small to gain from a second one
    crowd, alone = make_engines(given.model, given.dit, given.vae)
    report = soak(crowd, alone, given.requests, given.seed, print_progress)
    for name, value in asdict(report).items():
        if name != "resident":
            print(f"{name:16} {value}")
    print(f"{'drift':16} {report.drift:.2%} of {report.resident[-1] >> 20} MiB")
    found = problems(report)
    for text in found:
        print(f"problem: {text}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
