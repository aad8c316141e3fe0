"""How blocks are drawn and how images are rendered: validated values, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from kelix_rt.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SEED_LIMIT = 1 << 63
TOP_K_LIMIT = 1 << 24  # above it a float32 row of parameters cannot hold the value exactly


def _check_number(
    owner: str, name: str, value: float, low: float, high: float, *, open_low: bool = False
) -> None:
    rule = f"must be a number in {'(' if open_low else '['}{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise InputError(f"{owner}.{name} {rule}, got {value!r}")
    inside = low < value <= high if open_low else low <= value <= high
    if not math.isfinite(value) or not inside:
        raise InputError(f"{owner}.{name} {rule}, got {value!r}")


def _check_integer(owner: str, name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{owner}.{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise InputError(f"{owner}.{name} must be in [{low}, {high}], got {value!r}")


def _check_distribution(
    owner: str,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> None:
    """Limits of the four sampling values; None means "inherit" and is always fine."""
    if temperature is not None:
        _check_number(owner, "temperature", temperature, 0.0, 1e4)
    if top_k is not None:
        _check_integer(owner, "top_k", top_k, 0, TOP_K_LIMIT)
    if top_p is not None:
        _check_number(owner, "top_p", top_p, 0.0, 1.0, open_low=True)
    if min_p is not None:
        _check_number(owner, "min_p", min_p, 0.0, 1.0)


@dataclass(frozen=True)
class SlotSampling:
    """Overrides of the sampling values for visual slots; None inherits SamplingParams' value."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        _check_distribution("SlotSampling", self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class SamplingParams:
    """How blocks are drawn and when a request ends.

    temperature: 0 takes the most likely id (under rule "reference" it divides by nothing, as in the
    release; top_k=1 is greedy there). top_k: 0 is off, 1 is greedy. top_p in (0, 1].
    min_p in [0, 1]: drop ids below min_p times the largest probability.
    seed: draws depend on (seed, index of the generated block, slot) only; None lets the engine
        derive one from its own seed and a counter of requests.
    max_blocks: exact cap on the number of generated blocks; None takes 256, or for drawing twice
        the engine's max_condition_length plus 11, and no more than the model has positions for.
    stop_ids: first ids that end the request like end-of-sequence does. Neither is looked for in
        the first generated block, as in the release. ignore_eos: never stop at end-of-sequence.
    visual: overrides for the slots 1..N-1, which hold nothing but visual codes: one for all of
        them, or a tuple of N-1 entries (None inherits).
    rule: "ancestral" draws slot after slot from the joint distribution; "reference" re-draws each
        slot along the greedy chain, as the release does.
    """

    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.9
    min_p: float = 0.0
    seed: int | None = None
    max_blocks: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    visual: SlotSampling | tuple[SlotSampling | None, ...] | None = None
    rule: Literal["ancestral", "reference"] = "ancestral"

    def __post_init__(self) -> None:
        owner = "SamplingParams"
        for name in ("temperature", "top_k", "top_p", "min_p"):
            if getattr(self, name) is None:
                raise InputError(f"{owner}.{name} must be a number, got None")
        _check_distribution(owner, self.temperature, self.top_k, self.top_p, self.min_p)
        if self.max_blocks is not None:
            _check_integer(owner, "max_blocks", self.max_blocks, 1, 1 << 30)
        if self.seed is not None:
            _check_integer(owner, "seed", self.seed, -SEED_LIMIT, SEED_LIMIT - 1)
        if not isinstance(self.stop_ids, tuple | list | set | frozenset):
            raise InputError(f"{owner}.stop_ids must be a list of ids, got {self.stop_ids!r}")
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        for stop in self.stop_ids:
            _check_integer(owner, "stop_ids", stop, 0, 1 << 31)
        if self.rule not in ("ancestral", "reference"):
            raise InputError(f"{owner}.rule must be 'ancestral' or 'reference', got {self.rule!r}")
        entries = self.visual if isinstance(self.visual, tuple) else (self.visual,)
        for entry in entries:
            if entry is not None and not isinstance(entry, SlotSampling):
                raise InputError(
                    f"{owner}.visual must hold SlotSampling objects or None, got {entry!r}"
                )

    def table(self, num_slots: int) -> np.ndarray:
        """The values as float32 [num_slots, 4]: temperature, top_k, top_p, min_p per slot.

        num_slots is N+1. Raises InputError when `visual` is a tuple of another length than N-1.
        """
        base = (self.temperature, self.top_k, self.top_p, self.min_p)
        rows = np.tile(np.asarray(base, dtype=np.float32), (num_slots, 1))
        if self.visual is None:
            return rows
        inner = num_slots - 2
        entries = self.visual if isinstance(self.visual, tuple) else (self.visual,) * inner
        if len(entries) != inner:
            raise InputError(
                f"SamplingParams.visual must have one entry for each of the {inner} slots "
                f"1..{inner}, got {len(entries)}"
            )
        for slot, entry in enumerate(entries, start=1):
            if entry is None:
                continue
            values = (entry.temperature, entry.top_k, entry.top_p, entry.min_p)
            for column, value in enumerate(values):
                if value is not None:
                    rows[slot, column] = value
        return rows


GREEDY_DRAWING = SamplingParams(temperature=0.0, top_k=1, top_p=1.0)


@dataclass(frozen=True)
class RenderParams:
    """How the image DiT turns a condition into pixels.

    height, width: pixels; None takes the size the model was trained for. steps: denoise steps.
    cfg: guidance; 1 evaluates the condition alone. shift: of the flow schedule.
    seed: of the starting noise; None lets the engine derive one. latent: the starting noise
    itself, a tensor [1, C, h, w], for runs that must be comparable bit by bit.
    """

    height: int | None = None
    width: int | None = None
    steps: int = 50
    cfg: float = 1.0
    shift: float = 3.0
    scheduler: Literal["euler", "dpm++"] = "euler"
    seed: int | None = None
    latent: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        owner = "RenderParams"
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None:
                _check_integer(owner, name, value, 1, 1 << 16)
        _check_integer(owner, "steps", self.steps, 1, 1000)
        _check_number(owner, "cfg", self.cfg, 0.0, 100.0)
        _check_number(owner, "shift", self.shift, 1e-3, 1000.0)  # float32 loses one near 0
        if self.scheduler not in ("euler", "dpm++"):
            raise InputError(
                f"{owner}.scheduler must be 'euler' or 'dpm++', got {self.scheduler!r}"
            )
        if self.seed is not None:
            _check_integer(owner, "seed", self.seed, -SEED_LIMIT, SEED_LIMIT - 1)
