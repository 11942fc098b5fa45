"""The model of an engine package in the role of `meiqa.engine.vlm.Vlm`, run by graph sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.drafting import Draft, Proposer
from meiqa.engine.manifest import ImageProcessing
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import layout
from meiqa.engine.rating import printed_rating
from meiqa.engine.runtime.base import Array, GraphSession, RowSession, require_finite
from meiqa.engine.vlm import (
    ANSWER_TOKENS,
    RATING_TOKENS,
    ROWS_BY_THEMSELVES,
    ROWS_PER_CALL,
    Description,
    Floats,
    Prefix,
    VisualTokens,
)
from meiqa.engine.writing import Writing, Written
from meiqa.kernels.patches import pixels_to_patches

_Item = TypeVar("_Item")


@dataclass(frozen=True, eq=False)
class Row:
    """The tokens with which one row of a call continues its prefix.

    Attributes:
        embeds: (S, D).
        positions: (3, S).
    """

    embeds: Floats
    positions: Floats


class LocalVlm:
    """The model of an engine package, run by two graph sessions."""

    def __init__(self, package: EnginePackage, vision: GraphSession, decoder: GraphSession) -> None:
        self.package = package
        self.prompts = package.prompts
        self.shape = package.manifest.decoder
        self._vision = vision
        self._decoder = decoder
        self._by_rows = decoder if isinstance(decoder, RowSession) else None
        # Without its subclass, whose bookkeeping takes longer than a token's embedding.
        self._embedding = np.asarray(package.embedding)

    @property
    def image(self) -> ImageProcessing:
        """How the vision graph wants its pixels."""
        return self.package.manifest.image

    def encode(self, pixels: NDArray[np.uint8]) -> VisualTokens:
        """See a picture; see `Vlm.encode`."""
        image = self.image
        patches = pixels_to_patches(
            pixels, image.patch_size, image.merge_size, image.mean, image.std
        )
        grid = pixels.shape[0] // image.cell_pixels, pixels.shape[1] // image.cell_pixels
        cells = patches.reshape(*grid, -1)
        tokens = self._vision.run({"cells": cells})["tokens"]
        require_finite(tokens)
        return VisualTokens(tokens, grid)

    def read(self, pictures: Sequence[VisualTokens]) -> list[Prefix]:
        """Read pictures, a few in each call; see `Vlm.read`."""
        most = ROWS_PER_CALL if self._by_rows is None else ROWS_BY_THEMSELVES
        return [prefix for part in _chunks(pictures, most) for prefix in self._read(part)]

    def _read(self, pictures: Sequence[VisualTokens]) -> Iterator[Prefix]:
        p = self.prompts
        rows, after = [], []
        for picture in pictures:
            positions, following = layout([len(p.opening), picture.grid, len(p.closing)])
            embeds = [self._embed(p.opening), picture.values, self._embed(p.closing)]
            rows.append(Row(np.concatenate(embeds), positions))
            after.append(following)
        if self._by_rows is not None:
            yield from self._read_by_rows(self._by_rows, rows, pictures, after)
            return
        made = self._call(rows, self._no_prefixes(len(rows)), one_each=True)["key_values"]
        for index, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
            # Copied, so that a cached prefix does not keep its neighbours of the call alive.
            key_values = made[:, :, index, :, 0, : len(row.embeds)].copy()
            key_values.setflags(write=False)  # so that a device need not be sent it twice
            yield Prefix(key_values, picture, after[index])

    def _read_by_rows(
        self,
        decoder: RowSession,
        rows: Sequence[Row],
        pictures: Sequence[VisualTokens],
        after: Sequence[int],
    ) -> Iterator[Prefix]:
        """Prefixes, read on to where the second picture of a comparison begins."""
        opening, _ = self._around_second
        longer = [
            Row(
                np.concatenate([row.embeds, opening]),
                np.concatenate([row.positions, layout([len(opening)], start)[0]], axis=1),
            )
            for row, start in zip(rows, after, strict=True)
        ]
        kept = decoder.keys_and_values(*padded(longer))
        for row, picture, start, read in zip(rows, pictures, after, kept, strict=True):
            require_finite(read)
            read.setflags(write=False)
            yield Prefix(read[..., : len(row.embeds), :], picture, start, before_second=read)

    def describe(
        self,
        prefix: Prefix,
        max_tokens: int,
        drafts: Sequence[Draft] = (),
        enough: Callable[[], bool] = lambda: False,
    ) -> Description:
        """Write a description and a rating, greedily; see `Vlm.describe`.

        The model writes freely, markers included. Only where the limit cuts the description, or
        where no number was written, the answer's opening is forced, once.
        """
        proposer = self._proposer(drafts)
        writing = Writing(self, prefix, self.prompts.score, max_tokens + RATING_TOKENS, proposer)
        written = self._written_until_end(writing, max_tokens, enough)
        asked = bool(self.prompts.family.answer_open)
        rating = self._rating(writing, written) if asked else None
        return written.description(writing, rating, unreadable=asked and rating is None)

    def reflect(self, prefix: Prefix, summary: str, initial: float, score: float) -> Description:
        """Write a corrected description; see `Vlm.reflect`."""
        question = self.prompts.reflect(summary, initial, score)
        limit = len(self.prompts.ids(summary)) + 32
        writing = Writing(self, prefix, question, limit, self._proposer([Draft(summary)]))
        return self._written_until_end(writing, limit).description(writing)

    def _proposer(self, drafts: Sequence[Draft]) -> Proposer:
        """Drafts in tokens, as the model would write them: with markers around them."""
        family, ids = self.prompts.family, self.prompts.ids
        before = family.description_end + family.answer_open
        # Similar photos often have the same summary.
        opened = {text: ids(text + before).tolist() for text in {d.summary for d in drafts}}
        rated = bool(family.answer_open)
        return Proposer(
            [*opened[draft.summary], *ids(f"{draft.score:.2f}{family.answer_close}")]
            if rated and draft.score is not None
            else opened[draft.summary]
            for draft in drafts
        )

    def _written_until_end(
        self, writing: Writing, max_tokens: int, enough: Callable[[], bool] = lambda: False
    ) -> Written:
        """Write until the next token completes the end of the description."""
        family = self.prompts.family
        marked = writing.until(family.description_end, max_tokens, enough=enough)
        stopped = writing.next_token == self.prompts.stop
        if marked:
            ids, marker = [*writing.tokens, writing.next_token], family.description_end
        else:
            # An answer without the end marker before it ends the description as well.
            ids, marker = writing.tokens, family.answer_open if stopped else ""
        text, tokens = self.prompts.before(ids, marker)
        return Written(text.strip(), tokens, marked=marked, complete=marked or stopped)

    def _rating(self, writing: Writing, written: Written) -> float | None:
        """The number the model prints as its answer, None if it prints none when asked twice."""
        family = self.prompts.family
        start, rating = len(writing.tokens), None
        if written.marked:
            # The token that completes the end marker may begin the answer's opening, too.
            writing.accept()
            rating = self._answer(writing, start, ANSWER_TOKENS)
        elif writing.next_token == self.prompts.stop:
            rating = printed_rating(self.prompts.text(writing.tokens), family, cut=False)
        if rating is None:
            ended = "" if written.marked else family.description_end
            writing.force(self.prompts.ids(ended + family.answer_open))
            start = len(writing.tokens)
            rating = self._answer(writing, start, RATING_TOKENS, opening=family.answer_open)
        return rating

    def _answer(
        self, writing: Writing, start: int, limit: int, *, opening: str = ""
    ) -> float | None:
        """Write until the answer is closed; the number in it from token `start` on."""
        family = self.prompts.family
        closed = writing.until(family.answer_close, len(writing.tokens) + limit, start)
        ids = writing.tokens[start:] + [writing.next_token] * closed
        cut = not closed and writing.next_token != self.prompts.stop
        return printed_rating(opening + self.prompts.text(ids), family, cut=cut)

    def grade(self, prefix: Prefix) -> NDArray[np.float64]:
        """Probabilities of the grade words; see `Vlm.grade`."""
        row = self._text_row(self.prompts.levels, prefix.next_position)
        logits = self._call([row], self._stacked([prefix]))["logits"][0, 0, 0]
        chosen = logits[self.prompts.level_ids].astype(np.float64)
        weights = np.exp(chosen - chosen.max())
        probabilities: NDArray[np.float64] = weights / weights.sum()
        return probabilities

    def prefer_first(
        self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]
    ) -> NDArray[np.float64]:
        """Logits of K comparisons, one forward pass each; see `Vlm.prefer_first`."""
        if self._by_rows is not None:
            return self._prefer_by_rows(self._by_rows, firsts, seconds)
        if len(firsts) == 1:
            return self._prefer_shared(firsts[0], seconds)
        pairs = list(zip(firsts, seconds, strict=True))
        return _joined(self._prefer_paired(part) for part in _chunks(pairs, ROWS_PER_CALL))

    def _prefer_by_rows(
        self, decoder: RowSession, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]
    ) -> NDArray[np.float64]:
        """Each row with its own prefix, or with the only one, which is read where it lies."""
        shared = len(firsts) == 1
        pairs = zip(list(firsts) * len(seconds) if shared else firsts, seconds, strict=True)

        def answers(part: Sequence[tuple[Prefix, VisualTokens]]) -> NDArray[np.float64]:
            rows = [self._second_row(first, second) for first, second in part]
            prefixes = [
                first.key_values if first.before_second is None else first.before_second
                for first, _ in (part[:1] if shared else part)
            ]
            logits = decoder.last_logits(*padded(rows), prefixes, self.prompts.verdict_ids)
            require_finite(logits)
            ahead: NDArray[np.float64] = logits[:, 0].astype(np.float64) - logits[:, 1]
            return ahead

        return _joined(answers(part) for part in _chunks(list(pairs), ROWS_BY_THEMSELVES))

    def _prefer_shared(self, first: Prefix, seconds: Sequence[VisualTokens]) -> NDArray[np.float64]:
        """One prefix read by all rows."""
        stacked = self._stacked([first])
        return _joined(
            self._verdicts([self._second_row(first, second) for second in part], stacked)
            for part in _chunks(seconds, ROWS_PER_CALL)
        )

    def _prefer_paired(self, pairs: Sequence[tuple[Prefix, VisualTokens]]) -> NDArray[np.float64]:
        """A prefix to each row, in one call."""
        rows = [self._second_row(first, second) for first, second in pairs]
        return self._verdicts(rows, self._stacked([first for first, _ in pairs]), one_each=True)

    def _verdicts(
        self, rows: Sequence[Row], prefixes: dict[str, Array], *, one_each: bool = False
    ) -> NDArray[np.float64]:
        """Logit that the first picture of each row looks better."""
        logits = self._call(rows, prefixes, one_each=one_each)["logits"]
        flat = logits.reshape(len(rows), -1).astype(np.float64)
        first_id, second_id = self.prompts.verdict_ids
        verdicts: NDArray[np.float64] = flat[:, first_id] - flat[:, second_id]
        return verdicts

    def _second_row(self, first: Prefix, second: VisualTokens) -> Row:
        """The row that shows a second picture and asks which looks better."""
        before, after = self._around_second
        start = first.next_position
        if first.before_second is not None:
            start, before = start + len(before), before[:0]
        positions = _positions_around(second.grid, len(before), len(after), start)
        return Row(np.concatenate([before, second.values, after]), positions)

    @cached_property
    def _around_second(self) -> tuple[Floats, Floats]:
        """Embeddings of what stands before and behind the second picture of a comparison."""
        p = self.prompts
        return self._embed(p.second_opening), self._embed(np.concatenate([p.closing, p.compare]))

    def _text_row(self, ids: NDArray[np.int64], start: int) -> Row:
        positions, _ = layout([len(ids)], start)
        return Row(self._embed(ids), positions)

    def _embed(self, ids: NDArray[np.int64] | Sequence[int]) -> Floats:
        """Embeddings (n, embed width) of tokens; text has zeros for DeepStack's features."""
        s = self.shape
        embeds = self._embedding[ids].astype(np.float32)
        if s.embed_width == s.hidden_size:
            return embeds
        return np.pad(embeds, ((0, 0), (0, s.embed_width - s.hidden_size)))

    def _no_prefixes(self, count: int) -> dict[str, Array]:
        s = self.shape
        empty = np.zeros((s.layers, 2, count, s.kv_heads, 0, s.head_dim), np.float32)
        return {"prefix": empty, "prefix_lengths": np.zeros(count, np.int64)}

    def _stacked(self, prefixes: Sequence[Prefix]) -> dict[str, Array]:
        """Prefixes side by side, padded to the longest; a single one is not copied."""
        lengths = np.array([prefix.length for prefix in prefixes], np.int64)
        if len(prefixes) == 1:
            return {"prefix": prefixes[0].key_values[:, :, None], "prefix_lengths": lengths}
        s = self.shape
        shape = (s.layers, 2, len(prefixes), s.kv_heads, int(lengths.max()), s.head_dim)
        stacked = np.zeros(shape, np.float32)
        for index, prefix in enumerate(prefixes):
            stacked[:, :, index, :, : prefix.length] = prefix.key_values
        return {"prefix": stacked, "prefix_lengths": lengths}

    def _call(
        self,
        rows: Sequence[Row],
        prefixes: dict[str, Array],
        *,
        one_each: bool = False,
    ) -> dict[str, Floats]:
        """Run rows over one shared prefix, or over one prefix each; logits of the last tokens."""
        shape = (len(rows), 1) if one_each else (1, len(rows))
        embeds, positions, steps = padded(rows)
        longest = embeds.shape[1]
        s = self.shape
        past = np.zeros((s.layers, 2, shape[0], s.kv_heads, shape[1], 0, s.head_dim), np.float32)
        made = self._decoder.run(
            {
                "embeds": embeds.reshape(*shape, longest, -1),
                "positions": positions.reshape(3, *shape, longest),
                **prefixes,
                "past": past,
                "past_lengths": np.zeros(shape, np.int64),
                "logit_positions": (steps - 1).reshape(*shape, 1),
            }
        )
        require_finite(made["logits"])
        return made

    def continue_writing(
        self, prefix: Prefix, past: Floats, past_length: int, ids: Sequence[int], wanted: int = 1
    ) -> dict[str, Floats]:
        """Feed tokens after a prefix and a past; see `meiqa.engine.writing.Continued`."""
        start = prefix.next_position + past_length
        positions = np.empty((3, 1, 1, len(ids)), np.float32)
        positions[:] = np.arange(start, start + len(ids))
        return self._decoder.run(
            {
                "embeds": self._embed(ids)[None, None],
                "positions": positions,
                **self._stacked([prefix]),
                "past": past,
                "past_lengths": np.array([[past_length]], np.int64),
                "logit_positions": np.arange(len(ids) - wanted, len(ids))[None, None],
            }
        )


@lru_cache(maxsize=1024)
def _positions_around(grid: tuple[int, int], before: int, after: int, start: int) -> Floats:
    """Positions (3, n) of a picture between texts; most pictures have one of few grids."""
    positions: Floats = layout([before, grid, after], start)[0]
    positions.setflags(write=False)
    return positions


def padded(rows: Sequence[Row]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Rows side by side: embeddings (R, S, D), positions (3, R, S), real tokens (R,)."""
    steps = np.array([len(row.embeds) for row in rows], np.int64)
    embeds = np.zeros((len(rows), int(steps.max()), rows[0].embeds.shape[1]), np.float32)
    positions = np.zeros((3, *embeds.shape[:2]), np.float32)
    for index, row in enumerate(rows):
        embeds[index, : len(row.embeds)] = row.embeds
        positions[:, index, : len(row.embeds)] = row.positions
    return embeds, positions, steps


def _joined(parts: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Parts one after the other; empty if there are none."""
    return np.concatenate([np.zeros(0), *parts])


def _chunks(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """Consecutive parts of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
