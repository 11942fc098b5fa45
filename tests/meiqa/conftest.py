"""An engine without a model: it judges brightness, and fails where a real one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from meiqa.commands import options
from meiqa.engine.caches import CacheState
from meiqa.engine.images import ImageSource, load_pixels
from meiqa.errors import MeiqaError
from meiqa.types import (
    Assessment,
    Failure,
    Neighbour,
    PairComparison,
    RankedPhoto,
    Ranking,
    quality_word,
)


class BrightnessEngine:
    """Score 1 for black to 5 for white, compared with three remembered greys."""

    package = SimpleNamespace(path=Path("/packages/grey"), digest="ab" * 32)
    memory = SimpleNamespace(snapshot=lambda: SimpleNamespace(count_anchors=3, count_contrast=1))

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __enter__(self) -> BrightnessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def caches(self) -> dict[str, CacheState]:
        return {"photos": CacheState(64 << 20, 3 << 20, 1, 2)}

    def score(
        self, image: ImageSource, *, budget: object = None, k: int | None = None, learn: bool = True
    ) -> Assessment:
        self.calls.append({"budget": budget, "k": k, "learn": learn})
        pixels = load_pixels(image)
        score = 1 + 4 * float(pixels.array.mean()) / 255
        greys = tuple(
            Neighbour(f"grey{level}", "anchor", float(level), 0.2, float(score > level))
            for level in (1, 3, 5)[:k]
        )
        return Assessment(
            path=pixels.name,
            score=score,
            std=0.2,
            ci95=(score - 0.4, score + 0.4),
            initial_score=round(score),
            word=quality_word(score),
            percentile=50.0,
            summary="An even picture.",
            neighbours=greys,
            degraded=() if budget is None else ("summary",),
            reflection="It is brighter than it seemed." if score > 4.5 else None,
            timings_ms={"decode": 1.5, "total": 12.0},
            counters={"reused_tokens": 49},
        )

    def score_many(
        self,
        images: Iterable[ImageSource],
        *,
        budget: object,
        k: int | None,
        learn: bool,
        reference: ImageSource | None = None,
    ) -> Iterator[Assessment | Failure]:
        for image in images:
            try:
                yield self.score(image, budget=budget, k=k, learn=learn)
            except MeiqaError as error:
                yield Failure(str(image), error)

    def rank(
        self,
        images: Iterable[ImageSource],
        *,
        budget: object,
        k: int | None,
        rivals: int,
        on_photo: Callable[[], None],
    ) -> Ranking:
        self.ranked = {"budget": budget, "k": k, "rivals": rivals}
        judged = list(self.score_many(images, budget=budget, k=k, learn=False))
        scored = [each for each in judged if isinstance(each, Assessment)]
        for _ in judged:
            on_photo()
        best_first = sorted(scored, key=lambda each: -each.score)
        photos = tuple(
            RankedPhoto(place, each.path, each.score, 0.2, each.score - 0.1, 2, 1 - place)
            for place, each in enumerate(best_first, 1)
        )
        return Ranking(photos, tuple(each for each in judged if isinstance(each, Failure)))

    def compare(self, first: ImageSource, second: ImageSource) -> PairComparison:
        one, other = self.score(first), self.score(second)
        preference = 0.75 if one.score >= other.score else 0.25
        return PairComparison(
            one.path, other.path, preference, one.score, other.score, {"total": 9.0}
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> BrightnessEngine:
    """Put the brightness engine behind the command line."""
    engine = BrightnessEngine()
    monkeypatch.setattr(options, "open_engine", lambda *_, **__: engine)
    return engine


@pytest.fixture
def grey(tmp_path: Path) -> Callable[..., Path]:
    """Write a grey picture below the test's directory and give its path."""

    def write(name: str, level: int = 128) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), level, np.uint8)).save(path)
        return path

    return write
