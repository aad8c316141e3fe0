"""All parts of kelix-tiny on a CPU: what does not need each other is trained side by side.

A step of models this small does not get faster with a second core as two steps on a core each do.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kelix_rt.errors import KelixError
from kelix_rt.train import language
from kelix_rt.train.detokenizer import READS

SIDE_BY_SIDE = 2
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """Stages of a part, by one command. after: jobs whose results it reads.

    alone: it has all threads, because none is left to run beside it.
    """

    part: str
    stages: tuple[str, ...] = ()
    after: tuple[Job, ...] = ()
    alone: bool = False

    @property
    def command(self) -> list[str]:
        """Arguments of `python -m kelix_rt.train`; without stages it trains all of the part."""
        return [self.part, *(word for name in self.stages for word in ("--stage", name))]


def _jobs() -> tuple[Job, ...]:
    """What is wanted first stands first; a job stands behind those it is after."""
    split = language.STAGES.index(READS["1"]) + 1
    tokenizer = Job("tokenizer")
    words = Job("language", language.STAGES[:1])
    autoencoder = Job("autoencoder")
    seeing = Job("language", language.STAGES[1:split], after=(tokenizer, words))
    rest = Job("language", language.STAGES[split:], after=(seeing,))
    painting = Job("detokenizer", ("1",), after=(seeing, autoencoder))
    last = Job("detokenizer", ("2",), after=(rest, painting), alone=True)
    return tokenizer, words, autoencoder, seeing, rest, painting, last


JOBS = _jobs()


def run_jobs(jobs: Sequence[Job], options: Sequence[str], threads: int) -> None:
    """Runs jobs as processes of their own, `SIDE_BY_SIDE` at a time, each when those it is after
    have ended.

    options: arguments that all commands get. threads: shared by the jobs that run side by side.
    Raises KelixError when one fails; those beside it are then stopped, and all resume from their
    last checkpoints when the same is run again.
    """
    waiting, ended = list(jobs), set[Job]()
    running: dict[Job, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            for job in [job for job in waiting if ended.issuperset(job.after)]:
                if len(running) < SIDE_BY_SIDE:
                    share = threads if job.alone else max(1, threads // SIDE_BY_SIDE)
                    running[job] = _start([*job.command, *options, "--threads", str(share)])
                    waiting.remove(job)
            time.sleep(POLL_SECONDS)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                _require_success(job, running.pop(job).returncode)
                ended.add(job)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def _start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "kelix_rt.train", *arguments])


def _require_success(job: Job, code: int) -> None:
    if code:
        raise KelixError(
            f"train {' '.join(job.command)}: ended with exit code {code}; its reason "
            "stands above. Run the same again to go on from the last checkpoints"
        )
