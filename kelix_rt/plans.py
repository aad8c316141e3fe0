"""What a step does, as the scheduler decides and the runner carries out. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kelix_rt.sequence import Sequence


@dataclass(frozen=True)
class Span:
    """Rows start..start+count of a sequence in a step.

    wants_block: its last known row yields a block. drafts: how many of the rows, the last ones, are
    guesses; each of them yields the block behind it too. unread: its one row is what the step in
    front draws, which the host has not read yet.
    """

    sequence: Sequence
    start: int
    count: int
    wants_block: bool
    drafts: int = 0
    unread: bool = False

    @property
    def end(self) -> int:
        """One past the last row."""
        return self.start + self.count

    @property
    def num_blocks(self) -> int:
        """Blocks the rows yield."""
        return 1 + self.drafts if self.wants_block else 0


@dataclass(frozen=True)
class EncodePlan:
    """Turn the next image of each of these requests into codes."""

    sequences: tuple[Sequence, ...]


@dataclass(frozen=True)
class BlockPlan:
    """Run the language model over these rows."""

    spans: tuple[Span, ...]

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The sequences of the spans, in order."""
        return tuple(span.sequence for span in self.spans)


@dataclass(frozen=True)
class RenderPlan:
    """Take one denoise step for each of these requests."""

    sequences: tuple[Sequence, ...]


@dataclass(frozen=True)
class PicturePlan:
    """Turn the latents of these drawings, whose denoise steps are taken, into pictures."""

    sequences: tuple[Sequence, ...]


StepPlan: TypeAlias = EncodePlan | BlockPlan | RenderPlan | PicturePlan
