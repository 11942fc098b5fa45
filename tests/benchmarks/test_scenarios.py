"""MLPerf's scenarios are driven by LoadGen, and what is reported is what its summary says."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

from meiqa.benchmarks.scenarios import SCENARIOS, bench_scenarios, summary_of, table_text
from meiqa.engine.pipeline import Engine
from meiqa.errors import DecodeError
from meiqa.types import Assessment, Failure

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
    assert all(name in table_text(result) for name in SCENARIOS)


def test_a_photo_that_cannot_be_judged_ends_the_benchmark() -> None:
    with pytest.raises(DecodeError):
        quick(QuickEngine(failing=True), "SingleStream")
