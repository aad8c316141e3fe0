"""Guesses of blocks to come, which the model checks in one step instead of one step each.

Inside an image the model writes a position marker in front of every row of codes: a start id, the
coordinates as text, an end id. Once two of them were seen the next one is nearly certain, as only
the row number grows. It is fed as a draft behind the last block; one forward then gives the model's
own block at every position, and the drafts are kept as far as they are those blocks. Draws depend
on (seed, index of the block, slot) alone, so greedy and sampled requests get the blocks they would
get without drafts. No torch here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from kelix_rt.errors import ConfigError

if TYPE_CHECKING:
    from kelix_rt.config import EngineConfig, KelixConfig
    from kelix_rt.sequence import Sequence

_log = logging.getLogger(__name__)
DRAFT_ROWS = 32  # drafts that all requests of a step may have together


class Drafter(Protocol):
    """Guesses what comes next in a request."""

    def propose(self, sequence: Sequence) -> np.ndarray | None:
        """The next rows int64 [n, N+1], or None. Called only while the request decodes."""

    def expects(self, sequence: Sequence) -> bool:
        """Whether there may be a proposal once one more block is there, whatever it is."""


class MarkerText(Protocol):
    """The text tokenizer, as far as coordinates need it."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


def accepted_drafts(drafts: np.ndarray, blocks: np.ndarray) -> int:
    """How many leading rows of drafts [n, N+1] are what the model drew, blocks [n+1, N+1]."""
    equal = (drafts == blocks[: len(drafts)]).all(axis=1)
    return len(drafts) if equal.all() else int(equal.argmin())


def next_coordinates(before: str, last: str) -> str | None:
    """The text that follows two others when one number in it counts up; None for any others.

    "3,18" and "4,18" are followed by "5,18".
    """
    first, second = (re.split(r"(\d+)", text) for text in (before, last))
    if len(first) != len(second):
        return None
    changed = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    if len(changed) != 1 or changed[0] % 2 == 0:  # numbers stand at the odd places
        return None
    (place,) = changed
    number = int(second[place])
    if number != int(first[place]) + 1:
        return None
    second[place] = str(number + 1).zfill(len(second[place]))
    return "".join(second)


class _OpenImage:
    """What is known of the last image of a request that is not closed yet.

    scanned: rows looked at. markers: coordinates of its last two markers, in ids. row_length: codes
    between those two. codes: those since the last one. coordinates: of a marker that is not
    complete, else None. expected: the ids of the next marker, [] where there is no telling.
    """

    def __init__(self) -> None:
        self.scanned = 0
        self.inside = False
        self.open()

    def open(self) -> None:
        self.markers: list[list[int]] = []
        self.row_length = self.codes = 0
        self.coordinates: list[int] | None = None
        self.expected: list[int] = []


class MarkerDrafter:
    """Proposes the next position marker of an image, or the rest of one that has begun.

    vision: the ids around an image. text: gives the tokenizer, asked for once two markers of an
    image were seen.
    """

    def __init__(
        self, config: KelixConfig, vision: tuple[int, int], text: Callable[[], MarkerText]
    ) -> None:
        self.vision_start, self.vision_end = vision
        self.start, self.end = config.marker_ids
        self.block_end, self.num_slots = config.block_end, config.num_codes + 1
        self.text_vocab = config.qwen_config.vocab_size
        self._text: Callable[[], MarkerText] | None = text
        self._images: WeakKeyDictionary[Sequence, _OpenImage] = WeakKeyDictionary()

    def propose(self, sequence: Sequence) -> np.ndarray | None:
        """Rows int64 [n, N+1] that complete the next marker, or None where none is due."""
        ids = self._due(self._image(sequence))
        if not ids:
            return None
        rows = np.full((len(ids), self.num_slots), self.block_end, dtype=np.int64)
        rows[:, 0] = ids
        return rows

    def expects(self, sequence: Sequence) -> bool:
        """Whether the next block may be the last code of a row, or be part of a marker."""
        image = self._image(sequence)
        if not image.inside or not image.expected:
            return False
        return image.coordinates is not None or image.codes + 1 >= image.row_length

    def _image(self, sequence: Sequence) -> _OpenImage:
        """What is known of the last image of a request by now."""
        image = self._images.get(sequence)
        if image is None:
            image = self._images[sequence] = _OpenImage()
        self._scan(image, sequence.rows[: sequence.length, 0])
        return image

    def _due(self, image: _OpenImage) -> list[int]:
        if not image.inside or not image.expected:
            return []
        if image.coordinates is None:
            return image.expected if image.codes == image.row_length else []
        written = [self.start, *image.coordinates]
        begun = image.expected[: len(written)] == written
        return image.expected[len(written) :] if begun else []

    def _scan(self, image: _OpenImage, first_ids: np.ndarray) -> None:
        """Reads the rows that are new since the last time; a long prompt from its last image on."""
        new = first_ids[image.scanned :]
        image.scanned = len(first_ids)
        if len(new) > 1:
            begins = np.flatnonzero(new == self.vision_start)
            if len(begins):
                new = new[begins[-1] :]
        for id_ in new.tolist():
            if id_ == self.vision_start:
                image.inside = True
                image.open()
            elif image.inside:
                self._read(image, id_)

    def _read(self, image: _OpenImage, id_: int) -> None:
        if id_ == self.vision_end:
            image.inside = False
        elif id_ == self.start:
            image.coordinates = []
        elif id_ == self.end and image.coordinates is not None:
            self._complete(image, image.coordinates)
        elif id_ >= self.text_vocab:
            image.codes += 1
        elif image.coordinates is not None:
            image.coordinates.append(id_)
        else:  # text that belongs to no marker: this image is not laid out as its first rows were
            image.expected = []

    def _complete(self, image: _OpenImage, coordinates: list[int]) -> None:
        image.markers = [*image.markers[-1:], coordinates]
        image.row_length, image.codes = image.codes, 0
        image.coordinates = None
        image.expected = []
        text = self._tokenizer() if len(image.markers) == 2 else None
        if text is not None and max(map(len, image.markers)) < DRAFT_ROWS:
            following = next_coordinates(*(text.decode(ids) for ids in image.markers))
            if following is not None:
                image.expected = [self.start, *text.encode(following), self.end]

    def _tokenizer(self) -> MarkerText | None:
        """The tokenizer; None, and a warning, where it cannot be loaded: ids alone do without."""
        if self._text is None:
            return None
        try:
            return self._text()
        except ConfigError as error:
            _log.warning("position markers are not guessed: %s", error)
            self._text = None
            return None


def marker_drafter(
    config: KelixConfig, options: EngineConfig, text: Callable[[], MarkerText]
) -> MarkerDrafter | None:
    """The drafter of a model, or None where the options or its ids leave nothing to guess."""
    start, end = config.qwen_config.vision_start_token_id, config.qwen_config.vision_end_token_id
    if not options.speculate_markers or options.verify_head or start is None or end is None:
        return None
    return MarkerDrafter(config, (start, end), text)
