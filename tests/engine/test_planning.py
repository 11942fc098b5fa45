"""A budget is planned from measured costs and given up in the declared order."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meiqa.engine.planning import CostModel, Plan, Stopwatch, degraded_plans, plan_work
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
