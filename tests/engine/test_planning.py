"""A budget is planned from measured costs and given up in the declared order."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from meiqa.engine.planning import (
    CostModel,
    Plan,
    Stopwatch,
    costs_file,
    degraded_plans,
    most_telling,
    plan_work,
    read_costs,
    write_costs,
)
from meiqa.types import Budget

COSTS = CostModel(token_ms=2.0, summary_tokens=40.0, pair_ms=3.0, grade_ms=4.0)
WHOLE = Plan(96, 8, both_orders=True)


def test_no_limit_no_loss() -> None:
    assert plan_work(8, 96, None, COSTS) == WHOLE
    assert plan_work(8, 96, 1e9, COSTS) == WHOLE


def test_the_order_of_degradation() -> None:
    """Shorter summary, no summary, fewer neighbours, one order."""
    plans = list(degraded_plans(WHOLE))
    assert plans[0] == WHOLE
    stages = [
        key
        for key, _ in itertools.groupby(
            (
                "full" if p.summary_tokens == 96 else "short" if p.summary_tokens else "none",
                p.neighbours == 8 or not p.both_orders,
                p.both_orders,
            )
            for p in plans
        )
    ]
    assert stages == [
        ("full", True, True),
        ("short", True, True),
        ("none", True, True),
        ("none", False, True),
        ("none", True, False),
    ]
    fewer = [p.neighbours for p in plans if p.both_orders and p.summary_tokens == 0]
    assert fewer == [8, 7, 6, 5, 4]
    assert [p.neighbours for p in plans if not p.both_orders] == [8, 7, 6, 5, 4, 3, 2, 1]


def test_every_loss_is_named() -> None:
    for plan in degraded_plans(WHOLE):
        assert ("no summary" in plan.degraded) == (plan.summary_tokens == 0)
        assert ("shorter summary" in plan.degraded) == (0 < plan.summary_tokens < 96)
        assert ("one order" in plan.degraded) == (not plan.both_orders)
        if plan.neighbours < 8:
            assert f"{plan.neighbours} of 8 neighbours" in plan.degraded


@pytest.mark.parametrize("remaining_ms", [0.0, 0.1, -50.0])
@pytest.mark.parametrize("k", [0, 1, 32])
def test_too_little_for_anything(remaining_ms: float, k: int) -> None:
    plan = plan_work(k, 96, remaining_ms, COSTS)
    assert (plan.summary_tokens, plan.neighbours) == (0, 0)
    assert "initial score only" in plan.degraded


@given(
    k=st.integers(0, 40),
    remaining_ms=st.floats(0, 2000),
    token_ms=st.floats(0.01, 20),
    pair_ms=st.floats(0.01, 50),
)
def test_the_first_plan_that_fits_is_taken(
    k: int, remaining_ms: float, token_ms: float, pair_ms: float
) -> None:
    costs = CostModel(token_ms, 40.0, pair_ms, grade_ms=3.0)
    plan = plan_work(k, 96, remaining_ms, costs)
    better = list(itertools.takewhile(lambda p: p != plan, degraded_plans(Plan(96, k, True))))
    assert all(costs.of(p) > remaining_ms for p in better)
    assert costs.of(plan) <= remaining_ms or "initial score only" in plan.degraded


def test_more_time_buys_more() -> None:
    spans = (30, 60, 120, 200, 400)
    plans = [plan_work(8, 96, span, COSTS) for span in spans]
    pairs = [p.neighbours * (1 + p.both_orders) for p in plans]
    assert pairs == sorted(pairs)
    assert pairs[0] < pairs[-1]
    assert plans[-1] == WHOLE


def test_costs_move_towards_what_is_measured() -> None:
    costs = CostModel(2.0, 40.0, 3.0, 4.0)
    for _ in range(30):
        before = costs.pair_ms
        costs.observe("pair_ms", 10.0)
        assert before < costs.pair_ms < 10.0
    assert costs.pair_ms == pytest.approx(10.0, abs=0.01)
    assert (costs.token_ms, costs.summary_tokens, costs.grade_ms) == (2.0, 40.0, 4.0)


def test_a_slower_machine_plans_less() -> None:
    costs = CostModel(2.0, 40.0, 3.0, 4.0)
    before = plan_work(8, 96, 160, costs)
    costs.observe("pair_ms", 30.0)
    after = plan_work(8, 96, 160, costs)
    assert len(after.degraded) > len(before.degraded)


def test_the_stopwatch_times_stages_that_fail_too() -> None:
    clock = Stopwatch(Budget(ms=1000))
    with pytest.raises(KeyError), clock.stage("decode"):
        raise KeyError
    assert clock.timings_ms["decode"] >= 0
    assert clock.remaining_ms is not None
    assert clock.remaining_ms < 1000
    assert Stopwatch(Budget()).remaining_ms is None


def test_what_varies_is_planned_with_more_headroom() -> None:
    steady, wild = CostModel(2.0, 40.0, 3.0, 4.0), CostModel(2.0, 40.0, 3.0, 4.0)
    for turn in range(20):
        steady.observe("pair_ms", 3.0)
        wild.observe("pair_ms", 1.0 if turn % 2 else 5.0)
    assert steady.of_wave(WHOLE, 8) == pytest.approx(1.15 * 8 * 2 * 3.0)
    assert wild.of_wave(WHOLE, 8) > 1.5 * 8 * 2 * wild.pair_ms


def test_a_hiccup_is_forgotten() -> None:
    costs = CostModel(2.0, 40.0, 3.0, 4.0)
    costs.observe("grade_ms", 400.0)
    for _ in range(30):
        costs.observe("grade_ms", 4.0)
    assert costs.of(Plan(0, 0, both_orders=False)) == pytest.approx(1.15 * 4.0, rel=0.05)


def test_a_wave_is_as_large_as_can_be_paid() -> None:
    costs = CostModel(2.0, 40.0, 3.0, 4.0, rest_ms=1.0)
    one_ms = costs.of_wave(WHOLE, 1)
    assert costs.affordable(WHOLE, 1000.0) == 8
    assert costs.affordable(WHOLE, 3.5 * one_ms + 2.0) == 3
    assert costs.affordable(WHOLE, 0.5 * one_ms) == 0
    assert costs.affordable(WHOLE, -10.0) == 0


def test_writing_leaves_time_for_a_rating_and_a_few_comparisons() -> None:
    costs = CostModel(2.0, 40.0, 3.0, 4.0, rest_ms=1.0)
    needed_ms = costs.writing_ends_ms(WHOLE)
    assert needed_ms > 4 * 2 * 3.0 + 16 * 2.0 + 1.0
    assert needed_ms < costs.of(WHOLE)


def test_the_nearest_in_score_tell_most_when_all_are_known_alike() -> None:
    scores = np.array([1.0, 2.9, 4.5, 3.3, 2.0])
    stds, unasked = np.full(5, 0.2), np.full(5, np.nan)
    assert most_telling(3.0, 0.3, scores, stds, unasked, 0.6, 3).tolist() == [1, 3, 4]


def test_a_neighbour_whose_own_score_is_vague_tells_less() -> None:
    scores, stds = np.array([3.0, 3.3]), np.array([2.0, 0.1])
    assert most_telling(3.0, 0.3, scores, stds, np.full(2, np.nan), 0.6, 1).tolist() == [1]


def test_who_was_asked_is_not_asked_again() -> None:
    preferences = np.array([np.nan, 0.5, np.nan])
    scores, stds = np.array([1.0, 3.0, 5.0]), np.full(3, 0.2)
    assert set(most_telling(3.0, 0.3, scores, stds, preferences, 0.6, 8).tolist()) == {0, 2}
    assert most_telling(3.0, 0.3, scores, stds, np.full(3, 0.5), 0.6, 8).tolist() == []


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), std=st.floats(0.1, 1.5))
def test_the_chosen_shrink_the_variance_most(seed: int, std: float) -> None:
    """No neighbour that was passed over is expected to add clearly more to the curvature."""
    random = np.random.default_rng(seed)
    scores, stds = random.uniform(1, 5, 12), random.uniform(0, 0.5, 12)
    believed = 3.0 + std * random.standard_normal(4000)
    widths = np.hypot(0.6, stds)
    z = (believed[:, None] - scores) / widths
    density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    added = (density**2 / np.maximum(ndtr(z) * ndtr(-z), 1e-300) / widths**2).mean(axis=0)
    chosen = most_telling(3.0, std, scores, stds, np.full(12, np.nan), 0.6, 4)
    passed = np.setdiff1d(np.arange(12), chosen)
    assert added[passed].max() <= 1.35 * added[chosen].min()


def test_costs_are_kept_between_processes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "costs.json"
    assert read_costs(path) is None
    costs = CostModel(2.0, 40.0, 3.0, 4.0, 1.0, {"pair_ms": 0.1})
    write_costs(costs, path)
    assert read_costs(path) == costs
    assert [each.name for each in path.parent.iterdir()] == ["costs.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"token_ms": 1}'])
def test_costs_of_another_version_are_measured_anew(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    assert read_costs(path) is None
    assert str(path) in caplog.text


def test_costs_are_kept_apart_for_each_package_device_and_number_of_threads() -> None:
    places = {
        costs_file(digest, device, threads)
        for digest in ("a" * 64, "b" * 64)
        for device in ("cpu", "cuda")
        for threads in (1, 2)
    }
    assert len(places) == 8
