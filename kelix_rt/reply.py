"""The text of a reply, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kelix_rt.config import QwenConfig
    from kelix_rt.processing import TextTokenizer


class ReplyText:
    """Decodes the first ids of a reply's blocks; what stands inside an image is no text.

    Between vision_start and vision_end a model writes codes and, in front of each row of them,
    coordinates in ordinary digits.
    """

    def __init__(self, text: TextTokenizer, config: QwenConfig) -> None:
        self._decoder = text.stream()
        self._start = config.vision_start_token_id
        self._end = config.vision_end_token_id
        self._in_image = False

    def push(self, first_id: int) -> str:
        """New text after one more block; may be empty."""
        if first_id in (self._start, self._end):
            self._in_image = first_id == self._start
        return "" if self._in_image else self._decoder.push(first_id)

    def finish(self) -> str:
        """What was held back because a character was incomplete."""
        return self._decoder.finish()

    def decode(self, first_ids: Iterable[int]) -> str:
        """The text of all blocks at once."""
        return "".join(map(self.push, first_ids)) + self.finish()
