"""A budget is planned from measured costs and given up in the package's order."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meiqa.engine.budget import (
    CostEstimate,
    CostModel,
    Deadline,
    PairTime,
    Plan,
    costs_file,
    degraded_plans,
    plan_work,
)
from meiqa.engine.model import GenerationStats
from meiqa.testing import FakeClock, FakeModel
from meiqa.types import Budget

WHOLE = Plan(96, 8)
ORDERS = list(itertools.permutations(("text", "neighbours", "orders")))
TEXT_FIRST = ("text", "neighbours", "orders")
orders = pytest.mark.parametrize("order", ORDERS, ids="-".join)


def costs(
    token: float = 2.0,
    summary_tokens: float = 40.0,
    pair: float = 3.0,
    grade: float = 4.0,
    rest: float = 0.0,
) -> CostModel:
    known = (token, summary_tokens, pair, grade, rest)
    return CostModel(*(CostEstimate(each) for each in known))


@orders
def test_no_limit_no_loss(order: tuple[str, ...]) -> None:
    assert plan_work(WHOLE, order, None, costs()) == WHOLE
    assert plan_work(WHOLE, order, 1e9, costs()) == WHOLE
    assert WHOLE.losses(WHOLE) == ()


def stages(order: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Text, neighbours and orders of a whole plan's lesser versions, each stage once."""
    found = (
        (
            "full" if plan.summary_tokens == 96 else "short" if plan.summary_tokens else "none",
            "all" if plan.neighbours == 8 else "few" if plan.neighbours >= 4 else "fewer",
            "both" if plan.both_orders else "one",
        )
        for plan in degraded_plans(WHOLE, order)
    )
    return [stage for stage, _ in itertools.groupby(found)]


def test_the_order_of_degradation_is_the_packages() -> None:
    assert stages(("text", "neighbours", "orders")) == [
        ("full", "all", "both"),
        ("short", "all", "both"),
        ("none", "all", "both"),
        ("none", "few", "both"),
        ("none", "few", "one"),
        ("none", "fewer", "one"),
    ]
    assert stages(("orders", "neighbours", "text")) == [
        ("full", "all", "both"),
        ("full", "all", "one"),
        ("full", "few", "one"),
        ("full", "fewer", "one"),
        ("short", "fewer", "one"),
        ("none", "fewer", "one"),
    ]
    assert stages(("neighbours", "text", "orders")) == [
        ("full", "all", "both"),
        ("full", "few", "both"),
        ("full", "fewer", "both"),
        ("short", "fewer", "both"),
        ("none", "fewer", "both"),
    ]


@orders
@pytest.mark.parametrize("k", [0, 1, 4, 5, 32])
def test_each_plan_costs_less_than_the_one_before_and_all_is_given_up_in_the_end(
    order: tuple[str, ...], k: int
) -> None:
    plans = list(degraded_plans(Plan(96, k), order))
    taken = [costs(rest=1.0).of(plan) for plan in plans]
    assert all(later < earlier for earlier, later in itertools.pairwise(taken))
    assert (plans[-1].summary_tokens, plans[-1].neighbours) == (0, 0)
    for one, other in itertools.pairwise(plans):
        assert other.summary_tokens <= one.summary_tokens
        assert other.neighbours <= one.neighbours
        assert other.both_orders <= one.both_orders


@orders
@pytest.mark.parametrize("k", [0, 8])
def test_every_loss_is_named(order: tuple[str, ...], k: int) -> None:
    whole = Plan(96, k)
    for plan in degraded_plans(whole, order):
        losses = plan.losses(whole)
        assert ("no summary" in losses) == (plan.summary_tokens == 0)
        assert ("shorter summary" in losses) == (0 < plan.summary_tokens < 96)
        assert ("initial score only" in losses) == (plan.neighbours == 0 < k)
        assert ("one order" in losses) == (plan.neighbours > 0 and not plan.both_orders)
        some = f"{plan.neighbours} of {k} neighbours"
        assert (some in losses) == (0 < plan.neighbours < k)
        assert bool(losses) == (plan != whole)


