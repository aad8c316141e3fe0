"""Recorded evaluations of the image DiT: one CUDA graph for all steps of all drawings."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor

from kelix_rt.graphs import GraphCounts, Recorded, Recorder
from kelix_rt.models.dit_condition import ConditionCache
from kelix_rt.models.dit_positions import latent_tables
from kelix_rt.models.transfer import to_device

if TYPE_CHECKING:
    from kelix_rt.models.dit import KelixDiT

# Rows that are evaluated as a graph: a drawing, one with guidance, or two. The kernels of more rows
# take longer than their launches, and every row keeps room for a condition of full length.
DENOISE_ROWS = 2


class _Inputs:
    """What an evaluation of up to `rows` rows reads, at fixed addresses."""

    def __init__(self, dit: KelixDiT, rows: int, capacity: int) -> None:
        config = dit.config
        zeros = partial(torch.zeros, device=dit.device, dtype=dit.dtype)
        side, heads = config.input_size, config.num_heads
        steps = len(dit.modulation_table)
        self.grid = (side // config.patch_size,) * 2
        self.latent = torch.zeros(rows, config.in_channels, side, side, device=dit.device)
        self.modulation = zeros((steps, rows, config.hidden_size))
        shape = (rows, capacity, heads, config.hidden_size // heads)
        pairs = [[zeros(shape) for _ in range(config.depth)] for _ in "kv"]
        self.keys, self.values = ([part.transpose(1, 2) for part in parts] for parts in pairs)
        self.mask = torch.ones(rows, 1, 1, capacity, dtype=torch.bool, device=dit.device)
        # The model keeps these for the sizes seen last only, but a graph reads them for ever.
        self.tables = latent_tables(config, self.grid, dit.dtype, dit.device)
        self._condition: ref[ConditionCache] | None = None

    @property
    def capacity(self) -> int:
        """Tokens of the longest condition."""
        return self.mask.shape[-1]

    def cache(self, rows: int) -> ConditionCache:
        """The conditions of the first rows, all as long as the longest may be."""
        return ConditionCache(
            tuple(part[:rows] for part in self.keys),
            tuple(part[:rows] for part in self.values),
            self.mask[:rows],
            (self.capacity,) * rows,
            self.capacity,
            self.capacity,
        )

    def load(self, cache: ConditionCache) -> None:
        """Copies the conditions of a batch here, unless they are here already."""
        if self._condition is not None and self._condition() is cache:
            return
        self._condition = None  # until all is copied
        rows, length = cache.batch, cache.keys[0].shape[2]
        for own, given in ((self.keys, cache.keys), (self.values, cache.values)):
            for target, source in zip(own, given, strict=True):
                target[:rows, :, :length].copy_(source)
                target[:rows, :, length:].zero_()  # masked, but 0 x NaN would be NaN
        limits = to_device(cache.lengths, self.mask.device).view(-1, 1, 1, 1)
        places = torch.arange(self.capacity, device=self.mask.device)
        self.mask[:rows].copy_(places < limits)
        self._condition = ref(cache)


class DenoiseGraphs:
    """`KelixDiT.forward_cached`, recorded for the model's own latent size and a few rows.

    capacity: tokens of the longest condition. Timesteps come as modulation and conditions as keys
    and values, both copied to where the graphs read them; nothing is recorded until `capture`.
    """

    def __init__(self, dit: KelixDiT, capacity: int, counts: GraphCounts) -> None:
        self._dit = dit
        self._capacity = capacity
        self._counts = counts
        self._inputs: _Inputs | None = None
        self._steps: dict[int, Recorded[Tensor]] = {}

    @property
    def is_captured(self) -> bool:
        """Whether evaluations were recorded."""
        return bool(self._steps)

    def capture(self, recorder: Recorder) -> None:
        """Records an evaluation of 1 .. DENOISE_ROWS rows."""
        inputs = _Inputs(self._dit, DENOISE_ROWS, self._capacity)
        evaluate = torch.inference_mode()(self._dit.forward_cached)
        steps = {}
        for rows in range(DENOISE_ROWS, 0, -1):  # smaller ones fit in the memory of larger ones
            work = partial(
                evaluate, inputs.latent[:rows], inputs.modulation[:, :rows], inputs.cache(rows)
            )
            steps[rows] = Recorded(work, recorder)
        self._inputs, self._steps = inputs, steps

    def forget(self) -> None:
        """Gives the memory of the recorded evaluations back."""
        self._steps.clear()
        self._inputs = None

    def evaluate(self, latent: Tensor, modulation: Tensor, cache: ConditionCache) -> Tensor:
        """As `KelixDiT.forward_cached`; the velocity holds until the next call.

        Eager, which counts as a miss, for another latent size, more rows or longer conditions.
        """
        inputs, rows = self._inputs, len(latent)
        if inputs is None:
            return self._dit.forward_cached(latent, modulation, cache)
        fits = latent.shape[1:] == inputs.latent.shape[1:] and rows in self._steps
        if not fits or cache.keys[0].shape[2] > inputs.capacity:
            self._counts.misses += 1
            return self._dit.forward_cached(latent, modulation, cache)
        self._counts.replays += 1
        inputs.load(cache)
        inputs.latent[:rows].copy_(latent)
        inputs.modulation[:, :rows].copy_(modulation)
        return self._steps[rows].replay()
