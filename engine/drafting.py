"""What a model may write next, guessed from what was written about similar photos.

A decoder takes several tokens in about the time of one, so a guess that it can check in one call
saves as many calls as there are tokens in it that are right. Guesses change how fast a text is
written, never the text. The lookup of the longest suffix is that of prompt lookup decoding
(Saxena 2023) with the drafts in the prompt's place; checking is greedy speculative decoding
(arXiv 2211.17192).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONGEST_SUFFIX = 4
"""Tokens, the beginning of the text counting as one, by which a place in a draft is found."""
LONGEST_GAP = 8
"""Tokens in a row that no draft knows, over which a place in a draft is kept."""
_EDGE = -1
"""Stands for the edge of a text among its tokens."""


@dataclass(frozen=True)
class Draft:
    """A guess at what will be written about a photo.

    Attributes:
        summary: the description.
        score: guess at the rating behind it, None for none.
    """

    summary: str
    score: float | None = None


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
