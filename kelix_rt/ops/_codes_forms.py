"""The forms of `nearest_codes`, timed against each other once and remembered by shape.

Untuned, the kernel answers every call. Nothing is timed but by `tune_nearest_codes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps

import torch
from torch import Tensor

from kelix_rt.ops._fake import register_fake
from kelix_rt.ops.norm import layer_norm

Form = Callable[..., Tensor]  # the signature of nearest_codes
Key = tuple[object, ...]
Seconds = Callable[[Callable[[], object]], float]

DISTANCE_BYTES = 16 << 20  # of distances that the product form holds at once: in the L2 cache
LEAST_AGREEMENT = 0.99  # distances that tie up to float32's error may have their codes swapped


@dataclass(frozen=True)
class Choice:
    """The fastest form for a kind of call, and the seconds that each form took."""

    name: str
    form: Form
    seconds: dict[str, float]


CHOSEN: dict[Key, Choice] = {}


def key_of(
    z: Tensor,
    codebooks: Tensor,
    norms: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    reference: bool,
) -> Key:
    """What a choice holds for: device, dtype and shape of all inputs, and the mode.

    Of the number of tokens only its binary digits count.
    """
    others = (codebooks, norms, ln_weight, ln_bias)
    kinds = (None if t is None else (t.device, t.dtype, t.shape) for t in others)
    return (z.device, z.dtype, z.shape[1:], z.shape[0].bit_length(), reference, *kinds)


def token_norms(z: Tensor) -> Tensor:
    """[T, N, d] -> float32 [T, N]: squared lengths with the roundings of the reference."""
    return z.square().float().sum(-1).to(z.dtype).float()


def _after_norm(search: Callable[[Tensor, Tensor, Tensor, bool], Tensor]) -> Form:
    """The form of a search for the codes of tokens that are normalised already."""

    @wraps(search)
    @torch.no_grad()
    def form(z, codebooks, norms, ln_weight=None, ln_bias=None, eps=1e-5, reference=False):  # type: ignore[no-untyped-def]
        if ln_weight is not None:
            z = layer_norm(z, ln_weight, ln_bias, eps)
        return search(z, codebooks, norms, reference)

    return form


@_after_norm
def nearest_codes_product(z: Tensor, codebooks: Tensor, norms: Tensor, reference: bool) -> Tensor:
    """`nearest_codes` by torch: a batched product (cuBLAS on a GPU), then the minimum of each row.

    Distances are stored, `DISTANCE_BYTES` at a time.
    """
    num_books, num_codes, _ = codebooks.shape
    rows = max(1, DISTANCE_BYTES // (4 * num_books * num_codes))
    indices = z.new_empty(z.shape[:2], dtype=torch.int64)
    for first in range(0, z.shape[0], rows):
        part = z[first : first + rows].transpose(0, 1)
        indices[first : first + rows] = _nearest_of_part(part, codebooks, norms, reference).t()
    return indices


def _nearest_of_part(z: Tensor, codebooks: Tensor, norms: Tensor, reference: bool) -> Tensor:
    """[N, rows, d] -> [N, rows]. A function, so that its distances are gone before the next."""
    offsets = norms.unsqueeze(1)
    if reference:
        offsets = token_norms(z).unsqueeze(-1) + offsets
    dots = _float32_product(z, codebooks.transpose(1, 2))
    distances = torch.sub(offsets, dots, alpha=2, out=dots)
    if reference:
        distances = distances.to(z.dtype).clamp_(min=0).sqrt_().square_()
    least, index = distances.min(-1)
    return index.masked_fill_(least.isnan(), 0)


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with float32 sums that are not rounded to the dtype of the operands."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


@_after_norm
def nearest_codes_cutlass(z: Tensor, codebooks: Tensor, norms: Tensor, reference: bool) -> Tensor:
    """`nearest_codes` by a CUTLASS product of all books; 16-bit on sm_90a, d a multiple of 8."""
    squares = token_norms(z) if reference else None
    return torch.ops.kelix.nearest_codes_cutlass(z, codebooks, norms, squares)


@register_fake("nearest_codes_cutlass")
def _nearest_codes_cutlass_fake(
    z: Tensor, codebooks: Tensor, norms: Tensor, token_norms: Tensor | None
) -> Tensor:
    return z.new_empty((z.shape[0], z.shape[1]), dtype=torch.int64)


def forms_for(codebooks: Tensor) -> dict[str, Form]:
    """The forms that can search these books where they are, by name; the default one first.

    float32 on a GPU has the kernel alone: torch's product there may run in TF32, as a global switch
    says that can change after the choice.
    """
    forms: dict[str, Form] = {"kernel": torch.ops.kelix.nearest_codes}
    if not codebooks.is_cuda:
        return forms | {"product": nearest_codes_product}
    if codebooks.dtype == torch.float32:
        return forms
    forms["product"] = nearest_codes_product
    built = torch.ops.kelix.build_info()
    on_hopper = torch.cuda.get_device_capability(codebooks.device) == (9, 0)
    if on_hopper and codebooks.shape[-1] % 8 == 0 and "cutlass=" in built and "90a" in built:
        forms["cutlass"] = nearest_codes_cutlass
    return forms


@torch.no_grad()
def tune_nearest_codes(
    codebooks: Tensor,
    norms: Tensor,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    reference: bool = False,
    *,
    tokens: Sequence[int],
    seconds: Seconds | None = None,
) -> dict[int, Choice]:
    """Times the forms of `nearest_codes` on random tokens; calls like these take the fastest.

    codebooks, norms, ln_weight, ln_bias, reference: as for `nearest_codes`. tokens: numbers of
        tokens to choose for, each for all numbers with as many binary digits; what was chosen
        before stays and is not timed again.
    seconds: median time of a call; by default after a warm-up call, on a GPU by CUDA events.
    Forms may differ where distances tie up to float32's error. Returns the choices by number of
    tokens. ValueError for a number below 1; RuntimeError for a form that finds other codes.
    """
    if min(tokens, default=1) < 1:
        raise ValueError(f"tune_nearest_codes: tokens must be positive, got {list(tokens)}")
    if seconds is None:
        from kelix_rt.testing import median_seconds

        device = str(codebooks.device)

        def seconds(call: Callable[[], object]) -> float:
            return median_seconds(call, device)

    choices = {}
    for count in tokens:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(count, codebooks.shape[0], codebooks.shape[2], generator=generator)
        inputs = (z.to(codebooks), codebooks, norms, ln_weight, ln_bias)
        key = key_of(*inputs, reference)
        if key not in CHOSEN:
            CHOSEN[key] = _fastest(forms_for(codebooks), (*inputs, 1e-5, reference), seconds)
        choices[count] = CHOSEN[key]
    return choices


def _fastest(forms: dict[str, Form], inputs: tuple[object, ...], seconds: Seconds) -> Choice:
    _check_agreement(forms, inputs)
    times = {name: seconds(partial(form, *inputs)) for name, form in forms.items()}
    name = min(times, key=times.__getitem__)
    return Choice(name, forms[name], times)


def _check_agreement(forms: dict[str, Form], inputs: tuple[object, ...]) -> None:
    found = {name: form(*inputs) for name, form in forms.items()}
    for name, ids in found.items():
        same = (ids == found["kernel"]).float().mean().item()
        if same < LEAST_AGREEMENT:
            raise RuntimeError(
                f"tune_nearest_codes: form '{name}' must find the kernel's codes, got {same:.1%} "
                "of them; do not tune on this device, and report it"
            )
