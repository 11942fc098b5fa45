"""An engine without a model and a model without files, for the tests of what stands on them.

>>> from PIL import Image
>>> with FakeEngine(lambda pixels: 1 + 4 * pixels.array.mean() / 255) as engine:
...     engine.score(Image.new("L", (4, 3))).word
'bad'
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.asking import Question
from meiqa.engine.calibration import UNCALIBRATED, Calibration, ScoreHead
from meiqa.engine.comparing import PrefixCache
from meiqa.engine.detail import measure_detail
from meiqa.engine.engine import Engine
from meiqa.engine.estimates import quality_word
from meiqa.engine.images import ImageSource, Pixels, load_pixels, source_name
from meiqa.engine.manifest import ImageProcessing
from meiqa.engine.model import (
    Asked,
    Description,
    Draft,
    Floats,
    GenerationStats,
    Model,
    Prefix,
    StopRule,
    VisualTokens,
)
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import MEIQA
from meiqa.engine.runtime.decoder import KeyValues
from meiqa.engine.scoring import ScoreRequest
from meiqa.engine.sets import Candidate
from meiqa.errors import ImageError
from meiqa.types import (
    Answer,
    Assessment,
    Budget,
    CulledPhoto,
    Culling,
    Embedding,
    Failure,
    Neighbour,
    PairComparison,
    RankedPhoto,
    Ranking,
    ShotComparison,
)

FAKE_TEXT = "This photo looks {} to a model that has not seen it, and that says so in twenty words."
"""What a `FakeModel` writes."""
FAKE_CALIBRATION = replace(UNCALIBRATED, neighbours=8)


class Call(NamedTuple):
    """What was asked of a photo."""

    name: str
    budget: Budget | None
    k: int | None
    learn: bool
    reference: str | None


class FakeEngine(Engine):
    """An engine that scores photos by a rule, and learns nothing.

    Args:
        score: of a photo: a number, or a function of its pixels; by default it follows from their
            digest.
        neighbours: remembered photos that each is compared with unless `k` says otherwise; their
            scores are spread over the scale, and each photo beats those below its score.
        before: is called with the name of each photo that is taken up; here a test waits, counts,
            or raises what judging is to raise.
        adjust: changes each assessment.

    Attributes:
        calls: what was asked of each photo so far.
        ranked, culled: the options of the last such call.
    """

    def __init__(
        self,
        score: float | Callable[[Pixels], float] | None = None,
        *,
        neighbours: int = 3,
        before: Callable[[str], object] = lambda name: None,
        adjust: Callable[[Assessment], Assessment] = lambda found: found,
    ) -> None:
        self._score, self._before, self._adjust = score, before, adjust
        self._neighbours = neighbours
        self.calls: list[Call] = []
        self.ranked: dict[str, Any] = {}
        self.culled: dict[str, Any] = {}
        manifest = SimpleNamespace(
            architecture="fake",
            precision="fp32",
            prompt=SimpleNamespace(name="fake"),
            image=SimpleNamespace(max_pixels=512 * 512),
            calibration=replace(UNCALIBRATED, neighbours=neighbours, sigma=0.9),
        )
        package = SimpleNamespace(path=Path("/packages/fake"), digest="ab" * 32, manifest=manifest)
        self._package = cast(EnginePackage, package)
        model = SimpleNamespace(
            digest=package.digest, calibration=manifest.calibration, image=manifest.image
        )
        counts = SimpleNamespace(count_anchors=neighbours, count_contrast=0, views={})
        memory = SimpleNamespace(snapshot=lambda: counts)
        scorer: Any = SimpleNamespace(model=model, memory=memory, prefixes=PrefixCache())
        super().__init__(scorer)

    def close(self) -> None:
        """Do nothing."""

    @property
    def package(self) -> EnginePackage:
        """What stands for a package."""
        return self._package

    def least_ms(self) -> float:
        """Give the shortest time that a photo takes."""
        return 1.0

    def score(
        self,
        image: ImageSource,
        *,
        reference: ImageSource | None = None,
        budget: Budget | None = None,
        k: int | None = None,
        learn: bool = True,
        detail: bool = True,
        embedding: bool = False,
    ) -> Assessment:
        """Assess one photo; see `Engine.score`."""
        beside = None if reference is None else source_name(reference)
        self.calls.append(Call(source_name(image), budget, k, learn, beside))
        self._before(source_name(image))
        pixels = load_pixels(image)
        score = self._ruled(pixels)
        count = self._neighbours if k is None else k
        levels = [1 + 4 * i / max(1, count - 1) for i in range(count)]
        found = Assessment(
            path=pixels.name,
            score=score,
            std=0.2,
            ci95=(score - 0.4, score + 0.4),
            initial_score=float(round(score)),
            word=quality_word(score),
            percentile=25.0 * (score - 1),
            summary="An even picture.",
            neighbours=tuple(
                Neighbour(f"anchor {level:.2f}", "anchor", level, 0.2, float(score > level))
                for level in levels
            ),
            detail=measure_detail(pixels.array, pixels.luminance_table) if detail else None,
            embedding=Embedding(self.package.digest, _mean_colour(pixels)) if embedding else None,
            timings_ms={"decode": 1.5, "total": 12.0},
            counters={"reused_tokens": 49},
        )
        return self._adjust(found)

    def score_many(
        self,
        images: Iterable[ImageSource | ScoreRequest],
        *,
        reference: ImageSource | None = None,
        budget: Budget | None = None,
        k: int | None = None,
        learn: bool = True,
        detail: bool = True,
        embedding: bool = False,
    ) -> Iterator[Assessment | Failure]:
        """Assess photos one after the other; see `Engine.score_many`."""
        for image in images:
            common = ScoreRequest(b"", budget, k, learn, detail, embedding)
            one = image if isinstance(image, ScoreRequest) else replace(common, image=image)
            try:
                yield self.score(
                    one.image,
                    reference=reference,
                    budget=one.budget,
                    k=one.k,
                    learn=one.learn,
                    detail=one.detail,
                    embedding=one.embedding,
                )
            except ImageError as error:
                yield Failure(source_name(one.image), error)

    def rank(
        self,
        images: Iterable[ImageSource],
        *,
        budget: Budget | None = None,
        k: int | None = None,
        rivals: int = 4,
        on_photo: Callable[[], None] = lambda: None,
    ) -> Ranking:
        """Order photos by their scores; see `Engine.rank`."""
        self.ranked = {"budget": budget, "k": k, "rivals": rivals}
        scored, failures = self._judged(images, budget, k, on_photo)
        scored.sort(key=lambda each: -each[1].score)
        photos = (
            RankedPhoto(place, f.path, f.score, f.std, f.score, len(scored) - 1, 0, f.summary)
            for place, (_, f) in enumerate(scored, 1)
        )
        return Ranking(tuple(photos), failures, _left_out(found for _, found in scored))

    def cull(
        self,
        images: Iterable[ImageSource],
        *,
        budget: Budget | None = None,
        k: int | None = None,
        alike: float = 0.55,
        on_photo: Callable[[], None] = lambda: None,
    ) -> Culling:
        """Group photos that have the same size; see `Engine.cull`."""
        self.culled = {"budget": budget, "k": k, "alike": alike}
        scored, failures = self._judged(images, budget, k, on_photo)
        groups: dict[tuple[int, ...], list[Assessment]] = {}
        for image, found in scored:
            groups.setdefault(load_pixels(image).array.shape, []).append(found)
        shots = (
            tuple(
                CulledPhoto(
                    *(place, f.path, f.score, f.std, f.score, 1.0, f.summary),
                    kind="burst" if len(group) > 1 else None,
                )
                for place, f in enumerate(sorted(group, key=lambda each: -each.score), 1)
            )
            for group in groups.values()
        )
        return Culling(tuple(shots), failures, _left_out(found for _, found in scored))

    def _judged(
        self,
        images: Iterable[ImageSource],
        budget: Budget | None,
        k: int | None,
        on_photo: Callable[[], None],
    ) -> tuple[list[tuple[ImageSource, Assessment]], tuple[Failure, ...]]:
        """Photos that could be judged, with what came of them, and the others."""
        scored, failures = [], []
        for image in images:
            (found,) = self.score_many([image], budget=budget, k=k, learn=False)
            if isinstance(found, Failure):
                failures.append(found)
            else:
                scored.append((image, found))
            on_photo()
        return scored, tuple(failures)

    def compare(
        self, first: ImageSource, second: ImageSource, *, budget: Budget | None = None
    ) -> PairComparison:
        """Compare two photos by their scores; see `Engine.compare`."""
        one, other = (self.score(each, budget=budget, learn=False) for each in (first, second))
        preference = 1 / (1 + math.exp(other.score - one.score))
        scores, times = (one.score, other.score), {"total": 24.0}
        return PairComparison(
            one.path, other.path, preference, *scores, times, _left_out([one, other])
        )

    def read_shot(self, image: ImageSource) -> Candidate:
        """Give a shot its score by the rule; see `Engine.read_shot`."""
        pixels = load_pixels(image)
        score, nothing = self._ruled(pixels), np.zeros((1, 1), np.float32)
        return Candidate(pixels.name, pixels.digest, nothing, (1, 1), score, score, ())

    def compare_shots(self, first: Candidate, second: Candidate) -> ShotComparison:
        """Compare two shots by their scores; see `Engine.compare_shots`."""
        gap = first.score - second.score
        return ShotComparison(first.path, second.path, 1 / (1 + math.exp(-gap)), gap, 0.2)

    def _ruled(self, pixels: Pixels) -> float:
        """Give the score that the rule gives a photo."""
        if self._score is None:
            return 1 + 4 * int(pixels.digest[:8], 16) / 0xFFFFFFFF
        return float(self._score(pixels) if callable(self._score) else self._score)

    def options_many(self, image: ImageSource, questions: Sequence[Question]) -> list[Answer]:
        """Take options for grades from the worst to the best; see `Engine.options_many`."""
        found = self.score(image, learn=False)
        answers = []
        for each in questions:
            apart = np.abs(np.linspace(1.0, 5.0, len(each.options)) - found.score)
            weights = np.exp(-apart) / np.exp(-apart).sum()
            shares = dict(zip(each.options, weights.tolist(), strict=True))
            second = None if each.second is None else source_name(each.second)
            logprobs = {option: math.log(share) for option, share in shares.items()}
            answers.append(Answer(found.path, each.text, shares, logprobs, second))
        return answers


def _left_out(scored: Iterable[Assessment]) -> tuple[str, ...]:
    """What the budget left out of any of them."""
    return tuple(dict.fromkeys(note for each in scored for note in each.degraded))


@dataclass
class FakeClock:
    """Seconds that pass only when they are told to, to be injected where a clock is taken.

    >>> clock = FakeClock()
    >>> clock.advance(250.0)
    >>> clock()
    0.25
    """

    seconds: float = 0.0

    def __call__(self) -> float:
        """Give the seconds that have passed."""
        return self.seconds

    def advance(self, ms: float) -> None:
        """Let milliseconds pass."""
        self.seconds += 1e-3 * ms


def _mean_colour(pixels: Pixels) -> tuple[float, ...]:
    return tuple((pixels.array.mean((0, 1)) / 255.0).tolist())


def mean_brightness(pixels: NDArray[np.uint8]) -> float:
    """Score pixels from 1 for black to 5 for white.

    >>> mean_brightness(np.full((2, 2, 3), 255, np.uint8))
    5.0
    """
    return 1.0 + 4.0 * float(pixels.mean()) / 255.0


class FakeModel(Model):
    """A model that scores by a function of the pixels, in the role of `meiqa.engine.model.Model`.

    What it prints and grades is that score; its text follows from it; it prefers the photo of the
    higher score, the more clearly the further they are apart. Scores are kept in visual tokens, so
    remembered photos have theirs too, to about 0.01.

    Args:
        score: pixels (H, W, 3) → 1-5.
        calibration, head: as in a package.
        clock: that advances with what is asked of it.
        ms: what that takes: "encode", "prefill" and "grade" a picture, "token" of a text, and
            "pair" of pictures; nothing where it is not named.

    Attributes:
        ms: see above, and may be changed.
        calls: how many of each it was asked for, by the same names.

    >>> model = FakeModel()
    >>> (prefix,) = model.prefill([model.encode(np.full((16, 16, 3), 255, np.uint8))])
    >>> model.describe(prefix, 8).text
    'This photo looks excellent to a model that'
    """

    digest = hashlib.sha256(b"fake model").hexdigest()
    family = MEIQA
    image = ImageProcessing(8, 2, 16 * 16, 128 * 128, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    widths = 2, 5
    summary_tokens = 24

    def __init__(
        self,
        score: Callable[[NDArray[np.uint8]], float] = mean_brightness,
        *,
        calibration: Calibration = FAKE_CALIBRATION,
        head: ScoreHead = "text",
        clock: FakeClock | None = None,
        ms: Mapping[str, float] | None = None,
    ) -> None:
        self.calibration, self.head = calibration, head
        self.calls: dict[str, int] = {}
        self.ms = dict(ms or {})
        self._score, self._clock = score, clock

    def _spend(self, what: str, count: int = 1) -> None:
        self.calls[what] = self.calls.get(what, 0) + count
        if self._clock is not None:
            self._clock.advance(count * self.ms.get(what, 0.0))

    def encode(self, pixels: NDArray[np.uint8]) -> VisualTokens:
        """Keep the score, and the mean colour of each cell, so that pictures can be told apart."""
        self._spend("encode")
        cell, (rows, columns) = self.image.cell_pixels, self.grid_of(pixels)
        cells = pixels.reshape(rows, cell, columns, cell, 3).mean(axis=(1, 3)) / 127.5 - 1.0
        values = np.ones((rows * columns, self.widths[1]), np.float32)
        values[:, 1] = (self._score(pixels) - 3.0) / 2.0
        values[:, 2:] = cells.reshape(-1, 3)
        return VisualTokens(values, (rows, columns))

    def grid_of(self, pixels: NDArray[np.uint8]) -> tuple[int, int]:
        """Give rows and columns of cells."""
        return pixels.shape[0] // self.image.cell_pixels, pixels.shape[1] // self.image.cell_pixels

    def prefill(self, pictures: Sequence[VisualTokens]) -> list[Prefix]:
        """Read pictures; a prefix is one number for each token."""
        self._spend("prefill", len(pictures))
        prefixes = []
        for picture in pictures:
            length = len(picture.values)
            opening = KeyValues(np.zeros((1, 2, 1, length, 1), np.float32), length)
            prefixes.append(Prefix(picture, opening, opening, length))
        return prefixes

    def describe(
        self, prefix: Prefix, max_tokens: int, drafts: Sequence[Draft] = (), stop: StopRule = None
    ) -> Description:
        """Write a text, a token a word, and print the score."""
        score, count = score_in(prefix.tokens), 0
        words = FAKE_TEXT.format(quality_word(score)).split()
        while count < min(max_tokens, len(words)) and not (stop and stop()):
            self._spend("token")
            count += 1
        stats = GenerationStats(count, count == len(words), calls=count)
        key = _key_of(score) if count else None
        return Description(" ".join(words[:count]), key, round(score, 2), stats=stats)

    def log_probabilities(
        self, firsts: Sequence[Prefix], questions: Sequence[Asked]
    ) -> list[NDArray[np.float64]]:
        """Take options for grades from bad to excellent; of a pair, for verdicts by the scores."""
        each = list(firsts) * len(questions) if len(firsts) == 1 else firsts
        found = []
        for first, question in zip(each, questions, strict=True):
            score, count = score_in(first.tokens), len(question.options)
            if question.second is None:
                self._spend("grade")
                apart = np.abs(np.linspace(1.0, 5.0, count) - score) * max(count - 1, 1) / 4.0
                weights = np.maximum(1.0 - apart, 1e-12)
            else:
                self._spend("pair")
                gap = score - score_in(question.second)
                weights = np.exp(np.linspace(gap, -gap, count))
            found.append(np.log(weights / weights.sum()))
        return found

    def reflect(self, prefix: Prefix, summary: str, initial: float, score: float) -> Description:
        """Write the same text of another score."""
        text = FAKE_TEXT.format(quality_word(score))
        count = len(text.split())
        self._spend("token", count)
        return Description(text, _key_of(score), stats=GenerationStats(count, calls=count))

    def unwritten_key(self, tokens: VisualTokens) -> Floats:
        """Give the key that a description would have."""
        return _key_of(score_in(tokens))

    def close(self) -> None:
        """Let go of nothing."""


def score_in(tokens: VisualTokens) -> float:
    """Read the score that a `FakeModel` keeps in its visual tokens."""
    return min(5.0, max(1.0, 3.0 + 2.0 * float(tokens.values[0, 1])))


def _key_of(score: float) -> Floats:
    """Directions (2,) that are near where scores are."""
    angle = (score - 1.0) * math.pi / 8.0
    return np.array([math.cos(angle), math.sin(angle)], np.float32)
