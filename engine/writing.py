"""What a local model writes: greedily, several tokens a call where drafts guess right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.drafting import Proposer
from meiqa.engine.manifest import DecoderShape
from meiqa.engine.prompts import Prompts
from meiqa.engine.runtime.base import require_finite
from meiqa.engine.vlm import Description, Effort, Floats, Prefix

PAST_STEP = 32
"""Tokens by which a writing's past grows when there is no room left."""
PROPOSED_TOKENS = 48
"""Most tokens of a draft that one call checks: a usual description with its answer."""
FEWEST_PROPOSED = 4
"""Tokens checked by the call after one in which no token was right; each that was adds two."""


class Continued(Protocol):
    """A model that reads a writing on, as `meiqa.engine.local.LocalVlm` does."""

    @property
    def prompts(self) -> Prompts:
        """Its questions and tokens."""
        ...

    @property
    def shape(self) -> DecoderShape:
        """Of its decoder."""
        ...

    def continue_writing(
        self, prefix: Prefix, past: Floats, past_length: int, ids: Sequence[int], wanted: int = 1
    ) -> dict[str, Floats]:
        """Feed tokens after a prefix and a past (L, 2, 1, H, 1, capacity, d), of which
        `past_length` tokens are real; logits of the last `wanted` tokens, finite or not."""
        ...


class Writing:
    """Greedy writing after a prefix, with the past's keys and values kept in place.

    Every call feeds, behind the tokens that are written, those that the drafts propose. Where the
    model's own choices agree with them, it would have written just these, and the calls for them
    are saved; the rest is forgotten by not counting it as part of the past.

    Attributes:
        tokens: what was accepted so far, neither the question nor forced tokens included.
    """

    def __init__(
        self,
        vlm: Continued,
        prefix: Prefix,
        question: NDArray[np.int64],
        capacity: int,
        proposer: Proposer | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self._vlm, self._prefix, self._proposer = vlm, prefix, proposer or Proposer()
        self._past = self._empty_past(len(question) + capacity)
        self._length = 0
        self._hidden: list[Floats] = []
        self._reply: list[int] = []  # forced tokens included
        self._calls = self._drafted = self._accepted = 0
        self._most_proposed = PROPOSED_TOKENS
        self._feed(question.tolist())

    @property
    def next_token(self) -> int:
        """What the model would write next."""
        return self._choices[self._ahead]

    @property
    def effort(self) -> Effort:
        """What it took so far."""
        return Effort(self._calls, self._drafted, self._accepted)

    def accept(self) -> None:
        """Write the next token."""
        token = self.next_token
        self.tokens.append(token)
        self._reply.append(token)
        if self._ahead < len(self._hidden_ahead):
            hidden = self._hidden_ahead[self._ahead]
            self._length += 1
            self._ahead += 1
            self._accepted += 1
        else:
            hidden = self._feed([token])
        self._hidden.append(hidden)

    def force(self, ids: NDArray[np.int64]) -> None:
        """Write given tokens, whatever the model would have written."""
        self._reply += ids.tolist()
        self._feed(ids.tolist())

    def until(
        self,
        marker: str,
        limit: int,
        start: int = 0,
        *,
        enough: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Write until the next token completes a marker in the text from token `start` on.

        Returns:
            Whether it does; False when the turn ends, or before it `limit` tokens are accepted
            or it is `enough`. A marker that has begun by then may still be completed.
        """
        prompts = self._vlm.prompts
        # No token is shorter than a byte, so a marker lies within as many tokens as it has bytes.
        reach = len(marker.encode()) - 1
        while self.next_token != prompts.stop:
            first = max(start, len(self.tokens) - reach)
            tail = prompts.text([*self.tokens[first:], self.next_token])
            if marker in tail:
                return True
            full = len(self.tokens) >= limit or enough()
            if full and not _ends_in_beginning(tail, marker):
                return False
            self.accept()
        return False

    def mean_hidden(self, count: int | None = None) -> Floats | None:
        """Mean of the last hidden states over the first `count` accepted tokens (all by default).

        Returns:
            (D,), None when there are no such tokens.
        """
        hidden = self._hidden[:count]
        if not hidden:
            return None
        mean: Floats = np.stack(hidden).mean(axis=0)
        return mean

    def _feed(self, ids: list[int]) -> Floats:
        """Read tokens, and check what is proposed behind them; the last one's hidden state (D,)."""
        self._make_room(len(ids))
        fed = len(ids)
        room = self._past.shape[5] - self._length - fed
        proposed = self._proposer.continuation(self._reply, min(self._most_proposed, room))
        made = self._vlm.continue_writing(
            self._prefix, self._past, self._length, ids + proposed, wanted=1 + len(proposed)
        )
        choices = made["logits"][0, 0].argmax(axis=1).tolist()
        agreed = _agreeing(choices, proposed)
        require_finite(made["logits"][0, 0, : agreed + 1])

        kept = self._length + fed + agreed
        self._past[:, :, :, :, :, self._length : kept] = made["key_values"][..., : fed + agreed, :]
        self._length += fed
        hidden = made["hidden"][0, 0]
        self._choices: list[int] = choices[: agreed + 1]
        self._hidden_ahead: Floats = hidden[fed : fed + agreed]
        self._ahead = 0
        self._most_proposed = min(PROPOSED_TOKENS, FEWEST_PROPOSED + 2 * agreed)
        self._calls += 1
        self._drafted += len(proposed)
        last: Floats = hidden[fed - 1]
        return last

    def _make_room(self, count: int) -> None:
        """Let the past hold so many tokens more."""
        if missing := max(0, self._length + count - self._past.shape[5]):
            more = self._empty_past(max(missing, PAST_STEP))
            self._past = np.concatenate([self._past, more], axis=5)

    def _empty_past(self, room: int) -> Floats:
        s = self._vlm.shape
        return np.zeros((s.layers, 2, 1, s.kv_heads, 1, room, s.head_dim), np.float32)


@dataclass(frozen=True)
class Written:
    """The description in a writing.

    Attributes:
        text: without what ends it.
        tokens: how many of the accepted tokens are wholly part of it.
        marked: the next token completes the end marker.
        complete: the description ended before the token limit.
    """

    text: str
    tokens: int
    marked: bool
    complete: bool

    def description(
        self, writing: Writing, rating: float | None = None, *, unreadable: bool = False
    ) -> Description:
        """The description with its key and what was written after it."""
        key = writing.mean_hidden(self.tokens)
        return Description(
            self.text,
            key,
            rating,
            unreadable,
            self.complete,
            len(writing.tokens),
            writing.effort,
        )


def _agreeing(choices: Sequence[int], proposed: Sequence[int]) -> int:
    """How many proposed tokens in a row the model chose itself, before it chose another."""
    pairs = zip(choices, proposed, strict=False)  # the last choice follows all that was proposed
    return next(
        (count for count, (chosen, token) in enumerate(pairs) if chosen != token), len(proposed)
    )


def _ends_in_beginning(text: str, marker: str) -> bool:
    """Whether a text ends in some, but not all, of a marker's characters."""
    return any(text.endswith(marker[:count]) for count in range(1, len(marker)))