@orders
@pytest.mark.parametrize("remaining_ms", [0.0, 0.1, -50.0])
@pytest.mark.parametrize("k", [0, 1, 32])
def test_too_little_for_anything(order: tuple[str, ...], remaining_ms: float, k: int) -> None:
    whole = Plan(96, k)
    plan = plan_work(whole, order, remaining_ms, costs())
    assert (plan.summary_tokens, plan.neighbours) == (0, 0)
    assert plan.losses(whole) == ("no summary", *["initial score only"] * (k > 0))


@given(
    order=st.sampled_from(ORDERS),
    k=st.integers(0, 40),
    remaining_ms=st.floats(0, 2000),
    token=st.floats(0.01, 20),
    pair=st.floats(0.01, 50),
)
def test_the_first_plan_that_fits_is_taken(
    order: tuple[str, ...], k: int, remaining_ms: float, token: float, pair: float
) -> None:
    known = costs(token=token, pair=pair)
    plan = plan_work(Plan(96, k), order, remaining_ms, known)
    better = itertools.takewhile(lambda p: p != plan, degraded_plans(Plan(96, k), order))
    assert all(known.of(p) > remaining_ms for p in better)
    assert known.of(plan) <= remaining_ms or (plan.summary_tokens, plan.neighbours) == (0, 0)


@orders
def test_more_time_buys_more(order: tuple[str, ...]) -> None:
    plans = [plan_work(WHOLE, order, ms, costs()) for ms in (30, 60, 120, 200, 400)]
    taken = [costs().of(plan) for plan in plans]
    assert taken == sorted(taken)
    assert taken[0] < taken[-1]
    assert plans[-1] == WHOLE


def test_costs_move_towards_what_is_measured() -> None:
    cost = CostEstimate(3.0)
    for _ in range(30):
        before = cost.expected
        cost.observe(10.0)
        assert before < cost.expected < 10.0
    assert cost.expected == pytest.approx(10.0, abs=0.01)


def test_the_first_measurement_is_taken_as_it_is() -> None:
    cost = CostEstimate()
    cost.observe(7.0)
    assert cost == CostEstimate(7.0, 0.0)


def test_a_slower_machine_plans_less() -> None:
    known = costs()
    before = plan_work(WHOLE, TEXT_FIRST, 160, known)
    for _ in range(10):
        known.pair.observe(30.0)
    after = plan_work(WHOLE, TEXT_FIRST, 160, known)
    assert len(after.losses(WHOLE)) > len(before.losses(WHOLE))


def test_what_varies_is_planned_with_more_headroom() -> None:
    steady, wild = CostEstimate(3.0), CostEstimate(3.0)
    for turn in range(20):
        steady.observe(3.0)
        wild.observe(1.0 if turn % 2 else 5.0)
    assert steady.careful == pytest.approx(1.15 * 3.0)
    assert wild.careful > 1.5 * wild.expected
    known = CostModel(pair=steady)
    assert known.of_pairs(WHOLE, 8) == pytest.approx(1.15 * 8 * 2 * 3.0)


def test_a_hiccup_is_forgotten() -> None:
    cost = CostEstimate(4.0)
    cost.observe(400.0)
    assert cost.expected < 8.0
    for _ in range(30):
        cost.observe(4.0)
    assert cost.careful == pytest.approx(1.15 * 4.0, rel=0.05)


def test_a_photo_teaches_what_it_took() -> None:
    known = CostModel(token=CostEstimate(2.0), grade=CostEstimate(4.0), pair=CostEstimate(3.0))
    taken = {"describe": 64.0, "retrieve": 1.0, "compare": 80.0, "fuse": 0.5, "patterns": 2.0}
    for _ in range(40):
        known.observe(taken, WHOLE, GenerationStats(20, complete=True), compared=8)
    assert known.token.expected == pytest.approx(60 / 20, rel=1e-3)
    assert known.summary_tokens.expected == 20
    assert known.pair.expected == pytest.approx(80 / 16, rel=1e-3)
    assert known.rest.expected == 3.5
    assert known.grade == CostEstimate(4.0)


