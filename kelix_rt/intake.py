"""Checks a prompt and turns it into the rows of ids that the language model reads. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kelix_rt.errors import InputError
from kelix_rt.request import Prompt

if TYPE_CHECKING:
    from kelix_rt.config import KelixConfig

SPLITMIX_STEP = 0x9E3779B97F4A7C15
UINT64 = (1 << 64) - 1


@dataclass(frozen=True)
class IdSpace:
    """The ids of a model: text below `text_vocab`, visual codes from there up to `total`."""

    text_vocab: int
    total: int
    num_codes: int
    block_end: int
    image: int | None
    vision_start: int | None
    vision_end: int | None
    eos: int | None

    @classmethod
    def of(cls, config: KelixConfig) -> IdSpace:
        """The ids a config names."""
        qwen = config.qwen_config
        return cls(
            text_vocab=qwen.vocab_size,
            total=qwen.vocab_size + qwen.codebook_size,
            num_codes=qwen.n_q_tokens,
            block_end=config.block_end,
            image=qwen.image_token_id,
            vision_start=qwen.vision_start_token_id,
            vision_end=qwen.vision_end_token_id,
            eos=qwen.eos_token_id,
        )


def derive_seed(base: int, counter: int) -> int:
    """A seed in [0, 2^63) that looks unrelated for every (base, counter): splitmix64."""
    value = (base + (counter + 1) * SPLITMIX_STEP) & UINT64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & UINT64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & UINT64
    return (value ^ (value >> 31)) >> 1


def prompt_rows(prompt: Prompt, space: IdSpace) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [S, N+1] of a prompt, and which of them are placeholders of images, bool [S].

    Placeholder rows hold image_token_id until `place_images` fills them. Raises InputError for an
    empty prompt, a wrong shape or ids the model does not have.
    """
    ids = integer_array("prompt ids", prompt.ids)
    if ids.size == 0:
        raise InputError("prompt ids must hold at least one id, got none")
    width = space.num_codes + 1
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and ids.shape[1] != width):
        raise InputError(
            f"prompt ids must have shape [S] or [S, N+1={width}], got {list(ids.shape)}"
        )
    _check_range("prompt ids", ids, 0, space.total)
    placed = np.zeros(ids.shape, dtype=bool) if space.image is None else ids == space.image
    if ids.ndim == 2:
        if not placed.any():
            return np.ascontiguousarray(ids), np.zeros(len(ids), dtype=bool)
        if (ids[:, 0] >= space.text_vocab).any():
            raise InputError(
                "prompt ids [S, N+1] must not mix image placeholders with rows of visual codes; "
                "pass [S] ids and image_ids instead"
            )
        ids, placed = ids[:, 0], placed[:, 0]
    rows = np.full((len(ids), width), space.block_end, dtype=np.int64)
    rows[:, 0] = ids
    rows[placed, : space.num_codes] = space.image if space.image is not None else 0
    return rows, placed


def place_images(
    rows: np.ndarray, placed: np.ndarray, image_ids: Any, space: IdSpace
) -> np.ndarray:
    """A copy of `rows` with image_ids [n, N] in the placeholder rows.

    Raises InputError unless n equals the number of placeholders and all are ids of visual codes.
    """
    values = integer_array("image_ids", image_ids)
    if values.ndim != 2 or values.shape[1] != space.num_codes:
        raise InputError(
            f"image_ids must have shape [n, N={space.num_codes}], got {list(values.shape)}"
        )
    check_count(int(placed.sum()), len(values))
    _check_range("image_ids", values, space.text_vocab, space.total)
    filled = rows.copy()
    filled[placed, : space.num_codes] = values
    return filled


def check_count(placeholders: int, blocks: int) -> None:
    """Raises InputError unless every image placeholder has one visual block."""
    if placeholders != blocks:
        raise InputError(
            f"prompt: image placeholders and image blocks must be equally many, got {placeholders} "
            f"placeholders and {blocks} blocks"
        )


def reported_rows(rows: np.ndarray, placed: np.ndarray | None, space: IdSpace) -> np.ndarray:
    """Rows as they are reported: image rows of the prompt as [image_token_id x N, Q]."""
    report = rows.copy()
    if placed is not None and space.image is not None:
        report[: len(placed)][placed, : space.num_codes] = space.image
    return report


def integer_array(name: str, value: Any) -> np.ndarray:
    """int64 array of a list, array or tensor of integers; InputError for anything else."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(1, dtype=object)  # a ragged list
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} must be integers in a regular shape, got {_describe(array)}")
    return array.astype(np.int64)


def _describe(array: np.ndarray) -> str:
    return "other objects or a ragged list" if array.dtype == object else f"dtype {array.dtype}"


def _check_range(name: str, values: np.ndarray, low: int, high: int) -> None:
    if values.size and (values.min() < low or values.max() >= high):
        bad = values[(values < low) | (values >= high)].flat[0]
        raise InputError(f"{name} must be in [{low}, {high}), got {bad}")
