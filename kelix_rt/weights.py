"""Checkpoints to modules: tensors are streamed by name through tables of `Source`.

A model describes its parameters as data: `{parameter: Source(names of stored tensors)}`. Fusions
are concatenations in that table, never code. Everything that does not fit is an error that names
the tensor; nothing is ever initialised in place of a missing one. An int8 matrix of the module with
a buffer of its name and `_scale` is quantised as it is read, so that no more than one stored matrix
is ever there in full.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kelix_rt.checkpoint import Checkpoint, resolve
from kelix_rt.errors import WeightError
from kelix_rt.quantization import quantize_int8

__all__ = ["Checkpoint", "LoadReport", "Source", "load_weights", "resolve", "split_weights"]

_log = logging.getLogger(__name__)
SCALE = "_scale"  # of an int8 matrix: its name and this
OnTensor = Callable[[str, int], None]


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: stored tensors joined along dim 0.

    `rows` takes only these rows of each stored tensor (before joining); `reshape` is the shape the
    parameter has once joined, for layouts that differ without moving data (1x1 convolutions).
    `parts` are the shapes of the stored tensors, where they are not equal slices of the parameter
    along dim 0; `split_weights` needs them to undo the joining.
    """

    names: tuple[str, ...]
    rows: slice | None = None
    reshape: tuple[int, ...] | None = None
    parts: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class LoadReport:
    """What a load left behind: stored names the model is known not to need, and unknown ones."""

    unused_known: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    loaded_bytes: int = 0


@dataclass
class _Target:
    """One tensor of the module: its place, and the source that fills it."""

    name: str
    meta: torch.Tensor
    source: Source
    is_parameter: bool
    is_quantized: bool


def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    mapping: Mapping[str, Source],
    *,
    prefix: str = "",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    unused: Sequence[str] = (),
    on_tensor: OnTensor | None = None,
) -> LoadReport:
    """Fills the parameters and persistent buffers that `mapping` names, one tensor at a time.

    module: usually on the meta device; each tensor is allocated on `device` when its turn comes, so
        the peak is the model plus one stored tensor.
    mapping: module tensor name -> Source; names of a Source are completed by `prefix`.
    dtype: of floating tensors; None keeps the checkpoint's own (the commonest one it stores).
    unused: regular expressions (full match, after the prefix) of stored names known to be unneeded.
        Other leftovers are unknown: logged once and listed in the report.
    on_tensor: called with (module tensor name, bytes) after each tensor, for progress.

    Raises WeightError listing every missing name, or naming the tensor whose shape differs or
    which holds NaN or infinity.
    """
    targets = _targets(module, mapping)
    wanted = [prefix + name for target in targets for name in target.source.names]
    require_names(checkpoint, wanted)
    if dtype is None:
        dtype = float_dtype(checkpoint, wanted)
    total = 0
    for target in targets:
        tensor = _read(target, checkpoint, prefix, torch.device(device), dtype)
        size = _assign(module, target, tensor)
        total += size
        if on_tensor is not None:
            on_tensor(target.name, size)
    return _report(checkpoint, prefix, set(wanted), unused, total)


