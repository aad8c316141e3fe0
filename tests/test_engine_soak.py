"""Many random requests, too few pages, aborts: nothing leaks and every answer is the right one.

The same on more requests: `python -m benchmarks.soak --requests 2000`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.soak import Report, make_engines, problems
from tests.engine_helpers import assert_idle

REQUESTS = 150


def test_a_crowded_engine_serves_everyone_as_if_alone(golden: Path) -> None:
    parts = golden / "e2e_dit"
    crowd, alone = make_engines(golden / "llm" / "tiny_a", parts / "dit", parts / "vae")
    report = soak.soak(crowd, alone, REQUESTS, seed=1)
    assert problems(report) == []
    assert report.finished + report.aborted == REQUESTS
    # The mixture must have put to the test what it is for.
    assert report.aborted > 5
    assert report.preemptions > 5
    assert report.pictures > 5
    assert report.cached_blocks > 0
    assert report.image_hits > 0
    assert_idle(crowd)
    assert_idle(alone)


def test_what_must_not_happen_is_told() -> None:
    fine = Report(4, finished=4, preemptions=1, resident=[100, 100, 100, 101])
    assert problems(fine) == []
    growing = replace(fine, resident=[100] * 8 + [100, 100, 101, 101, 102, 102, 104, 104])
    for broken, text in (
        (replace(fine, failed=["2: no memory"]), "requests failed: ['2: no memory']"),
        (replace(fine, wrong=[3]), r"requests [3] differ"),
        (replace(fine, leaked_pages=5), "5 pages are held"),
        (replace(fine, preemptions=0), "pages never ran out"),
        (growing, "memory grew by 4.0%"),
    ):
        (found,) = problems(broken)
        assert text in found


def test_a_wrong_answer_is_found(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of one request is changed on its way out."""
    crowd, alone = make_engines(golden / "llm" / "tiny_a")
    read = crowd.runner.blocks.read
    touched = []

    def spoiling(flight: object) -> list:
        found = read(flight)
        for span, blocks in found:
            if span.sequence.request_id == 3 and not touched:
                touched.append(blocks[-1, 0])
                blocks[-1, 0] = 1 if blocks[-1, 0] != 1 else 2
        return found

    monkeypatch.setattr(crowd.runner.blocks, "read", spoiling)
    report = soak.soak(crowd, alone, 8, seed=2)
    assert touched
    assert report.wrong == [3]


def test_the_command_line_sums_up(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = golden / "e2e_dit"
    code = soak.main([
        "--requests", "20", "--model", str(golden / "llm" / "tiny_a"),
        "--dit", str(parts / "dit"), "--vae", str(parts / "vae"), "--seed", "4",
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert "finished" in printed.out
    assert "20/20 requests" in printed.err
    assert code == (1 if "problem:" in printed.out else 0)
    assert np.isfinite(float(printed.out.split("drift")[1].split("%")[0]))
