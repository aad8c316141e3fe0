"""The `kelix` command: chat, draw, encode, reconstruct, serve, info, bench, parity."""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line (`args`, or the process's own); always ends in SystemExit.

    Exit codes: 0 done, 1 a parity check missed, 2 the request cannot be served as written.
    """
    from kelix_rt.cli.app import run

    run(args)
