"""An engine without a model, for the tests of what stands on one.

>>> from PIL import Image
>>> with FakeEngine(lambda pixels: 1 + 4 * pixels.array.mean() / 255) as engine:
...     engine.score(Image.new("L", (4, 3))).word
'bad'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from meiqa.engine.calibration import UNCALIBRATED
from meiqa.engine.comparing import PrefixCache
from meiqa.engine.engine import Engine
from meiqa.engine.images import ImageSource, Pixels, load_pixels, source_name
from meiqa.engine.package import EnginePackage
from meiqa.engine.scoring import ScoreRequest
from meiqa.errors import ImageError
from meiqa.types import (
    Assessment,
    Budget,
    CulledPhoto,
    Culling,
    Failure,
    Neighbour,
    PairComparison,
    RankedPhoto,
    Ranking,
    quality_word,
)


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
        model = SimpleNamespace(digest=package.digest, calibration=manifest.calibration)
        counts = SimpleNamespace(count_anchors=neighbours, count_contrast=0)
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
    ) -> Assessment:
        """Assess one photo; see `Engine.score`."""
        beside = None if reference is None else source_name(reference)
        self.calls.append(Call(source_name(image), budget, k, learn, beside))
        self._before(source_name(image))
        pixels = load_pixels(image)
        rule = self._score
        if rule is None:
            rule = 1 + 4 * int(pixels.digest[:8], 16) / 0xFFFFFFFF
        score = float(rule(pixels) if callable(rule) else rule)
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
    ) -> Iterator[Assessment | Failure]:
        """Assess photos one after the other; see `Engine.score_many`."""
        for image in images:
            asked = ScoreRequest(b"", budget, None, k, learn)
            asked = image if isinstance(image, ScoreRequest) else replace(asked, image=image)
            left = None if asked.deadline is None else asked.deadline.remaining_ms
            limit = asked.budget if left is None else Budget(ms=max(left, 1e-3))
            try:
                yield self.score(
                    asked.image, reference=reference, budget=limit, k=asked.k, learn=asked.learn
                )
            except ImageError as error:
                yield Failure(source_name(asked.image), error)

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
                CulledPhoto(place, f.path, f.score, f.std, f.score, 1.0, f.summary)
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


def _left_out(scored: Iterable[Assessment]) -> tuple[str, ...]:
    """What the budget left out of any of them."""
    return tuple(dict.fromkeys(note for each in scored for note in each.degraded))
