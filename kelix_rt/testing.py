"""What tests and benchmarks share: seeded inputs, the tolerance rule, timing.

Public, so that users of single operators can check and time them the same way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kelix_rt.graphs import CudaRecorder

FLUSH_BYTES = 256 << 20  # larger than any cache


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


def median_seconds(
    call: Callable[[], object], device: str = "cpu", repeats: int = 9, graph: bool = False
) -> float:
    """Median time of a call in seconds, after one warm-up call.

    On a GPU: CUDA events around each call, with a write of 256 MiB before it so that no input is
    still in the L2 cache. graph: the call is captured once and replayed, which leaves out the
    time the host takes to launch it; it must not synchronise then. Has no effect on a CPU.
    """
    call()
    if not device.startswith("cuda"):
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    run = CudaRecorder(torch.device(device))(call) if graph else call
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = []
    for _ in range(repeats):
        begin_event = torch.cuda.Event(enable_timing=True)
        end_event = torch.cuda.Event(enable_timing=True)
        flush.zero_()
        begin_event.record()
        run()
        end_event.record()
        events.append((begin_event, end_event))
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) * 1e-3 for begin, end in events)


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second that a copy of 256 MiB moves, reads and writes counted."""
    source = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * FLUSH_BYTES / median_seconds(lambda: target.copy_(source), device)


def matrix_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP per second of torch's own product of two square matrices."""
    side = 8192 if device.startswith("cuda") else 2048
    a = randn(side, side, dtype=dtype, device=device)
    return 2 * side**3 / median_seconds(lambda: a @ a, device, repeats=5)
