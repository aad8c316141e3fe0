from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kelix_rt.errors import KelixError
from kelix_rt.train.jobs import JOBS, Job, run_jobs
from kelix_rt.train.pipeline import STAGES


def test_jobs_train_every_stage_once_and_in_order() -> None:
    found: dict[str, list[str]] = {}
    for number, job in enumerate(JOBS):
        assert set(job.after) <= set(JOBS[:number]), "it would wait for ever"
        before = [other for other in JOBS[:number] if other.part == job.part]
        assert set(before[-1:]) <= set(job.after), "stages of one part need each other"
        found.setdefault(job.part, []).extend(job.stages or STAGES[job.part])
    assert found == {part: list(stages) for part, stages in STAGES.items()}


def test_what_has_all_threads_has_nothing_beside_it() -> None:
    def needs(job: Job) -> set[Job]:
        return {job}.union(*map(needs, job.after))

    assert [needs(job) == set(JOBS) for job in JOBS if job.alone] == [True]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a command notes its part, "+" and threads when it starts and "-" when it ends.

    It ends when the log has the line that `waits` gave its part, and fails after a minute without;
    the part "wrong" fails then, too. "!" is noted when it is stopped.
    """
    script, log = tmp_path / "note", tmp_path / "log"
    script.write_text(
        "#!/bin/sh\n"  # sh -m kelix_rt.train PART --seed 1 --threads N
        f"cd {tmp_path}; left=1200; "
        'trap "echo !$3 >> log; exit 1" TERM; echo "+$3$7" >> log\n'
        "while [ -e waits-$3 ] && ! grep -qxFf waits-$3 log; do\n"
        "  sleep 0.05; left=$((left - 1)); [ $left -gt 0 ] || exit 1\n"
        "done\n"
        '[ $3 != wrong ] || exit 1; echo "-$3" >> log\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr("kelix_rt.train.jobs.sys.executable", str(script))
    monkeypatch.setattr("kelix_rt.train.jobs.POLL_SECONDS", 0.01)
    return log


def waits(log: Path, **lines: str) -> None:
    """Which line each part waits for."""
    for part, line in lines.items():
        (log.parent / f"waits-{part}").write_text(f"{line}\n")


def test_a_job_starts_when_those_it_is_after_have_ended(log: Path) -> None:
    waits(log, a="-c", b="+a2")
    long, short = Job("a"), Job("b")
    third = Job("c", after=(short,))
    last = Job("d", after=(long, third), alone=True)
    run_jobs((long, short, third, last), ["--seed", "1"], threads=5)
    told = log.read_text().split()
    assert set(told[:2]) == {"+a2", "+b2"}
    assert told[2:] == ["-b", "+c2", "-c", "-a", "+d5", "-d"]


def test_two_run_at_a_time(log: Path) -> None:
    waits(log, a="+b1", b="+a1")
    run_jobs([Job("a"), Job("b"), Job("c")], ["--seed", "1"], threads=1)
    told = log.read_text().split()
    assert set(told[:2]) == {"+a1", "+b1"} and told[2][0] == "-"


def test_a_failure_stops_what_runs_beside_it(log: Path) -> None:
    waits(log, a="never", wrong="+a1")
    long, wrong = Job("a"), Job("wrong")
    with pytest.raises(KelixError, match="train wrong: ended with exit code 1"):
        run_jobs([long, wrong, Job("c", after=(wrong,))], ["--seed", "1"], threads=1)
    assert set(log.read_text().split()) == {"+a1", "+wrong1", "!a"}


def test_jobs_end_with_the_command_that_started_them(tmp_path: Path) -> None:
    """`train all` that is told to end leaves nobody training behind it."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "kelix_rt.train", "all", "--out", str(out), "--device", "cpu"]
    with subprocess.Popen([*command, "--threads", "2"], start_new_session=True) as started:
        try:
            deadline = time.monotonic() + 120
            while not [*out.glob("*/*.lock")] and time.monotonic() < deadline:
                assert started.poll() is None
                time.sleep(0.1)
            started.terminate()
            assert started.wait(60) == 128 + signal.SIGTERM
            with pytest.raises(ProcessLookupError):  # nobody is left of its group
                os.killpg(started.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)


def test_jobs_are_commands_of_the_package() -> None:
    run_jobs([Job("tokenizer"), Job("language", ("1", "2.1"))], ["--help"], threads=1)
    with pytest.raises(KelixError, match="train language --stage 9: ended with exit code 1"):
        run_jobs([Job("language", ("9",))], [], threads=1)
