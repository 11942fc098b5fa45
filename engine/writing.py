"""Greedy decoding, several tokens a call where remembered descriptions guess right.

A decoder takes several tokens in about the time of one, so a guess that is right saves calls; it
never changes the text. The lookup of the longest suffix is that of prompt lookup decoding (Saxena
2023) with the descriptions of similar photos in the prompt's place; checking is greedy speculative
decoding (arXiv 2211.17192).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.measures import LEAD
from meiqa.engine.model import Floats, GenerationStats, Prefix, StopRule
from meiqa.engine.prompts import Prompts
from meiqa.engine.runtime.decoder import Decoder, Past, Row, require_finite

PAST_STEP = 32
"""Tokens by which a writing's past grows when there is no room left."""
PROPOSED_TOKENS = 48
"""Most tokens of a draft that one call checks: a usual description with its answer."""
FEWEST_PROPOSED = 4
"""Tokens checked by the call after one in which no token was right; each that was adds two."""
LONGEST_SUFFIX = 4
"""Tokens, the beginning of the text counting as one, by which a place in a draft is found."""
LONGEST_GAP = 8
"""Tokens in a row that no draft knows, over which a place in a draft is kept."""
_EDGE = -1
"""Stands for the edge of a text among its tokens."""


class Writer(Protocol):
    """A model that reads a writing on, as `meiqa.engine.local.LocalModel` does."""

    decoder: Decoder
    prompts: Prompts

    def embed(self, ids: NDArray[np.int64] | Sequence[int]) -> Floats: ...


