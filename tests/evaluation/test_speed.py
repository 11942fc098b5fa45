"""What `meiqa bench` reports: how late an engine is, and what LoadGen says of its scenarios."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from meiqa.cli.eval import SCENARIOS
from meiqa.engine.engine import Engine
from meiqa.errors import DecodeError
from meiqa.evaluation.speed import (
    bench_budget,
    bench_scenarios,
    budget_text,
    scenarios_text,
    summary_of,
)
from meiqa.types import Assessment, Budget, Failure, Neighbour

SUMMARY = """
Scenario : Server
Completed samples per second    : 37.33
Result is : INVALID
  Performance constraints satisfied : Yes
  Early stopping satisfied: NO
 * Processed 58 queries.
50.00 percentile latency (ns)   : 15010966
99.00 percentile latency (ns)   : 36673675
target_latency (ns): 100000000
"""


class Clockwork:
    """Takes 20 ms for each photo, whatever it is given, and the first time much longer."""

    def __init__(self, clock: list[float]) -> None:
        self.calls = 0
        self.clock = clock

    def __enter__(self) -> Clockwork:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def score(self, image: object, *, budget: Budget, learn: bool) -> Assessment:
        assert not learn
        self.clock[0] += 0.2 if self.calls == 0 else 0.02
        self.calls += 1
        asked = (Neighbour("a", "anchor", 3.0, 0.1, 0.5), Neighbour("b", "anchor", 2.0, 0.1, None))
        return Assessment(
            "x", 3.0, 0.2, (2.6, 3.4), 3.0, "fair", 50.0, None, asked, degraded=("no summary",)
        )


def test_rows() -> None:
    clock = [0.0]
    result = bench_budget(
        lambda: cast(Engine, Clockwork(clock)), [5.0, 1000.0], photos=4, clock=lambda: clock[0]
    )
    late, early = result["rows"]
    assert (late["budget_ms"], late["n"], late["k"]) == (5.0, 4, 1.0)
    assert late["late"] == 4.0
    assert early["late"] == 0.02  # the first, slow photo does not count
    assert late["p50_ms"] == 20.0
    assert late["left_out"] == {"no summary": 4}
    assert not result["in_time"]
    assert json.loads(json.dumps(result)) == result
    assert "no summary (4)" in budget_text(result)


class QuickEngine:
    """Takes a millisecond for a photo, and counts."""

    def __init__(self, failing: bool = False) -> None:
        self.scored = self.forgotten = 0
        self._failing = failing

    def __enter__(self) -> QuickEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def forget_photos(self) -> None:
        self.forgotten += 1

    def score_many(self, images: Sequence[bytes], *, learn: bool) -> Iterator[Any]:
        assert not learn
        for image in images:
            assert image.startswith(b"\xff\xd8")
            time.sleep(1e-3)
            self.scored += 1
            failed = self._failing and self.scored > 20
            yield Failure("photo", DecodeError("damaged")) if failed else cast(Assessment, None)


def quick(engine: QuickEngine, *scenarios: str) -> dict[str, Any]:
    pytest.importorskip("mlperf_loadgen", reason="LoadGen comes with the extra bench")
    return bench_scenarios(
        lambda: cast(Engine, engine), scenarios, seconds=0.3, photos=4, server_rate=50.0
    )


def test_the_summary_is_read() -> None:
    found = summary_of(SUMMARY)
    assert found["valid"] is False
    assert found["notes"] == ["Early stopping satisfied"]
    assert (found["p50_ms"], found["p99_ms"]) == (15.011, 36.674)
    assert found["samples_per_second"] == 37.33
    assert found["loadgen"]["target_latency (ns)"] == "100000000"


def test_all_scenarios_run() -> None:
    engine = QuickEngine()
    result = quick(engine, *SCENARIOS)
    assert tuple(result["scenarios"]) == SCENARIOS
    assert result["scenarios"]["SingleStream"]["valid"]
    assert result["scenarios"]["SingleStream"]["p50_ms"] >= 1.0
    assert result["scenarios"]["MultiStream"]["p50_ms"] >= 8.0
    assert result["scenarios"]["Offline"]["samples_per_second"] > 0
    assert engine.forgotten > engine.scored  # nothing of a photo is kept for the next
    assert json.loads(json.dumps(result)) == result
    assert all(name in scenarios_text(result) for name in SCENARIOS)


def test_a_photo_that_cannot_be_judged_ends_the_benchmark() -> None:
    with pytest.raises(DecodeError):
        quick(QuickEngine(failing=True), "SingleStream")