def test_what_was_not_done_teaches_nothing() -> None:
    known = costs()
    known.observe({"describe": 6.0}, Plan(0, 0), GenerationStats(), compared=0)
    assert (known.token, known.pair) == (CostEstimate(2.0), CostEstimate(3.0))
    assert known.grade.expected > 4.0
    cut = costs()
    cut.observe({"describe": 6.0}, Plan(16, 0), GenerationStats(16, complete=False), compared=0)
    assert cut.summary_tokens == CostEstimate(40.0)
    assert cut.grade == CostEstimate(4.0)


def test_a_wave_is_as_large_as_can_be_paid() -> None:
    known = costs(rest=1.0)
    one_ms = known.of_pairs(WHOLE, 1)
    assert known.affordable(WHOLE, 1000.0) == 8
    assert known.affordable(WHOLE, 3.5 * one_ms + 2.0) == 3
    assert known.affordable(WHOLE, 0.5 * one_ms) == 0
    assert known.affordable(WHOLE, -10.0) == 0


def test_pairs_of_a_set_are_as_many_as_can_be_paid() -> None:
    clock, known = FakeClock(), costs()
    time = PairTime(Deadline(Budget(ms=20.0), clock=clock), known)
    assert time.affordable == 2
    clock.advance(12.0)
    assert time.affordable == 1
    clock.advance(12.0)
    assert time.affordable == 0
    assert PairTime(Deadline(), known).affordable > 10**6


def test_writing_leaves_time_for_a_rating_and_a_few_comparisons() -> None:
    known = costs(rest=1.0)
    needed_ms = known.writing_reserve_ms(WHOLE)
    assert needed_ms > 4 * 2 * 3.0 + 16 * 2.0 + 1.0
    assert needed_ms < known.of(WHOLE)


def test_a_deadline_times_stages_that_fail_too() -> None:
    clock = FakeClock()
    deadline = Deadline(Budget(ms=1000), clock=clock)

    def fail() -> None:
        clock.advance(250)
        raise KeyError

    with pytest.raises(KeyError), deadline.stage("decode"):
        fail()
    assert deadline.timings_ms == {"decode": pytest.approx(250)}
    assert deadline.elapsed_ms == pytest.approx(250)
    assert deadline.remaining_ms == pytest.approx(750)
    assert Deadline(Budget(), clock=clock).remaining_ms is None


def test_a_reserve_is_kept_and_without_a_limit_nothing_stops() -> None:
    clock = FakeClock()
    stop = Deadline(Budget(ms=100), clock=clock).stop_with(30.0)
    assert not stop()
    clock.advance(69)
    assert not stop()
    clock.advance(2)
    assert stop()
    assert not Deadline(clock=clock).stop_with(1e9)()


def test_costs_are_measured_on_a_blank_photo() -> None:
    clock = FakeClock()
    ms = {"encode": 50.0, "prefill": 10.0, "token": 2.0, "grade": 4.0, "pair": 3.0}
    found = CostModel.measure(FakeModel(clock=clock, ms=ms), clock)
    assert found.token.expected == pytest.approx(2.0)
    assert found.summary_tokens.expected == 12.0
    assert found.grade.expected == pytest.approx(4.0)
    assert found.pair.expected == pytest.approx(3.0 + 10.0 / 2)  # half of them are read anew
    assert found.rest == CostEstimate()


def test_costs_are_kept_between_processes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "costs.json"
    assert CostModel.read(path) is None
    known = costs()
    known.pair.observe(5.0)
    known.write(path)
    assert CostModel.read(path) == known
    assert [each.name for each in path.parent.iterdir()] == ["costs.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "3", '{"token": 1}', '{"token_ms": 2, "pair_ms": 3}']
)
def test_costs_of_another_version_are_measured_anew(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    assert CostModel.read(path) is None
    assert str(path) in caplog.text


def test_costs_are_kept_apart_for_each_package_device_and_number_of_threads() -> None:
    places = {
        costs_file(digest, device, threads)
        for digest in ("a" * 64, "b" * 64)
        for device in ("cpu", "cuda")
        for threads in (1, 2)
    }
    assert len(places) == 8
