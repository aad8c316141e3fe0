"""What an engine has done since it was made, as counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Counts of steps and blocks; `Engine.stats()` gives a copy.

    encode_steps, block_steps, render_steps: steps of each kind. blocks: those generated. pictures:
    drawings decoded, each in a step of its own.
    steps_ahead: block steps that were launched before the blocks of the one in front were read.
    blocks_dropped: blocks drawn in such steps for requests that had ended.
    drafts_accepted, drafts_rejected: blocks that were guessed ahead; an accepted one saved a step.
    image_hits, image_misses: images whose codes were known, and those that had to be encoded.
    graph_replays, graph_misses: block steps and evaluations of the DiT that were launched as one
    graph, and those that were not although there are graphs: prompts, guessed blocks, the release's
    rule of sampling; larger batches of drawings and other sizes than the model's own.
    head_escapes: ids of drawn blocks where the model's most likely one was not admissible; counted
    with EngineConfig.verify_head alone.
    """

    encode_steps: int = 0
    block_steps: int = 0
    render_steps: int = 0
    blocks: int = 0
    pictures: int = 0
    steps_ahead: int = 0
    blocks_dropped: int = 0
    drafts_accepted: int = 0
    drafts_rejected: int = 0
    image_hits: int = 0
    image_misses: int = 0
    graph_replays: int = 0
    graph_misses: int = 0
    head_escapes: int = 0
