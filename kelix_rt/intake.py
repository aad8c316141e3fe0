"""Checks a prompt and turns it into the rows of ids that the language model reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kelix_rt.config import KelixConfig
from kelix_rt.errors import ConfigError, InputError
from kelix_rt.request import Prompt, SamplingParams
from kelix_rt.sequence import EndRules
from kelix_rt.stages.encode import block_count, check_patches

SPLITMIX_STEP = 0x9E3779B97F4A7C15
UINT64 = (1 << 64) - 1
DEFAULT_MAX_BLOCKS = 256
NO_TEMPLATE_OPTIONS = frozenset(("self", "messages", "conversation", "tokenize"))
Expand = Callable[[Tensor, Tensor | None], Tensor]


def derive_seed(base: int, counter: int) -> int:
    """A seed in [0, 2^63) that looks unrelated for every (base, counter): splitmix64."""
    value = (base + (counter + 1) * SPLITMIX_STEP) & UINT64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & UINT64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & UINT64
    return (value ^ (value >> 31)) >> 1


def prompt_rows(
    prompt: Prompt, config: KelixConfig, expand: Expand
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [S, N+1] of a prompt, and which of them stand for images, bool [S].

    With pixel_values, image rows hold some visual code until the images are encoded. Raises
    InputError for an empty prompt, wrong shapes, ids the model does not have, and a number of
    placeholders other than that of the image blocks.
    """
    ids = integer_array("prompt ids", prompt.ids)
    if ids.size == 0:
        raise InputError("prompt ids must hold at least one id, got none")
    placed = np.zeros(len(ids), dtype=bool)
    marker, text_vocab = config.qwen_config.image_token_id, config.qwen_config.vocab_size
    if marker is not None and (ids == marker).any():
        first = ids if ids.ndim == 1 else ids.reshape(len(ids), -1)[:, 0]
        placed = first == marker
        if ids.ndim == 2 and (first >= text_vocab).any():
            raise InputError(
                "prompt ids [S, N+1] must not mix image placeholders with rows of visual codes; "
                "pass ids [S] and image_ids instead"
            )
    images = _image_ids(prompt, int(placed.sum()), config)
    rows = expand(torch.from_numpy(ids), None if images is None else torch.from_numpy(images))
    return rows.numpy(), placed


