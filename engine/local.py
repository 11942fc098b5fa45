"""The model of an engine package: its graphs asked in the words of its prompt family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.estimates import quality_word
from meiqa.engine.images import canvases, tiles_of, token_grid
from meiqa.engine.manifest import ImageProcessing
from meiqa.engine.measures import measure_attributes, measured_sentence, verdict_sentence
from meiqa.engine.model import (
    ANSWER_TOKENS,
    RATING_TOKENS,
    Asked,
    Description,
    Draft,
    Floats,
    Model,
    Prefix,
    StopRule,
    VisualTokens,
)
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import Ids, Step, positions_of, printed_rating
from meiqa.engine.runtime import open_runtime
from meiqa.engine.runtime.decoder import (
    ROWS_BY_THEMSELVES,
    Array,
    Decoder,
    GraphSession,
    KeyValues,
    Row,
    parts_of,
    require_finite,
)
from meiqa.engine.writing import Proposer, Writing
from meiqa.kernels.patches import pixels_to_patches

Logarithms = NDArray[np.float64]


class LocalModel(Model):
    """The model of an engine package, in the role of `meiqa.engine.model.Model`."""

    def __init__(self, package: EnginePackage, vision: GraphSession, decoder: Decoder) -> None:
        manifest = package.manifest
        self.package = package
        self.prompts = package.prompts
        self.family = package.prompts.family
        self.digest = package.digest
        self.image: ImageProcessing = manifest.image
        self.calibration = manifest.calibration
        self.head = manifest.score_head
        self.summary_tokens = manifest.prompt.summary_tokens
        self.widths = package.widths
        self.decoder = decoder
        self._deepstack = manifest.decoder.embed_width - manifest.decoder.hidden_size
        self._vision = vision
        # Without its subclass, whose bookkeeping takes longer than a token's embedding.
        self._embedding = np.asarray(package.embedding)

    @classmethod
    def open(
        cls, package: EnginePackage, device: str = "cpu", threads: int | None = None
    ) -> LocalModel:
        """Open a package's model; see `open_runtime`."""
        runtime = open_runtime(package, device, threads)
        return cls(package, runtime.vision, runtime.decoder)

    def close(self) -> None:
        """Let go of what it holds; graphs go with the last reference to them."""

    def encode(self, pixels: NDArray[np.uint8]) -> VisualTokens:
        """See a picture; see `Model.encode`."""
        grid = self.grid_of(pixels)
        if self.image.tile_pixels:
            tiles, order = tiles_of(pixels, self.image)
            feeds: dict[str, Array] = {"cells": np.stack([*map(self._patches, tiles)])}
            feeds["order"] = order
        else:
            feeds = {"cells": self._patches(pixels).reshape(*grid, -1)}
        tokens = self._vision.run(feeds)["tokens"]
        require_finite(tokens)
        measured = self.prompts.family.measured
        told = measured_sentence(measure_attributes(pixels)) if measured else ""
        return VisualTokens(tokens, grid, told)

    def grid_of(self, pixels: NDArray[np.uint8]) -> tuple[int, int]:
        """Give the grid of visual tokens; see `Model.grid_of`."""
        return token_grid(pixels.shape[:2], self.image)

    @property
    def largest_prefix_bytes(self) -> int:
        """Bytes of the prefix of a picture of the largest size; see `Model`."""
        shape, side = self.package.manifest.decoder, math.isqrt(self.image.max_pixels)
        sizes = canvases(self.image) or [(side, side)]
        tokens = max(math.prod(token_grid(size, self.image)) for size in sizes)
        kept = 2 * shape.layers * shape.kv_heads * shape.head_dim
        floats = tokens * (kept + shape.embed_width) + shape.state_layers * shape.state_width
        return np.dtype(np.float32).itemsize * floats

    def prefill(self, pictures: Sequence[VisualTokens]) -> list[Prefix]:
        """Read the prompt's opening with each picture; see `Model.prefill`."""
        p, rows, ends = self.prompts, [], []
        for picture in pictures:
            positions, end = positions_of([len(p.opening), picture.grid, len(p.closing)])
            embeds = [self.embed(p.opening), picture.values, self.embed(p.closing)]
            rows.append(Row(np.concatenate(embeds), positions))
            ends.append(end)
        kept = self.decoder.prefill(rows, ahead=self._before_second) if rows else []
        return [
            Prefix(picture, key_values.first(len(row.embeds)), key_values, end)
            for picture, key_values, row, end in zip(pictures, kept, rows, ends, strict=True)
        ]

    def log_probabilities(
        self, firsts: Sequence[Prefix], questions: Sequence[Asked]
    ) -> list[NDArray[np.float64]]:
        """Give the log-probabilities of options; see `Model.log_probabilities`.

        A row asks for one token behind a question; options of several tokens have one for each
        place where they part. All rows are read together, each as if it were alone.
        """
        each = list(firsts) * len(questions) if len(firsts) == 1 else firsts
        # What stands before a second picture may have been read with the prefix already.
        ahead = all(question.second is not None for question in questions)
        rows, prefixes, steps = list[Row](), list[KeyValues](), list[tuple[Logarithms, Step]]()
        found = [np.zeros(len(question.options)) for question in questions]
        for first, question, sums in zip(each, questions, found, strict=True):
            ids, parting = self.prompts.options(question.text, question.options)
            row = self._row(first, question.second, ids)
            row = row.behind(first.key_values.length - first.opening.length if ahead else 0)
            rows += [row.followed_by(self.embed(step.behind)) for step in parting]
            prefixes += [first.key_values if ahead else first.opening] * len(parting)
            steps += [(sums, step) for step in parting]
        if len(firsts) == 1:
            del prefixes[1:]
        for part in parts_of(len(rows), ROWS_BY_THEMSELVES):
            continued = prefixes if len(prefixes) == 1 else prefixes[part]
            logits = self.decoder.last_logits(rows[part], continued)
            largest = logits.max(axis=1)
            weights = np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)
            for (sums, step), row_logits, whole in zip(
                steps[part], logits, largest + np.log(weights), strict=True
            ):
                sums[step.options] += row_logits[step.ids] - whole
        return found

    def describe(
        self, prefix: Prefix, max_tokens: int, drafts: Sequence[Draft] = (), stop: StopRule = None
    ) -> Description:
        """Write a description and a rating, greedily; see `Model.describe`.

        The model writes freely, markers included, but for what was measured. Only where the limit
        cuts the description, or where no number was written, the answer's opening is forced, once.
        """
        proposer = self._proposer(drafts)
        room, told = max_tokens + RATING_TOKENS, prefix.tokens.measured
        writing = Writing(self, prefix, self.prompts.score, room, proposer, told)
        description, marked = self._written_until_end(writing, max_tokens, stop)
        if not self.prompts.family.answer_open:
            return description
        rating = self._rating(writing, marked)
        stats = writing.stats(complete=description.stats.complete)
        return replace(description, rating=rating, unreadable=rating is None, stats=stats)

    def reflect(self, prefix: Prefix, summary: str, initial: float, score: float) -> Description:
        """Write a corrected description; see `Model.reflect`."""
        question = self.prompts.reflect(summary, initial, score)
        limit = len(self.prompts.ids(summary)) + 32
        # The verdict of the score that is printed: another one could only contradict it.
        measured = prefix.tokens.measured
        told = measured and f"{measured}{verdict_sentence(quality_word(score))}"
        proposer = self._proposer([Draft(summary)])
        writing = Writing(self, prefix, question, limit, proposer, told)
        return self._written_until_end(writing, limit)[0]

    def unwritten_key(self, tokens: VisualTokens) -> Floats:
        """Map the mean visual token linearly to a key; see `Model.unwritten_key`."""
        mean = np.append(tokens.values.mean(axis=0), np.float32(1.0))
        return np.asarray(mean @ self._key_projection)  # (D + 1, D_key)

    def _written_until_end(
        self, writing: Writing, max_tokens: int, stop: StopRule = None
    ) -> tuple[Description, bool]:
        """Write until the next token completes the description's end mark, and tell if it does."""
        family = self.prompts.family
        marked = writing.until(family.description_end, max_tokens, stop=stop)
        if marked:
            ids, marker = [*writing.tokens, writing.next_token], family.description_end
        else:
            # An answer without the end marker before it ends the description as well.
            ids, marker = writing.tokens, family.answer_open if writing.stopped else ""
        text, tokens = self.prompts.before(ids, marker)
        key, stats = writing.mean_hidden(tokens), writing.stats(complete=marked or writing.stopped)
        return Description(text.strip(), key, stats=stats), marked

    def _rating(self, writing: Writing, marked: bool) -> float | None:
        """The number the model prints as its answer, None if it prints none when asked twice."""
        family = self.prompts.family
        start, rating = len(writing.tokens), None
        if marked:
            # The token that completes the end marker may begin the answer's opening, too.
            writing.accept()
            rating = self._answer(writing, start, ANSWER_TOKENS)
        elif writing.stopped:
            rating = printed_rating(self.prompts.text(writing.tokens), family, cut=False)
        if rating is None:
            ended = "" if marked else family.description_end + self.prompts.between_tags
            writing.force(self.prompts.ids(ended + family.answer_open))
            start = len(writing.tokens)
            rating = self._answer(writing, start, RATING_TOKENS, opening=family.answer_open)
        return rating

    def _answer(
        self, writing: Writing, start: int, limit: int, *, opening: str = ""
    ) -> float | None:
        """Write until the answer is closed; the number in it from token `start` on."""
        family = self.prompts.family
        closed = writing.until(family.answer_close, writing.written + limit, start)
        ids = writing.tokens[start:] + [writing.next_token] * closed
        cut = not closed and not writing.stopped
        return printed_rating(opening + self.prompts.text(ids), family, cut=cut)

    def _proposer(self, drafts: Sequence[Draft]) -> Proposer:
        """Drafts in tokens, as the model would write them: with markers around them."""
        family, ids = self.prompts.family, self.prompts.ids
        # Where tags merge, models differ: they part lines, or they don't.
        tags = {
            f"{family.description_end}{between}{family.answer_open}"
            for between in (self.prompts.between_tags, "")
        }
        # Similar photos often have the same summary.
        summaries = {draft.summary for draft in drafts}
        opened = {text: [ids(text + tag).tolist() for tag in sorted(tags)] for text in summaries}
        rated = bool(family.answer_open)
        return Proposer(
            [*begun, *ids(f"{draft.score:.2f}{family.answer_close}")]
            if rated and draft.score is not None
            else begun
            for draft in drafts
            for begun in opened[draft.summary]
        )

    def _row(self, first: Prefix, second: VisualTokens | None, question: Ids) -> Row:
        """A question behind a prefix, and behind the second picture if there is one."""
        start = first.next_position
        if second is None:
            return Row(self.embed(question), positions_of([len(question)], start)[0])
        before, closing = self._before_second, self.prompts.closing
        after = self.embed(np.concatenate([closing, question]))
        positions = _positions_around(second.grid, len(before), len(after), start)
        return Row(np.concatenate([before, second.values, after]), positions)

    @cached_property
    def _key_projection(self) -> Floats:
        return np.asarray(self.package.array("key_projection.npy"))

    @cached_property
    def _before_second(self) -> Floats:
        """Embeddings of what stands before the second picture of a question."""
        return self.embed(self.prompts.second_opening)

    def _patches(self, pixels: NDArray[np.uint8]) -> Floats:
        image = self.image
        return pixels_to_patches(pixels, image.patch_size, image.merge_size, image.mean, image.std)

    def embed(self, ids: Ids | Sequence[int]) -> Floats:
        """Give embeddings (n, embed width) of tokens; text has zeros for DeepStack."""
        embeds = self._embedding[ids].astype(np.float32)
        return np.pad(embeds, ((0, 0), (0, self._deepstack))) if self._deepstack else embeds


@lru_cache(maxsize=1024)
def _positions_around(grid: tuple[int, int], before: int, after: int, start: int) -> Floats:
    """Positions (3, n) of a picture between texts; most pictures have one of few grids."""
    positions = positions_of([before, grid, after], start)[0]
    positions.setflags(write=False)
    return positions
