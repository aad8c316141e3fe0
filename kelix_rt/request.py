"""What a caller hands to the engine and what comes back: plain dataclasses, no torch.

A *block* is one position of the language model: a row of N+1 ids, either a text id followed by
end-of-block ids, or N visual codes and one end-of-block id. `slot` counts inside a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from kelix_rt.params import GREEDY_DRAWING, RenderParams, SamplingParams, SlotSampling

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "GREEDY_DRAWING",
    "BlockEvent",
    "BlockOutput",
    "ChatOutput",
    "Event",
    "FinishReason",
    "ImageCodes",
    "ImageDone",
    "ImageOutput",
    "ImageProgress",
    "Output",
    "Prompt",
    "RenderParams",
    "RequestDone",
    "RequestFailed",
    "SamplingParams",
    "SlotSampling",
    "TextDelta",
    "Timings",
    "Usage",
]

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Prompt:
    """One input of the language model.

    ids: text ids [S] (any integer sequence, array or 1-D tensor) whose image placeholders stand
        for the rows of the images in order, or whole rows [S, N+1] without placeholders.
    image_ids: rows of the placeholders in the model's own id space [n, N].
    pixel_values, image_grid_thw: instead of image_ids, the patches [P, 3, p, p] and grids
        [images, 3] that the vision tokenizer encodes when the request is admitted; numpy arrays
        of them are taken too.
    """

    ids: Sequence[int] | np.ndarray | Tensor
    image_ids: np.ndarray | Tensor | None = None
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None


@dataclass(frozen=True)
class Usage:
    """Counts of blocks (positions of the language model)."""

    prompt_blocks: int = 0
    cached_blocks: int = 0
    generated_blocks: int = 0
    preemptions: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds of wall clock, counted from add_request; 0.0 where a stage was not visited."""

    queued: float = 0.0
    first_block: float = 0.0
    blocks: float = 0.0
    render: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Output:
    """A finished request. blocks: int64 [n, N+1], the generated rows, the ending one included.

    text: set by `Engine.generate` alone; events leave decoding to `Engine.stream` or the caller.
    """

    request_id: int
    blocks: np.ndarray
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    text: str | None = None
    image: ImageOutput | None = None
    hidden: Tensor | None = field(default=None, compare=False, repr=False)
    error: Exception | None = None


@dataclass(frozen=True)
class ChatOutput:
    """A reply. blocks: int64 [n, N+1]; text is decoded from its text blocks."""

    text: str
    blocks: np.ndarray
    usage: Usage
    finish_reason: FinishReason
    timings: Timings


@dataclass(frozen=True)
class ImageOutput:
    """A drawn image. blocks: int64 [n, N+1], the blocks it was drawn from.

    condition_length: valid rows of the condition the DiT saw. seed: of the starting noise.
    """

    image: Image
    blocks: np.ndarray
    condition_length: int
    seed: int
    timings: Timings


@dataclass(frozen=True)
class ImageCodes:
    """Visual codes of one image: int64 [T, N], local to their sub-codebooks, row-major.

    grid: (frames, rows, columns) of patches before 2x2 merging.
    """

    codes: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class BlockOutput:
    """Rows of a prompt and of what was generated after it.

    ids: int64 [S+n, N+1]; image rows of a 1-D prompt are reported as [image_token_id x N, Q].
    hidden: [S+n-1, D], the residual stream after the last layer at each input position, or None.
    """

    ids: Tensor
    hidden: Tensor | None = None


@dataclass(frozen=True)
class TextDelta:
    """More text of a reply."""

    request_id: int
    text: str


@dataclass(frozen=True)
class BlockEvent:
    """One generated block; index counts from 0, ids has N+1 entries."""

    request_id: int
    index: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ImageProgress:
    """`step` of `steps` denoise steps are done."""

    request_id: int
    step: int
    steps: int


@dataclass(frozen=True)
class ImageDone:
    """The image of a drawing request."""

    request_id: int
    output: ImageOutput


@dataclass(frozen=True)
class RequestDone:
    """The last event of a request that ended by itself or by abort."""

    request_id: int
    output: Output


@dataclass(frozen=True)
class RequestFailed:
    """The last event of a request that could not be served; the others go on."""

    request_id: int
    error: Exception


Event: TypeAlias = TextDelta | BlockEvent | ImageProgress | ImageDone | RequestDone | RequestFailed
