"""The calls that compute-sanitizer watches on a GPU are valid ones."""

from __future__ import annotations

import pytest

from tests.gpu import small_calls


def test_every_call_runs_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    small_calls.main("cpu")
    assert capsys.readouterr().out.count("ran") == 6
