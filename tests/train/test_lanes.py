from __future__ import annotations

import pytest

from kelix_rt.errors import KelixError
from kelix_rt.train.lanes import ROUNDS, run_beside, run_rounds
from kelix_rt.train.pipeline import STAGES


def test_rounds_hold_every_stage_once_and_in_order() -> None:
    found: dict[str, list[str]] = {}
    for commands in ROUNDS:
        parts = [command[0] for command in commands]
        assert len(set(parts)) == len(parts), "stages of one part need each other"
        for part, *words in commands:
            found.setdefault(part, []).extend(words[1::2] or STAGES[part])
    assert found == {part: list(stages) for part, stages in STAGES.items()}


def test_threads_of_a_round_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[str, ...]]] = []
    monkeypatch.setattr("kelix_rt.train.lanes.run_beside", seen.append)
    run_rounds([[("a",), ("b",)], [("c",)]], ["--seed", "1"], threads=5)
    assert seen == [
        [("a", "--seed", "1", "--threads", "2"), ("b", "--seed", "1", "--threads", "2")],
        [("c", "--seed", "1", "--threads", "5")],
    ]


def test_a_failure_is_told_and_stops_what_runs_beside_it() -> None:
    run_beside([("--help",), ("export", "--help")])
    with pytest.raises(KelixError, match="train language --stage 9: ended with exit code 1"):
        run_beside([("language", "--stage", "9"), ("--help",)])
