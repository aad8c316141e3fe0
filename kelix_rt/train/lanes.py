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
Lane = Sequence[Command]
_SPLIT = language.STAGES.index(READS["1"]) + 1
POLL_SECONDS = 0.5


def stages(part: str, names: Sequence[str]) -> Command:
    """Arguments of `python -m kelix_rt.train` that train these stages of a part."""
    return (part, *(word for name in names for word in ("--stage", name)))


# Every round begins when the one before it has ended. The lanes of a round run side by side, the
# commands of a lane one after another.
ROUNDS: tuple[tuple[Lane, ...], ...] = (
    ((("tokenizer",), stages("language", language.STAGES[:_SPLIT])), (("autoencoder",),)),
    ((stages("language", language.STAGES[_SPLIT:]),), (stages("detokenizer", ("1",)),)),
    ((stages("detokenizer", ("2",)),),),
)


def run_rounds(rounds: Sequence[Sequence[Lane]], options: Sequence[str], threads: int) -> None:
    """Runs the rounds as processes of their own; the lanes of a round share the threads.

    options: arguments that all commands get. Raises KelixError when one fails; those beside it are
    then stopped, and all resume from their last checkpoints when the same is run again.
    """
    for lanes in rounds:
        own = (*options, "--threads", str(max(1, threads // len(lanes))))
        run_beside([[(*command, *own) for command in lane] for lane in lanes])


def run_beside(lanes: Sequence[Lane]) -> None:
    """Runs `python -m kelix_rt.train` with the arguments of each lane, all lanes at once."""
    running = [_RunningLane(lane) for lane in lanes]
    try:
        while any([lane.advance() for lane in running]):  # every lane, not up to the first
            time.sleep(POLL_SECONDS)
    finally:
        for lane in running:
            lane.stop()


class _RunningLane:
    """Commands one after another, each as a process."""

    def __init__(self, commands: Lane) -> None:
        self._waiting = list(commands)
        self._process: subprocess.Popen[bytes] | None = None
        self._command: Command = ()

    def advance(self) -> bool:
        """Starts the next command where none runs; False when all have ended.

        Raises KelixError when one has failed.
        """
        code = self._process.poll() if self._process else 0
        if code:
            raise KelixError(
                f"train {' '.join(self._command)}: ended with exit code {code}; its reason "
                "stands above. Run the same again to go on from the last checkpoints"
            )
        if code is None:
            return True
        if not self._waiting:
            return False
        self._command = self._waiting.pop(0)
        self._process = subprocess.Popen([sys.executable, "-m", "kelix_rt.train", *self._command])
        return True

    def stop(self) -> None:
        """Stops the command that runs, if any."""
        if self._process:
            self._process.terminate()
            self._process.wait()
