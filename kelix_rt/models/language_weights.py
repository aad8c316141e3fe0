"""Where each tensor of the language model is stored, and which of the two stored heads to use."""

from __future__ import annotations

import logging

import torch

from kelix_rt.config import KelixConfig
from kelix_rt.models import backbone, block_decoder
from kelix_rt.models.block_decoder import block_decoder_sizes
from kelix_rt.weights import Checkpoint, Source

_HEAD = "model.model.output.weight"
_OTHER_HEAD = "lm_head.weight"
_COMPARED_ROWS = 16384
_log = logging.getLogger(__name__)


def weight_map(config: KelixConfig, head: str = _HEAD) -> dict[str, Source]:
    """All tensors of `KelixLM` but the visual tokenizer's; `head` names the stored head."""
    parts = {
        "backbone": backbone.weight_map(config.qwen_config),
        "block_decoder": block_decoder.weight_map(block_decoder_sizes(config)),
    }
    sources = {
        "embeddings": Source(("model.model.tok_embeddings.embed_tokens.weight",)),
        "head": Source((head,)),
    }
    for part, own in parts.items():
        sources |= {f"{part}.{name}": source for name, source in own.items()}
    return sources


def choose_head(checkpoint: Checkpoint) -> str:
    """Which of the two stored heads to use.

    The release generates with model.model.output; lm_head is only used when that is missing. A
    warning says so when both exist and differ, as training updates lm_head alone.
    """
    if _HEAD not in checkpoint:
        return _OTHER_HEAD if _OTHER_HEAD in checkpoint else _HEAD
    if _OTHER_HEAD in checkpoint and not _equal(checkpoint, _HEAD, _OTHER_HEAD):
        _log.warning(
            "%s: %s and %s differ; following %s, as the release does",
            checkpoint.path, _HEAD, _OTHER_HEAD, _HEAD,
        )  # fmt: skip
    return _HEAD


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    if checkpoint.shape(first) != checkpoint.shape(second):
        return False
    starts = range(0, checkpoint.shape(first)[0], _COMPARED_ROWS)
    chunks = (slice(start, start + _COMPARED_ROWS) for start in starts)
    return all(torch.equal(checkpoint.read(first, c), checkpoint.read(second, c)) for c in chunks)
