from __future__ import annotations

from pathlib import Path

import pytest

from kelix_rt.errors import KelixError
from kelix_rt.train.lanes import ROUNDS, Lane, run_beside, run_rounds
from kelix_rt.train.pipeline import STAGES


def test_rounds_hold_every_stage_once_and_in_order() -> None:
    found: dict[str, list[str]] = {}
    for lanes in ROUNDS:
        parts = [part for lane in lanes for part in {command[0] for command in lane}]
        assert len(set(parts)) == len(parts), "stages of one part need each other"
        for part, *words in (command for lane in lanes for command in lane):
            found.setdefault(part, []).extend(words[1::2] or STAGES[part])
    assert found == {part: list(stages) for part, stages in STAGES.items()}


def test_threads_of_a_round_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Lane]] = []
    monkeypatch.setattr("kelix_rt.train.lanes.run_beside", seen.append)
    run_rounds([[[("a",), ("b",)], [("c",)]], [[("d",)]]], ["--seed", "1"], threads=5)
    two, five = ("--seed", "1", "--threads", "2"), ("--seed", "1", "--threads", "5")
    assert seen == [[[("a", *two), ("b", *two)], [("c", *two)]], [[("d", *five)]]]


def test_commands_of_a_lane_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kelix_rt.train.lanes.sys.executable", str(tmp_path / "note"))
    monkeypatch.setattr("kelix_rt.train.lanes.POLL_SECONDS", 0.01)
    script = tmp_path / "note"
    note = f'echo "%s$3" >> {tmp_path}/$4\n'
    script.write_text("#!/bin/sh\n" + note % "+" + "sleep 0.1\n" + note % "-")
    script.chmod(0o755)
    run_beside([[("a", "one"), ("b", "one")], [("c", "two")]])
    assert (tmp_path / "one").read_text().split() == ["+a", "-a", "+b", "-b"]
    assert (tmp_path / "two").read_text().split() == ["+c", "-c"]


def test_a_failure_is_told_and_stops_what_runs_beside_it() -> None:
    run_beside([[("--help",), ("export", "--help")]])
    with pytest.raises(KelixError, match="train language --stage 9: ended with exit code 1"):
        run_beside([[("--help",)], [("language", "--stage", "9"), ("--help",)]])
