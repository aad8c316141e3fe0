"""Products of 16-bit factors on CPUs that cannot multiply them: in float32, with one rounding.

There torch falls back to slow kernels: with AVX2 alone a product of 64 rows takes five times as
long as this, a convolution a hundred times (docs/kernels/linear.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import repeat
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from kelix_rt.quantization import TILE

Function: TypeAlias = Callable[..., Any]


def are_native(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether the device multiplies factors of this dtype in hardware: any GPU; some CPUs, where
    the dtype is bfloat16 or float16."""
    return torch.device(device).type != "cpu" or _cpu_multiplies(dtype)


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; of 16-bit tensors on a CPU without such products, rounded once from float32.

    x: [..., I]; weight: [O, I]; bias: [O]; all of one dtype. Returns [..., O] in it.
    """
    if are_native(x.dtype, x.device):
        return F.linear(x, weight, bias)
    wide, step = x.float(), max(1, TILE // weight.shape[1])
    biases = repeat(None) if bias is None else bias.float().split(step)
    tiles = zip(weight.split(step), biases, strict=False)
    parts = [F.linear(wide, w.float(), b).to(x.dtype) for w, b in tiles]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class Linear(nn.Linear):
    """nn.Linear by `product`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return product(input, self.weight, self.bias)


class Replacing(TorchFunctionMode):
    """Inside `with`, calls of some of torch's functions go to others: {function: replacement}."""

    def __init__(self, replacements: Mapping[Function, Function]) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls the replacement, or what was called."""
        return self._replacements.get(func, func)(*args, **(kwargs or {}))


class Float32Products(Replacing):
    """Inside `with`, F.linear and F.conv2d of 16-bit tensors compute in float32 and round once.

    For models that are not ours. A weight is made float32 for one call, so no memory is kept.
    """

    def __init__(self) -> None:
        super().__init__({f: partial(_rounded_once, f) for f in (F.linear, F.conv2d)})


def _rounded_once(function: Function, *args: Any, **kwargs: Any) -> Tensor:
    wide_args, wide_kwargs = tree_map(_wide, (args, kwargs))
    result: Tensor = function(*wide_args, **wide_kwargs)
    return result.to(args[0].dtype)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
