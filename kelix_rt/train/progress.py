"""What a training stage tells: a progress line for people, JSON lines for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor

from kelix_rt.train.states import TrainingError, write_whole

PLAIN_EVERY_SECONDS = 15.0


class StageLog:
    """Collects losses between logged steps and writes their means.

    On a terminal a line is redrawn with losses, steps per second and the time left; elsewhere plain
    lines are printed at most every 15 seconds. Lines after `start` are dropped from an old file.
    """

    def __init__(self, stage: str, path: Path, start: int, steps: int, console: Console) -> None:
        self.stage, self.path, self.steps = stage, path, steps
        self.last: dict[str, float] = {}
        self._console = console
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._step, self._time, self._told = start, time.monotonic(), float("-inf")
        self._keep(start)
        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[t]}"))
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID = self._progress.add_task(stage, total=steps, completed=start, t="")

    def __enter__(self) -> StageLog:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds the losses of one step, without waiting for the device."""
        for name, value in losses.items():
            detached = value.detach().float()
            self._sums[name] = self._sums[name] + detached if name in self._sums else detached
        self._count += 1

    def write(self, step: int, rate: float, extra: Mapping[str, float]) -> None:
        """Logs the means of the steps since the last call, with `extra` as it is."""
        now = time.monotonic()
        speed = (step - self._step) / max(now - self._time, 1e-9)
        means = {name: float(value) / self._count for name, value in self._sums.items()}
        self.last = {**means, **extra}
        line = {"stage": self.stage, "step": step, "lr": rate, "steps_per_second": speed}
        self._append(self.last | line)
        self._tell(step, speed, now)
        self._sums, self._count, self._step, self._time = {}, 0, step, now

    def _tell(self, step: int, speed: float, now: float) -> None:
        left = (self.steps - step) / max(speed, 1e-9)
        losses = " ".join(f"{name} {value:.4g}" for name, value in self.last.items())
        text = f"{step}/{self.steps} {losses} | {speed:.2f} steps/s, {_duration(left)} left"
        self._progress.update(self._task, completed=step, t=text)
        if not self._console.is_terminal and (
            now - self._told >= PLAIN_EVERY_SECONDS or step == self.steps
        ):
            self._told = now
            self._console.print(f"{self.stage}: {text}", highlight=False, soft_wrap=True)

    def _append(self, line: Mapping[str, object]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror}") from error

    def _keep(self, start: int) -> None:
        """Drops what an interrupted run logged after its last checkpoint."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
        write_whole(self.path, "".join(line + "\n" for line in kept).encode())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
