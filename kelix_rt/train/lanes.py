"""All parts of kelix-tiny on a CPU: what does not need each other is trained side by side.

A step of models this small does not get faster with a second core as two steps on a core each do.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from kelix_rt.errors import KelixError
from kelix_rt.train import language
from kelix_rt.train.detokenizer import READS

Command = tuple[str, ...]
_SPLIT = language.STAGES.index(READS["1"]) + 1
POLL_SECONDS = 0.5


def stages(part: str, names: Sequence[str]) -> Command:
    """Arguments of `python -m kelix_rt.train` that train these stages of a part."""
    return (part, *(word for name in names for word in ("--stage", name)))


# Every round begins when the one before it has ended; what stands in one round runs together.
ROUNDS: tuple[tuple[Command, ...], ...] = (
    (("tokenizer",), ("autoencoder",)),
    (stages("language", language.STAGES[:_SPLIT]),),
    (stages("language", language.STAGES[_SPLIT:]), stages("detokenizer", ("1",))),
    (stages("detokenizer", ("2",)),),
)


def run_rounds(rounds: Sequence[Sequence[Command]], options: Sequence[str], threads: int) -> None:
    """Runs the rounds as processes of their own, which share the threads of a round.

    options: arguments that all of them get. Raises KelixError when one fails; those beside it are
    then stopped, and all resume from their last checkpoints when the same is run again.
    """
    for commands in rounds:
        own = ("--threads", str(max(1, threads // len(commands))))
        run_beside([(*command, *options, *own) for command in commands])


def run_beside(commands: Sequence[Command]) -> None:
    """Runs `python -m kelix_rt.train` with each of these arguments at the same time."""
    running = [
        subprocess.Popen([sys.executable, "-m", "kelix_rt.train", *command]) for command in commands
    ]
    try:
        while any(process.poll() is None for process in running):
            _require_success(running, commands)
            time.sleep(POLL_SECONDS)
        _require_success(running, commands)
    finally:
        for process in running:
            process.terminate()
            process.wait()


def _require_success(
    running: Sequence[subprocess.Popen[bytes]], commands: Sequence[Command]
) -> None:
    for process, command in zip(running, commands, strict=True):
        if process.poll():
            raise KelixError(
                f"train {' '.join(command)}: ended with exit code {process.returncode}; its reason "
                "stands above. Run the same again to go on from the last checkpoints"
            )