class Proposer:
    """Continues a text as drafts do.

    >>> proposer = Proposer([[5, 6, 7, 8], [5, 9, 7, 1], [5, 9, 7, 1]])
    >>> proposer.continuation([], 8)
    [5, 9, 7, 1]
    >>> proposer.continuation([5, 6], 8)
    [7, 8]
    >>> proposer.continuation([5, 2], 8)  # no draft knows the 2: it may stand for one token
    [7, 1]
    """

    def __init__(self, drafts: Iterable[Sequence[int]] = ()) -> None:
        self._tokens = [_EDGE]
        for draft in drafts:
            self._tokens += [*draft, _EDGE]
        self._places: dict[int, list[int]] = {}
        for place, token in enumerate(self._tokens[:-1], 1):
            self._places.setdefault(token, []).append(place)

    def continuation(self, written: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that may follow those written.

        The drafts vote from wherever the longest suffix of the text is found in them; tokens at
        its end that none of them knows stand for as many others. At every token those that the
        majority leaves behind lose their vote; between equals the draft given first decides.
        """
        places, proposed = self._places_after(written), list[int]()
        while len(proposed) < most:
            votes = Counter(self._tokens[place] for place in places)
            del votes[_EDGE]
            if not votes:
                break
            token = max(votes, key=votes.__getitem__)
            proposed.append(token)
            places = [place + 1 for place in places if self._tokens[place] == token]
        return proposed

    def _places_after(self, written: Sequence[int]) -> list[int]:
        """Places in the drafts that follow the longest suffix of a text."""
        text = [_EDGE, *written][-LONGEST_SUFFIX - LONGEST_GAP :]
        end = len(text)
        while end and text[end - 1] not in self._places:
            end -= 1
        if not end:
            return []
        suffix, gap = text[max(0, end - LONGEST_SUFFIX) : end], len(text) - end
        places = self._places[suffix[-1]]
        for back in range(2, len(suffix) + 1):
            token = suffix[-back]
            closer = [place for place in places if self._tokens[place - back] == token]
            if not closer:
                break
            places = closer
        return [place + gap for place in places if _EDGE not in self._tokens[place : place + gap]]


class Writing:
    """Greedy writing after a prefix, with the past's keys and values kept in place.

    Every call feeds, behind the tokens that are written, those that the drafts propose. Where the
    model's own choices agree with them, it would have written just these, and the calls for them
    are saved; the rest is forgotten by not counting it as part of the past.

    Args:
        told: what was measured in the picture, from `LEAD` on, which is not the model's to guess:
            it writes the lead, is given the rest, and goes on behind it.

    Attributes:
        tokens: the text so far, without the question and what was forced on the model beside it.
    """

    def __init__(
        self,
        model: Writer,
        prefix: Prefix,
        question: NDArray[np.int64],
        capacity: int,
        proposer: Proposer | None = None,
        told: str = "",
    ) -> None:
        self.tokens: list[int] = []
        self._model, self._prefix, self._proposer = model, prefix, proposer or Proposer()
        self._told: list[int] = model.prompts.ids(told.removeprefix(LEAD)).tolist()
        self._given = 0
        room = len(question) + len(self._told) + capacity
        self._past = Past(prefix.opening, room)
        self._hidden: list[Floats] = []
        self._reply: list[int] = []  # forced tokens included
        self._calls = self._drafted = self._accepted = 0
        self._most_proposed = PROPOSED_TOKENS
        self._feed(question.tolist())

    @property
    def stopped(self) -> bool:
        """Whether the model would end its turn next."""
        return self.next_token in self._model.prompts.stops

    @property
    def written(self) -> int:
        """How many tokens the model wrote, which take their time, unlike those that it was told."""
        return len(self.tokens) - self._given

    @property
    def next_token(self) -> int:
        """What the model would write next."""
        return self._choices[self._ahead]

    def stats(self, *, complete: bool) -> GenerationStats:
        """Tell what it took so far."""
        counts = self._calls, self._drafted, self._accepted
        return GenerationStats(self.written, complete, *counts)

    def accept(self) -> None:
        token = self.next_token
        self.tokens.append(token)
        self._reply.append(token)
        if self._ahead < len(self._hidden_ahead):
            hidden = self._hidden_ahead[self._ahead]
            self._past.count(token)
            self._ahead += 1
            self._accepted += 1
        else:
            (hidden,) = self._feed([token])
        self._hidden.append(hidden)

    def force(self, ids: NDArray[np.int64]) -> None:
        """Write given tokens, whatever the model would have written."""
        self._reply += ids.tolist()
        self._feed(ids.tolist())

    def _tell(self) -> None:
        """Write what is told, in one call, once its lead is written."""
        if self._told and self._model.prompts.text(self.tokens[-len(LEAD) :]).endswith(LEAD):
            ids, self._told = self._told, []
            self.tokens += ids
            self._reply += ids
            self._hidden += [*self._feed(ids)]
            self._given = len(ids)

    def until(self, marker: str, limit: int, start: int = 0, *, stop: StopRule = None) -> bool:
        """Write until the next token completes a marker in the text from token `start` on.

        False when the turn ends, or before it `limit` tokens are written or the rule says to
        stop. A marker that has begun by then may still be completed.
        """
        prompts = self._model.prompts
        # No token is shorter than a byte, so a marker lies within as many tokens as it has bytes.
        reach = len(marker.encode()) - 1
        while not self.stopped:
            first = max(start, len(self.tokens) - reach)
            tail = prompts.text([*self.tokens[first:], self.next_token])
            if marker in tail:
                return True
            full = self.written >= limit or (stop is not None and stop())
            begun = any(tail.endswith(marker[:count]) for count in range(1, len(marker)))
            if full and not begun:
                return False
            self.accept()
            self._tell()
        return False

    def mean_hidden(self, count: int) -> Floats | None:
        """Give the mean (D,) of the last hidden states of the first accepted tokens, if any."""
        hidden = self._hidden[:count]
        return np.asarray(np.stack(hidden).mean(axis=0)) if hidden else None

    def _feed(self, ids: list[int]) -> Floats:
        """Read tokens, and check what is proposed behind them; the tokens' hidden states (n, D)."""
        past, again = self._past, len(self._past.unseen)
        ids = past.unseen + ids
        if missing := max(0, len(ids) - past.room):
            past.grow(max(missing, PAST_STEP))
        most = min(self._most_proposed, past.room - len(ids))
        proposed = self._proposer.continuation(self._reply, most)
        start = self._prefix.next_position + past.length
        positions = np.arange(start, start + len(ids) + len(proposed), dtype=np.float32)
        made = self._model.decoder.step(
            self._prefix.opening,
            past.key_values,
            Row(self._model.embed(ids + proposed), np.tile(positions, (3, 1))),
            wanted=1 + len(proposed),
        )
        choices = made.logits.argmax(axis=1).tolist()
        agreed = 0  # tokens in a row that the model chose itself, before it chose another
        while agreed < len(proposed) and choices[agreed] == proposed[agreed]:
            agreed += 1
        require_finite(made.logits[: agreed + 1])

        past.read(made, len(ids), agreed)
        hidden = made.hidden
        self._choices: list[int] = choices[: agreed + 1]
        self._hidden_ahead: Floats = hidden[len(ids) : len(ids) + agreed]
        self._ahead = 0
        self._most_proposed = min(PROPOSED_TOKENS, FEWEST_PROPOSED + 2 * agreed)
        self._calls += 1
        self._drafted += len(proposed)
        return np.asarray(hidden[again : len(ids)])