def split_weights(module: nn.Module, mapping: Mapping[str, Source]) -> dict[str, torch.Tensor]:
    """The stored tensors that `load_weights` would make this module from: its inverse.

    Tensors are copies. A table of which the module uses only the first rows comes back as those
    rows. Raises WeightError where the mapping and the module differ, and for int8 matrices.
    """
    found: dict[str, torch.Tensor] = {}
    for target in _targets(module, mapping):
        source, tensor = target.source, target.meta.detach()
        if target.is_quantized:
            raise WeightError(f"split_weights: {target.name} is int8; load it without quantization")
        if source.rows is not None and source.rows.indices(len(tensor))[0] != 0:
            raise WeightError(f"split_weights: {target.name} uses rows {source.rows} of its table")
        count = len(source.names)
        even = (tensor.shape[0] // count, *tensor.shape[1:])
        flat = tensor.reshape(-1).split([_numel(s) for s in source.parts or [even] * count])
        for name, part, shape in zip(
            source.names, flat, source.parts or [even] * count, strict=True
        ):
            found[name] = part.reshape(shape).clone()
    return found


def require_names(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raises WeightError with all of `names` that the checkpoint lacks."""
    missing = sorted(set(names) - set(checkpoint.names()))
    if missing:
        raise WeightError(f"{checkpoint.path}: missing {len(missing)} tensors: {missing}")


def float_dtype(checkpoint: Checkpoint, names: Iterable[str]) -> torch.dtype:
    """The commonest floating dtype among `names` (float32 when there is none)."""
    counts = Counter(checkpoint.dtype(name) for name in names)
    floating = [dtype for dtype, _ in counts.most_common() if dtype.is_floating_point]
    return floating[0] if floating else torch.float32


def check_finite(tensor: torch.Tensor, label: str) -> None:
    """Raises WeightError naming `label` if a floating tensor holds NaN or infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)  # NaN propagates, and no mask of the tensor's size is made
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise WeightError(f"{label} holds NaN or infinity as {tensor.dtype}")


def _targets(module: nn.Module, mapping: Mapping[str, Source]) -> list[_Target]:
    parameters = dict(module.named_parameters())
    state = module.state_dict(keep_vars=True)
    uncovered = sorted(set(state) - set(mapping))
    foreign = sorted(set(mapping) - set(state))
    if uncovered or foreign:
        raise WeightError(
            f"load_weights: the mapping and {type(module).__name__} differ: "
            f"tensors without source {uncovered}, sources without tensor {foreign}"
        )
    buffers = dict(module.named_buffers())
    return [
        _Target(
            name,
            state[name],
            source,
            name in parameters,
            state[name].dtype == torch.int8 and name + SCALE in buffers,
        )
        for name, source in mapping.items()
    ]


def _read(
    target: _Target,
    checkpoint: Checkpoint,
    prefix: str,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    names = [prefix + name for name in target.source.names]
    rows = target.source.rows
    shape = tuple(target.meta.shape)
    _check_shape(target, checkpoint, names, shape)
    floating = target.meta.is_floating_point() or target.is_quantized
    kind = dtype if floating else target.meta.dtype
    tensor = torch.empty(shape, dtype=kind, device=device)
    flat, start = tensor.view(-1), 0
    for name in names:
        part = checkpoint.read(name, rows).reshape(-1)
        flat[start : start + part.numel()].copy_(part)
        start += part.numel()
    check_finite(tensor, f"{checkpoint.path}: {' + '.join(names)}")
    return tensor


def _check_shape(
    target: _Target, checkpoint: Checkpoint, names: Sequence[str], shape: tuple[int, ...]
) -> None:
    source = target.source
    parts = [_rows_shape(checkpoint.shape(name), source.rows) for name in names]
    joined = parts[0]
    if len(parts) > 1:
        joined = (sum(part[0] for part in parts), *parts[0][1:])
    same_tail = all(part[1:] == parts[0][1:] for part in parts)
    if source.reshape is not None and _numel(joined) == _numel(source.reshape):
        joined = source.reshape
    if joined != shape or not same_tail:
        stored = [checkpoint.shape(name) for name in names]
        raise WeightError(
            f"{checkpoint.path}: {' + '.join(names)} must give shape {list(shape)}, "
            f"got {[list(s) for s in stored]}"
        )


def _rows_shape(shape: tuple[int, ...], rows: slice | None) -> tuple[int, ...]:
    if rows is None:
        return shape
    return (len(range(*rows.indices(shape[0]))), *shape[1:])


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _assign(module: nn.Module, target: _Target, tensor: torch.Tensor) -> int:
    """Puts a tensor in its place, quantised where the place is; the bytes it takes there."""
    path, _, leaf = target.name.rpartition(".")
    owner = module.get_submodule(path)
    size = 0
    if target.is_quantized:
        tensor, scale = quantize_int8(tensor)
        setattr(owner, leaf + SCALE, scale)
        size = scale.nbytes
    if target.is_parameter:
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(owner, leaf, tensor)
    return size + tensor.nbytes


def _report(
    checkpoint: Checkpoint, prefix: str, used: set[str], unused: Sequence[str], total: int
) -> LoadReport:
    patterns = [re.compile(pattern) for pattern in unused]
    left = [name for name in checkpoint.names() if name.startswith(prefix) and name not in used]
    known = [n for n in left if any(p.fullmatch(n.removeprefix(prefix)) for p in patterns)]
    unknown = sorted(set(left) - set(known))
    if unknown:
        _log.warning("%s: ignored %d unknown tensors: %s", checkpoint.path, len(unknown), unknown)
    return LoadReport(tuple(known), tuple(unknown), total)