def checked_options(options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What a request hands to the chat template. InputError for names that are not its to set."""
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise InputError(f"template_options must be a mapping of names, got {options!r}")
    if own := sorted(NO_TEMPLATE_OPTIONS & set(options)):
        raise InputError(f"template_options: {own} are set by the engine itself")
    return options


def copied(messages: Any) -> Any:
    """Messages that do not change with the caller's lists and mappings."""
    if isinstance(messages, Mapping):
        return {name: copied(value) for name, value in messages.items()}
    if isinstance(messages, list | tuple):
        return [copied(value) for value in messages]
    return messages


def patch_tensors(prompt: Prompt) -> Prompt:
    """The prompt with copies of its patches and grids, as tensors: they are read steps later, when
    the caller may have filled the buffers anew. InputError for anything but tensors and arrays."""
    given = {}
    for name in ("pixel_values", "image_grid_thw"):
        value: Any = getattr(prompt, name)
        if isinstance(value, np.ndarray):
            given[name] = torch.tensor(value)
        elif isinstance(value, Tensor):
            given[name] = value.detach().clone()
        elif value is not None:
            raise InputError(f"{name} must be a tensor or an array, got {type(value).__name__}")
    grid = given.get("image_grid_thw")
    if grid is not None and not grid.is_floating_point():
        given["image_grid_thw"] = grid.long()  # products of 8 bits would overflow
    return replace(prompt, **given) if given else prompt


def _image_ids(prompt: Prompt, placeholders: int, config: KelixConfig) -> np.ndarray | None:
    """The ids for the placeholders; any visual ids where patches are still to be encoded."""
    text_vocab = config.qwen_config.vocab_size
    if prompt.image_ids is not None:
        if prompt.pixel_values is not None:
            raise InputError("prompt: give either image_ids or pixel_values, not both")
        values = integer_array("image_ids", prompt.image_ids)
        first = values[:, :1] if values.ndim == 2 else values  # a row is visual by its first id
        if first.size and first.min() < text_vocab:
            raise InputError(
                f"image_ids must begin with ids of visual codes (at least vocab_size {text_vocab}; "
                f"code c of sub-codebook j is {text_vocab} + j*K + c), got {first.min()}"
            )
        return values
    if (prompt.pixel_values is None) != (prompt.image_grid_thw is None):
        raise InputError("prompt: pixel_values and image_grid_thw must be given together")
    if prompt.pixel_values is None or prompt.image_grid_thw is None:
        return None
    vision = config.tokenizer_config.vision_config
    check_patches(prompt.pixel_values, prompt.image_grid_thw, vision)
    blocks = block_count(prompt.image_grid_thw)
    if blocks != placeholders:
        raise InputError(
            f"prompt: {placeholders} image placeholders, but the images have {blocks} blocks; "
            "every block needs one placeholder"
        )
    return np.full((blocks, config.num_codes), text_vocab, dtype=np.int64)


def drawing_prompt(prompt: Prompt, config: KelixConfig) -> Prompt:
    """The prompt with vision_start as its last id, so that the next block is a visual one."""
    start = config.qwen_config.vision_start_token_id
    if start is None or config.qwen_config.vision_end_token_id is None:
        raise ConfigError("drawing: the model's config names no vision_start and vision_end ids")
    ids = integer_array("prompt ids", prompt.ids)
    if ids.ndim != 1 or ids.size == 0:
        raise InputError(
            f"drawing: prompt ids must have shape [S] with S > 0, got {list(ids.shape)}"
        )
    return prompt if ids[-1] == start else replace(prompt, ids=np.append(ids, start))


def cut_drawing(prompt: Prompt, cut: Callable[[list[int]], list[int]]) -> Prompt:
    """The prompt with its ids cut by `ChatProcessor.image_prompt`.

    Raises InputError where images would be cut off with them.
    """
    given = integer_array("prompt ids", prompt.ids)
    if given.ndim != 1 or not given.size:
        return prompt  # `drawing_prompt` refuses it
    ids = given.tolist()
    kept = cut(ids)
    if len(kept) < len(ids) and (prompt.pixel_values is not None or prompt.image_ids is not None):
        raise InputError(
            "drawing: a prompt with images must end at its first assistant header, where the "
            f"release cuts it, got {len(ids)} ids of which {len(kept) - 1} would be kept"
        )
    return replace(prompt, ids=kept)


def end_rules(
    prompt_length: int,
    sampling: SamplingParams,
    config: KelixConfig,
    *,
    draw: bool,
    max_positions: int,
    capacity: int,
    max_condition_length: int,
) -> EndRules:
    """When a request ends; InputError where the model has too few positions for it.

    capacity: positions the KV cache has room for; it only bounds a default of max_blocks.
    """
    unfed = 0 if draw else 1  # the last block is fed to the model only to close an image
    room = max_positions - prompt_length + unfed
    if prompt_length > max_positions or room < 1:
        raise InputError(
            f"prompt: {prompt_length} blocks leave no room for an answer, max_model_len is "
            f"{max_positions}"
        )
    if sampling.max_blocks is not None and sampling.max_blocks > room:
        raise InputError(
            f"prompt: {prompt_length} blocks and max_blocks={sampling.max_blocks} exceed "
            f"max_model_len {max_positions}; max_blocks can be {room} at most"
        )
    default = 2 * max_condition_length + 11 if draw else DEFAULT_MAX_BLOCKS
    in_memory = max(capacity - prompt_length + unfed, 1)
    qwen = config.qwen_config
    stop_ids = set(sampling.stop_ids)
    if qwen.eos_token_id is not None and not sampling.ignore_eos:
        stop_ids.add(qwen.eos_token_id)
    return EndRules(
        frozenset(stop_ids),
        sampling.max_blocks or min(default, room, in_memory),
        qwen.vision_end_token_id if draw else None,
    )


def reported_rows(rows: np.ndarray, placed: np.ndarray, config: KelixConfig) -> np.ndarray:
    """Rows as they are reported: image rows of the prompt as [image_token_id x N, Q]."""
    report = rows.copy()
    marker = config.qwen_config.image_token_id
    if marker is not None:
        report[: len(placed)][placed, : config.num_codes] = marker
    return report


def integer_array(name: str, value: Any) -> np.ndarray:
    """int64 array of a list, array or tensor of integers; InputError for anything else."""
    if isinstance(value, Tensor):
        if value.is_floating_point():  # numpy has no bfloat16 to say so itself
            raise InputError(f"{name} must be integers, got dtype {value.dtype}")
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise InputError(f"{name} must be integers in a regular shape, got {value!r}") from None
    if array.ndim == 0:
        raise InputError(f"{name} must be a sequence of integers, got {value!r}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} must be integers, got dtype {array.dtype}")
    return array.astype(np.int64)
