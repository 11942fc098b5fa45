"""A budget in milliseconds or precision buys what it can, and the rest is named."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from meiqa.engine.drafting import Draft
from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.pipeline import Engine
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.engine.vlm import Description, Prefix, VisualTokens
from meiqa.types import Budget
from tests.engine.samples import ANCHORS, PHOTOS, read_memory


class Sluggish(LocalVlm):
    """A model that takes two milliseconds more for each comparison."""

    def prefer_first(
        self, firsts: Sequence[Prefix], seconds: Sequence[VisualTokens]
    ) -> NDArray[np.float64]:
        time.sleep(0.002 * len(seconds))
        return super().prefer_first(firsts, seconds)

    def describe(
        self,
        prefix: Prefix,
        max_tokens: int,
        drafts: Sequence[Draft] = (),
        enough: Callable[[], bool] = lambda: False,
    ) -> Description:
        time.sleep(0.001 * max_tokens)
        return super().describe(prefix, max_tokens, drafts, enough)


@pytest.fixture(scope="module")
def sluggish(package: EnginePackage, anchors: Path) -> Iterator[Engine]:
    vlm = Sluggish(package, *open_sessions(package, "cpu", 1))
    with Engine(vlm, package, read_memory(package, anchors)) as engine:
        yield engine


def test_a_millisecond_buys_the_first_opinion(sluggish: Engine) -> None:
    result = sluggish.score(PHOTOS[0], budget=Budget(ms=1), learn=False)
    assert "initial score only" in result.degraded
    assert result.neighbours == ()
    assert result.summary is None
    assert result.score == result.initial_score
    assert result.counters["comparisons"] == 0


def test_little_time_buys_fewer_comparisons(sluggish: Engine) -> None:
    whole = sluggish.score(PHOTOS[1], learn=False)
    short = sluggish.score(PHOTOS[1], budget=Budget(ms=50), learn=False)
    assert short.degraded
    assert short.summary is None
    assert short.counters["comparisons"] < whole.counters["comparisons"]
    assert "no summary" not in whole.degraded


def test_plenty_of_time_buys_everything(sluggish: Engine) -> None:
    whole = sluggish.score(PHOTOS[1], learn=False)
    result = sluggish.score(PHOTOS[1], budget=Budget(ms=1e6), learn=False)
    assert result.degraded == whole.degraded
    assert result.score == pytest.approx(whole.score, abs=1e-3)


def test_a_precision_stops_the_comparisons(engine: Engine) -> None:
    whole = engine.score(PHOTOS[3])
    target = 1.2 * whole.std
    result = engine.score(PHOTOS[3], budget=Budget(std=target))
    asked = [n for n in result.neighbours if n.preference is not None]
    assert 0 < len(asked) < len(whole.neighbours)
    assert whole.std < result.std <= target
    assert f"stopped after {len(asked)} of {ANCHORS} neighbours" in result.degraded


def test_a_precision_out_of_reach_asks_everything(engine: Engine) -> None:
    whole = engine.score(PHOTOS[3])
    result = engine.score(PHOTOS[3], budget=Budget(std=1e-6))
    assert result.counters["comparisons"] == whole.counters["comparisons"]
    assert result.std > 1e-6
