from __future__ import annotations

import math

import torch

from kelix_rt.parity.report import agreement, equal, failures, max_abs, relative_rms


def test_max_abs() -> None:
    want = torch.tensor([1.0, 2.0])
    assert max_abs("x", want + 0.25, want, 0.25).ok
    check = max_abs("x", torch.tensor([1.0, 2.5]), want, 0.25, "note")
    assert (check.error, check.ok, check.note) == (0.5, False, "note")


def test_large_values_may_differ_by_units_in_the_last_place() -> None:
    want = torch.tensor([1.0, 1024.0])
    unit = 2.0**-13
    assert max_abs("x", want + 8 * unit, want, 1e-5).ok
    assert not max_abs("x", want + 9 * unit, want, 1e-5).ok
    assert not max_abs("x", want + unit, want, 0.0).ok


def test_nan_never_passes() -> None:
    want = torch.tensor([1.0, 2.0])
    got = torch.tensor([1.0, float("nan")])
    assert not max_abs("x", got, want, 1e9).ok
    assert not relative_rms("x", got, want, 1e9).ok


def test_another_shape_never_passes() -> None:
    for compare in (max_abs, relative_rms, agreement):
        check = compare("x", torch.zeros(2, 1), torch.zeros(2), 1.0)
        assert not check.ok
        assert math.isinf(check.error)
        assert "[2, 1]" in check.note
    assert not equal("x", torch.zeros(2, 1), torch.zeros(2)).ok


def test_relative_rms() -> None:
    want = torch.tensor([3.0, 4.0])
    check = relative_rms("x", want + torch.tensor([0.0, 0.5]), want, 0.1)
    assert math.isclose(check.error, 0.1)
    assert relative_rms("x", torch.zeros(2), torch.zeros(2), 0.0).ok


def test_equal_counts_and_agreement_shares() -> None:
    want = torch.arange(10)
    got = want.clone()
    got[3] = 0
    assert (equal("x", got, want).error, equal("x", got, want).ok) == (1.0, False)
    assert agreement("x", got, want, 0.1).ok
    assert agreement("x", got, want, 0.1).error == 0.1
    assert not agreement("x", got, want, 0.05).ok
    assert equal("x", want, want).ok


def test_failures() -> None:
    checks = [equal("a", torch.zeros(1), torch.zeros(1)), equal("b", torch.ones(1), torch.zeros(1))]
    assert [check.name for check in failures(checks)] == ["b"]
