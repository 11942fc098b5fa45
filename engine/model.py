"""What scoring asks of a vision-language model, and what it gives.

A picture is encoded once and prefilled once (its *prefix*: the keys and values of the prompt up to
and including it); everything asked about it continues that prefix. The role is filled by the model
of an engine package (`engine/local.py`) or by one behind a server (`engine/remote.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.calibration import Calibration, ScoreHead
from meiqa.engine.estimates import softmax
from meiqa.engine.manifest import ImageProcessing
from meiqa.engine.prompts import PromptFamily
from meiqa.engine.runtime.decoder import KeyValues

Floats = NDArray[np.float32]

ANSWER_TOKENS = 40
"""Most tokens from the end of a description to the end of the answer."""
RATING_TOKENS = 16
"""Most tokens of an answer whose opening was forced."""
StopRule = Callable[[], bool] | None
"""Tells work that can be ended early whether it should end now; None lets it go on."""


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """A picture as the decoder sees it: tokens (T, D) on a grid of rows and columns.

    `measured` is the sentence that tells what was measured in its pixels; empty where the model's
    descriptions have none, or of a picture whose pixels are no longer there.
    """

    values: Floats
    grid: tuple[int, int]
    measured: str = ""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt's opening with one picture, read.

    Attributes:
        opening: keys and values of the opening; key_values: the same, and maybe of what stands
            before a second picture behind it.
        next_position: position of the token that follows the opening.
    """

    tokens: VisualTokens
    opening: KeyValues
    key_values: KeyValues
    next_position: int


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of a picture, and how the reply may go on.

    Attributes:
        text: from the end of the last picture to where the reply goes on, turns included.
        options: how it may go on, each one token or several.
        second: the picture that is shown behind the first.
    """

    text: str
    options: tuple[str, ...]
    second: VisualTokens | None = None


@dataclass(frozen=True)
class Draft:
    """A guess at what will be written about a photo: description, and rating if there is one."""

    summary: str
    score: float | None = None


@dataclass(frozen=True)
class GenerationStats:
    """What writing took: tokens written, not `complete` where the limit cut the description.

    The calls of the decoder checked `drafted` tokens as well, `accepted` of them right.
    """

    tokens: int = 0
    complete: bool = True
    calls: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, eq=False)
class Description:
    """What the model wrote about a picture.

    Attributes:
        key: retrieval key (D,) of the text; None when nothing was written.
        rating: the printed rating, None when none was asked for or it is not a number.
        unreadable: a rating was asked for, and none could be read.
    """

    text: str
    key: Floats | None
    rating: float | None = None
    unreadable: bool = False
    stats: GenerationStats = GenerationStats()


class Model(Protocol):
    """A vision-language model that judges pictures.

    Grade words, verdicts of comparisons and anybody's own options are asked for in one way:
    `log_probabilities`.

    Attributes:
        digest: identity of all that makes tokens and keys; what a memory is tied to.
        family: the texts that it is asked with.
        image: how it wants its pixels.
        calibration: how its answers go with people's scores; head: what makes the first score.
        summary_tokens: limit of a description.
        widths: of the keys and of the visual tokens that it makes.
    """

    digest: str
    family: PromptFamily
    image: ImageProcessing
    calibration: Calibration
    head: ScoreHead
    summary_tokens: int
    widths: tuple[int, int]

    @property
    def largest_prefix_bytes(self) -> int:
        """Bytes of the prefix of a picture of the largest size; 0 where nothing is kept of it."""
        return 0

    def encode(self, pixels: NDArray[np.uint8]) -> VisualTokens:
        """See a picture: uint8 (H, W, 3), sides multiples of a cell."""
        ...

    def grid_of(self, pixels: NDArray[np.uint8]) -> tuple[int, int]:
        """Give rows and columns of the visual tokens that `encode` makes of a picture."""
        ...

    def prefill(self, pictures: Sequence[VisualTokens]) -> list[Prefix]:
        """Read the prompt's opening with each picture."""
        ...

    def describe(
        self, prefix: Prefix, max_tokens: int, drafts: Sequence[Draft] = (), stop: StopRule = None
    ) -> Description:
        """Write a description of at most `max_tokens` and a rating.

        Drafts, the likeliest first, are guesses at it; they make writing faster. `stop` is asked
        before each token of the description whether to end it there, as at the limit.
        """
        ...

    def log_probabilities(
        self, firsts: Sequence[Prefix], questions: Sequence[Asked]
    ) -> list[NDArray[np.float64]]:
        """Give the log-probability of each option of Q questions: that the reply goes on so.

        One prefix with many questions (Q = len(questions)) is read once; otherwise prefixes and
        questions are paired one to one.
        """
        ...

    def grade(self, prefix: Prefix) -> NDArray[np.float64]:
        """Give the probabilities (5,) of the grade words from 1 to 5, without writing."""
        question = Asked(self.family.levels, self.family.level_words)
        return softmax(self.log_probabilities([prefix], [question])[0])

    def prefer_first(
        self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]
    ) -> NDArray[np.float64]:
        """Give the logit (K,) that the first looks better, for K pairs.

        One prefix against many seconds (K = len(seconds)) reads the prefix once; otherwise firsts
        and seconds are paired one to one.
        """
        text, verdicts = self.family.compare, self.family.verdicts
        questions = [Asked(text, verdicts, second) for second in seconds]
        found = self.log_probabilities(firsts, questions)
        return np.array([first - second for first, second in found], np.float64)

    def reflect(self, prefix: Prefix, summary: str, initial: float, score: float) -> Description:
        """Write a corrected description in the light of a fused score."""
        ...

    def unwritten_key(self, tokens: VisualTokens) -> Floats:
        """Guess the retrieval key (D,) of a picture about which nothing is written."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...
