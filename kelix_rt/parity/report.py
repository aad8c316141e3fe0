"""One row of a parity report, and the comparisons that make such rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Eight units in the last place of the largest value: golden states of up to 50 are float32 sums in
# another order than ours, and up to 2.1e-5 from the exact ones themselves.
FLOAT32_UNITS = 8 * 2.0**-23


@dataclass(frozen=True)
class Check:
    """One comparison with a golden tensor: passed iff `ok`; `error` in the units of `tolerance`."""

    name: str
    error: float
    tolerance: float
    ok: bool
    note: str = ""


def max_abs(name: str, got: Tensor, want: Tensor, tolerance: float, note: str = "") -> Check:
    """Largest absolute difference, at most `tolerance`, or FLOAT32_UNITS of the largest finite
    value where that is more; a tolerance of 0 stays 0. NaN never passes."""
    if got.shape != want.shape:
        return _other_shape(name, got, want, tolerance)
    finite = want[want.isfinite()].abs()
    if tolerance and finite.numel():
        tolerance = max(tolerance, FLOAT32_UNITS * float(finite.max()))
    difference = (got.double().cpu() - want.double().cpu()).abs()
    error = float(difference.max()) if difference.numel() else 0.0
    return Check(name, error, tolerance, error <= tolerance, note)


def relative_rms(name: str, got: Tensor, want: Tensor, tolerance: float, note: str = "") -> Check:
    """Root mean square of the difference over that of `want`, at most `tolerance`."""
    if got.shape != want.shape:
        return _other_shape(name, got, want, tolerance)
    expected = want.double().cpu()
    difference = (got.double().cpu() - expected).norm()
    scale = expected.norm()
    error = float(difference / scale) if scale > 0 else float(difference)
    return Check(name, error, tolerance, error <= tolerance, note or "relative RMS")


def equal(name: str, got: Tensor, want: Tensor, note: str = "") -> Check:
    """Integers must be equal; the error is the number of elements that are not."""
    return agreement(name, got, want, 0.0, note)


def agreement(name: str, got: Tensor, want: Tensor, allowed_share: float, note: str = "") -> Check:
    """At most `allowed_share` of the elements differ. Error: number, or share when a share may."""
    if got.shape != want.shape:
        return _other_shape(name, got, want, allowed_share)
    wrong = int((got.cpu() != want.cpu()).sum())
    share = wrong / want.numel() if want.numel() else 0.0
    error = share if allowed_share > 0 else float(wrong)
    return Check(name, error, allowed_share, share <= allowed_share, note)


def failures(checks: Sequence[Check]) -> list[Check]:
    """The rows that did not pass."""
    return [check for check in checks if not check.ok]


def _other_shape(name: str, got: Tensor, want: Tensor, tolerance: float) -> Check:
    note = f"shape {list(got.shape)}, expected {list(want.shape)}"
    return Check(name, float("inf"), tolerance, False, note)
