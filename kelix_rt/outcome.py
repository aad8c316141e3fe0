"""What a request that has ended hands out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kelix_rt.errors import KelixError
from kelix_rt.request import ImageOutput, Output, Timings, Usage
from kelix_rt.sequence import Sequence

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def output_of(sequence: Sequence, image: Image | None, hidden: Tensor | None) -> Output:
    """The output of a request whose finish_reason is set. image: of a drawing that was drawn."""
    assert sequence.finish_reason is not None
    blocks, timings = sequence.blocks, sequence.timings()
    picture = None
    if image is not None:
        assert sequence.render is not None
        assert sequence.render.seed is not None
        seed = sequence.render.seed
        picture = ImageOutput(image, blocks, sequence.condition_length, seed, timings)
    return Output(
        sequence.request_id,
        blocks,
        sequence.finish_reason,
        sequence.usage(),
        timings,
        image=picture,
        hidden=hidden,
    )


def aborted_output(request_id: int, width: int) -> Output:
    """The output of a request that was aborted before its prompt was there."""
    return Output(request_id, np.empty((0, width), dtype=np.int64), "abort", Usage(), Timings())


def not_finite(sequence: Sequence) -> KelixError:
    """The error of a request whose logits were not numbers."""
    return KelixError(
        f"request {sequence.request_id}: the logits of block {sequence.generated} are not finite; "
        "the weights or the prompt drive the model out of range"
    )
