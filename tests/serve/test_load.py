"""The load generator: what it counts, and that it runs."""

from __future__ import annotations

import asyncio
import math

import pytest

from benchmarks.load import (
    Asked,
    Plan,
    bench_load,
    checks_of,
    load_text,
    phase_row,
    recovery_s,
)
from meiqa.errors import ServiceUnreachable
from tests.serve.conftest import Started, jpeg


def asked(status: int, took_ms: float, at_s: float = 0.0) -> Asked:
    return Asked(at_s, took_ms, status, written=status == 200, compared=4)


def test_a_phase_tells_in_time_from_late_refused_and_failed() -> None:
    done = [asked(200, 100.0)] * 6 + [asked(200, 900.0), asked(503, 4.0), asked(0, 1.0)]
    row = phase_row("80%", done, 2.0, 500.0, resident_mb=1.0)
    assert (row["goodput"], row["late"], row["refused"], row["errors"]) == (3.0, 1, 1, 1)
    assert row["p50_ms"] == 100.0
    assert row["refusal_p99_ms"] == 4.0
    assert (row["written"], row["neighbours"]) == (1.0, 4.0)


def test_a_phase_without_answers_has_no_quantiles() -> None:
    row = phase_row("300%", [asked(503, 4.0)], 1.0, 500.0)
    assert math.isnan(row["p99_ms"])
    assert row["goodput"] == 0.0


def test_recovery_ends_with_the_last_that_was_not_in_time() -> None:
    done = [asked(503, 1.0, 0.5), asked(200, 900.0, 1.2), asked(200, 10.0, 3.0)]
    assert recovery_s(done, 500.0) == 1.2
    assert recovery_s(done[2:], 500.0) == 0.0


def test_every_goal_can_be_missed() -> None:
    good = [asked(200, 100.0)] * 10
    bad = [asked(200, 900.0), asked(503, 80.0), asked(500, 1.0)]

    def row(done: list[Asked], resident_mb: float) -> dict[str, float]:
        return phase_row("", done, 1.0, 500.0, resident_mb=resident_mb)

    met = checks_of([row(good, 100.0)] * 4, 500.0, 0.5)
    assert all(met.values())
    missed = checks_of(
        [row(good, 100.0), row(bad, 100.0), row(bad, 900.0), row(bad, 900.0)], 500.0, 9.0
    )
    assert not any(missed.values())


def test_it_measures_a_service(started: Started) -> None:
    _, url = started()
    plan = Plan(budget_ms=2000.0, seconds=0.5, users=3, searches=2)
    result = asyncio.run(bench_load(url, [jpeg(seed) for seed in range(4)], plan))
    phases = [row["phase"] for row in result["rows"]]
    assert phases == ["no pauses", "search", "search", "capacity", "80%", "300%", "80% again"]
    assert result["rows"][0]["goodput"] > 0
    assert result["rows"][0]["resident_mb"] > 10
    text = load_text(result)
    assert "recovered after" in text
    assert text.count("met  ") + text.count("MISSED") == len(result["checks"])


def test_it_says_when_nothing_answers() -> None:
    with pytest.raises(ServiceUnreachable):
        asyncio.run(bench_load("http://127.0.0.1:9", [b""], Plan(seconds=0.1)))
