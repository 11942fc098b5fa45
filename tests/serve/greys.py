"""An engine for the camera's tests: it judges brightness at once, and can be held up."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image

from meiqa.engine.images import NamedBytes, load_pixels
from meiqa.engine.pipeline import Engine
from meiqa.errors import MeiqaError
from meiqa.types import Assessment, Budget, Distortion, Failure, Neighbour, quality_word

FULL = 32


def grey(level: int, size: tuple[int, int] = (48, 64)) -> bytes:
    """A JPEG of one grey."""
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


class GreyEngine:
    """Scores 1 for black to 5 for white; with all neighbours it also writes.

    `open` is set unless photos are to wait; `begun` is set when one is taken up.
    """

    package = SimpleNamespace(
        digest="ab" * 32,
        manifest=SimpleNamespace(
            architecture="grey",
            precision="fp32",
            prompt=SimpleNamespace(name="grey"),
            image=SimpleNamespace(max_pixels=262_144),
            calibration=SimpleNamespace(neighbours=FULL),
        ),
    )
    memory = SimpleNamespace(snapshot=lambda: SimpleNamespace(count_anchors=1024, count_contrast=0))

    def __init__(self) -> None:
        self.open, self.begun = threading.Event(), threading.Event()
        self.open.set()
        self.asked: list[tuple[str, int | None, bool]] = []
        self.fails: Exception | None = None

    def as_engine(self) -> Engine:
        return cast(Engine, self)

    def least_ms(self) -> float:
        return 1.0

    def score(self, photo: Any, *, budget: Budget, learn: bool) -> Assessment:
        return assessment_of(120.0, FULL)

    def score_many(
        self,
        photos: Iterable[NamedBytes],
        *,
        budget: Callable[[], Budget],
        k: int | None,
        learn: bool,
        **_: Any,
    ) -> Iterator[Assessment | Failure]:
        for photo in photos:
            budget()
            self.begun.set()
            assert self.open.wait(5)
            self.asked.append((getattr(photo, "name", ""), k, learn))
            if self.fails is not None:
                raise self.fails
            try:
                level = float(load_pixels(photo).array.mean())
                yield assessment_of(level, FULL if k is None else k)
            except MeiqaError as error:
                yield Failure("frame", error)


def assessment_of(level: float, k: int) -> Assessment:
    """What the grey engine says of a grey."""
    score = 1 + 4 * level / 255
    dark = Distortion("darkening", 5.0, 0.9)
    return Assessment(
        path="frame",
        score=score,
        std=0.4,
        ci95=(score - 0.8, score + 0.8),
        initial_score=score,
        word=quality_word(score),
        percentile=50.0,
        summary="An even picture." if k == FULL else None,
        neighbours=tuple(
            Neighbour(f"grey{i}", "anchor", 1 + i % 5, 0.1, float(score > 1 + i % 5))
            for i in range(k)
        ),
        degraded=() if k == FULL else ("no summary",),
        distortions=(dark,) if level < 50 else (),
        timings_ms={"decode": 1.0, "read": 3.0, "describe": 1.0, "compare": 4.0, "total": 9.5},
    )
