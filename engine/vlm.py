"""The vision-language model as the pipeline sees it: what it is asked and what it gives.

A picture is encoded once (vision graph), read once (its *prefix*: the keys and values of the
prompt up to and including it), and everything asked about it continues that prefix. The role is
filled by the model of an engine package (`engine/local.py`) or by one behind a server
(`engine/remote.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.drafting import Draft
from meiqa.engine.manifest import ImageProcessing

Floats = NDArray[np.float32]

ROWS_PER_CALL = 8
"""Rows of one decoder call: more no longer fit the cache of a CPU core."""
ROWS_BY_THEMSELVES = 64
"""Rows of a call to a decoder that works on each row by itself; bounds the memory."""
ANSWER_TOKENS = 40
"""Most tokens from the end of a description to the end of the answer."""
RATING_TOKENS = 16
"""Most tokens of an answer whose opening was forced."""


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """A picture as the decoder sees it: tokens (T, D) on a grid of rows and columns."""

    values: Floats
    grid: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values (L, 2, H, T, d) of a prompt's opening with one picture.

    Attributes:
        key_values: float32.
        tokens: the picture.
        next_position: position of the token that comes next.
        before_second: the same with what stands before a second picture, which is the same in every
            comparison; `key_values` is a part of it then. None where that is read each time.
    """

    key_values: Floats
    tokens: VisualTokens
    next_position: int
    before_second: Floats | None = field(default=None, kw_only=True)

    @property
    def length(self) -> int:
        """Tokens in the prefix."""
        return int(self.key_values.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes held, the visual tokens included."""
        held = self.key_values if self.before_second is None else self.before_second
        return held.nbytes + self.tokens.nbytes


@dataclass(frozen=True)
class Effort:
    """What writing took.

    Attributes:
        calls: of the decoder.
        drafted: tokens that these calls checked beside those that were written.
        accepted: how many of these the model wrote.
    """

    calls: int = 0
    drafted: int = 0
    accepted: int = 0


NO_EFFORT = Effort()


@dataclass(frozen=True, eq=False)
class Description:
    """What the model wrote about a picture.

    Attributes:
        text: the description.
        key: mean of the decoder's last hidden states over the description, (D,); None when
            nothing was written.
        rating: the printed rating, None when none was asked for or it is not a number.
        unreadable: a rating was asked for, and none could be read.
        complete: False when the token limit cut the description.
        tokens: tokens written.
        effort: what it took to write them.
    """

    text: str
    key: Floats | None
    rating: float | None
    unreadable: bool
    complete: bool
    tokens: int
    effort: Effort = NO_EFFORT


class Vlm(Protocol):
    """What the pipeline asks of a model."""

    @property
    def image(self) -> ImageProcessing:
        """How it wants its pixels."""
        ...

    def encode(self, pixels: NDArray[np.uint8]) -> VisualTokens:
        """See a picture: uint8 (H, W, 3), sides multiples of a cell."""
        ...

    def read(self, pictures: Sequence[VisualTokens]) -> list[Prefix]:
        """Read the prompt's opening with each picture."""
        ...

    def describe(
        self,
        prefix: Prefix,
        max_tokens: int,
        drafts: Sequence[Draft] = (),
        enough: Callable[[], bool] = lambda: False,
    ) -> Description:
        """Write a description of at most `max_tokens` and a rating.

        Drafts, the likeliest first, are guesses at it; they make writing faster. `enough` is asked
        before each token of the description whether to end it there, as at the limit.
        """
        ...

    def grade(self, prefix: Prefix) -> NDArray[np.float64]:
        """Probabilities (5,) of the grade words from 1 to 5, without writing."""
        ...

    def prefer_first(
        self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]
    ) -> NDArray[np.float64]:
        """Logit (K,) that the first looks better, for K pairs.

        One prefix against many seconds (K = len(seconds)) reads the prefix once; otherwise firsts
        and seconds are paired one to one.
        """
        ...

    def reflect(self, prefix: Prefix, summary: str, initial: float, score: float) -> Description:
        """Write a corrected description in the light of a fused score."""
        ...
