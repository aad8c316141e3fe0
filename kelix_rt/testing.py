"""What tests and benchmarks share: seeded inputs, the tolerance rule, timing.

Public, so that users of single operators can check and time them the same way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Seeded normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def largest(tensor: Tensor) -> float:
    """Largest magnitude, 0 for an empty tensor."""
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def assert_as_accurate_as_torch(got: Tensor, in_dtype: Tensor, exact: Tensor) -> None:
    """`got` errs at most twice as much as plain torch in the same dtype, against float64.

    One rounding of the result is always allowed: torch may be lucky and exact.
    """
    assert got.shape == exact.shape, f"shape {tuple(got.shape)} instead of {tuple(exact.shape)}"
    assert got.dtype == in_dtype.dtype, f"dtype {got.dtype} instead of {in_dtype.dtype}"
    error = largest(got.double() - exact.double())
    torch_error = largest(in_dtype.double() - exact.double())
    rounding = torch.finfo(got.dtype).eps * largest(exact)
    assert error <= 2 * torch_error + rounding, (
        f"error {error:.3e} > 2 x torch's {torch_error:.3e} + one rounding {rounding:.3e}"
    )


def median_seconds(call: Callable[[], object], device: str = "cpu", repeats: int = 9) -> float:
    """Median time of a call in seconds, after one warm-up call.

    On a GPU: CUDA events around each call, with a write of 256 MiB before it so that no input is
    still in the L2 cache.
    """
    call()
    if not device.startswith("cuda"):
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    flush = torch.empty(64 << 20, dtype=torch.float32, device=device)
    events = []
    for _ in range(repeats):
        begin_event = torch.cuda.Event(enable_timing=True)
        end_event = torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin_event.record()
        call()
        end_event.record()
        events.append((begin_event, end_event))
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) * 1e-3 for begin, end in events)
