"""Who is admitted, who is next and how long each may take; the clock is turned by hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from meiqa.engine.budget import CostEstimate
from meiqa.errors import DecodeError, Overloaded, ServiceError
from meiqa.serve.access import Settings
from meiqa.serve.middleware import Metrics
from meiqa.serve.scheduler import Costs, Job, Queue, Scheduler
from meiqa.types import Assessment, Budget
from tests.serve.fakes import (
    Asked,
    FakeEngine,
    Simulation,
    StageCosts,
    grey,
)

LEAST, FULL = 100.0, 400.0
CAREFUL = 1.15


class Clock:
    """Milliseconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def queue_of(clock: Clock, reserve_ms: float | None = None, **options: int) -> Queue:
    """An empty queue, of photos that carefully take LEAST to FULL."""
    costs = Costs(reserve_ms)
    took_ms, least_ms = FULL / CAREFUL, LEAST / CAREFUL
    elastic = {"describe": took_ms - least_ms}
    found = Assessment("", 3.0, 0.4, (2.2, 3.8), 3.0, "fair", 50.0, "", timings_ms=elastic)
    costs.learn(Job(0.0, 0.0), found, took_ms, 0.0)
    return Queue(clock, costs, **options)


def job_due(deadline: float, photos: int = 1, **what: Any) -> Job:
    return Job(0.0, deadline, photos=photos, **what)


def taken(queue: Queue, worker: int = 0) -> Job:
    """Take the next job, with nothing else in hand."""
    job = queue.take(worker)
    assert job is not None
    queue.finish(worker)
    return job


def test_who_is_alone_may_take_all_its_time() -> None:
    queue = queue_of(Clock())
    queue.offer(job_due(1000.0))
    assert taken(queue).budget_ms == 1000.0
    queue.offer(job_due(10_000.0, photos=50))
    assert taken(queue).budget_ms == 10_000.0


def test_those_behind_wait_for_a_third_of_their_time_and_share_it() -> None:
    queue = queue_of(Clock())
    for _ in range(4):
        queue.offer(job_due(1500.0))
    assert taken(queue).budget_ms == pytest.approx(500.0 / 3)
    assert taken(queue).budget_ms == pytest.approx(500.0 / 2)
    assert taken(queue).budget_ms == pytest.approx(500.0)
    assert taken(queue).budget_ms == pytest.approx(1500.0)


def test_nobody_is_given_less_than_the_least() -> None:
    queue = queue_of(Clock())
    for _ in range(10):
        queue.offer(job_due(1000.0))
    assert taken(queue).budget_ms == pytest.approx(LEAST)


def test_who_would_be_late_is_refused_with_the_time_to_wait() -> None:
    queue = queue_of(Clock())
    for _ in range(5):
        queue.offer(job_due(500.0))
    with pytest.raises(Overloaded) as refused:
        queue.offer(job_due(500.0))
    assert refused.value.retry_after_s == pytest.approx(0.1)
    assert refused.value.retryable
    queue.offer(job_due(600.0))


def test_who_would_make_another_late_is_refused() -> None:
    queue = queue_of(Clock())
    queue.offer(job_due(200.0))
    queue.offer(job_due(200.0))
    with pytest.raises(Overloaded):
        queue.offer(job_due(150.0))  # in time itself, but not those that it would go before


def test_the_earliest_deadline_goes_first_and_equals_in_their_order() -> None:
    queue = queue_of(Clock())
    late, early, second = job_due(2000.0), job_due(1000.0), job_due(1000.0)
    for job in (late, early, second):
        queue.offer(job)
    assert [taken(queue) for _ in range(3)] == [early, second, late]


def test_what_is_under_way_counts_as_long_as_a_full_answer_takes() -> None:
    clock = Clock()
    queue = queue_of(clock)
    queue.offer(job_due(60_000.0))
    queue.take(0)
    with pytest.raises(Overloaded):
        queue.offer(job_due(450.0))  # 400 for the one under way, and the least
    clock.now = 100.0
    queue.offer(job_due(550.0))


def test_what_takes_longer_than_foreseen_is_taken_to_end_now() -> None:
    clock = Clock()
    queue = queue_of(clock)
    queue.offer(job_due(60_000.0))
    queue.take(0)
    clock.now = 5000.0
    queue.offer(job_due(5150.0))


def test_one_is_taken_ahead_and_gets_what_is_left_when_the_one_before_is_done() -> None:
    clock = Clock()
    queue = queue_of(clock)
    for _ in range(3):
        queue.offer(job_due(1500.0))
    assert queue.take(0) is not None
    ahead = queue.take(0)  # the first one should be done after 250 ms
    assert ahead is not None
    assert ahead.budget_ms == pytest.approx((1500.0 - 250.0) / 3)
    clock.now = 300.0
    queue.finish(0)
    assert ahead.begun == 300.0


def test_none_is_taken_ahead_that_another_engine_could_begin_with() -> None:
    queue = queue_of(Clock(), workers=2)
    jobs = [job_due(9000.0) for _ in range(3)]
    for job in jobs:
        queue.offer(job)
    assert queue.take(0) is jobs[0]
    assert queue.take(0) is jobs[1]
    assert queue.take(0) is None
    assert queue.take(1) is jobs[2]


def test_only_photos_are_taken_ahead() -> None:
    queue = queue_of(Clock())
    queue.offer(job_due(1000.0))
    queue.offer(job_due(2000.0, call=lambda engine, ms: None))
    assert queue.take(0) is not None
    assert queue.take(0) is None
    queue.finish(0)
    assert queue.take(0) is not None


def test_a_ranking_counts_as_many_photos_as_it_has() -> None:
    queue = queue_of(Clock())
    queue.offer(job_due(1000.0, photos=6))
    queue.offer(job_due(1000.0, photos=2))
    with pytest.raises(Overloaded):
        queue.offer(job_due(1000.0, photos=3))
    job = taken(queue)
    assert (job.photos, job.budget_ms) == (6, pytest.approx(600.0))


def test_two_engines_take_twice_as_much() -> None:
    queue = queue_of(Clock(), workers=2)
    for _ in range(10):
        queue.offer(job_due(500.0))
    with pytest.raises(Overloaded):
        queue.offer(job_due(500.0))
    assert taken(queue, worker=1).budget_ms == pytest.approx(LEAST)


def test_only_so_many_wait() -> None:
    queue = queue_of(Clock(), capacity=2)
    queue.offer(job_due(9000.0))
    queue.offer(job_due(9000.0))
    with pytest.raises(Overloaded, match="too many"):
        queue.offer(job_due(9000.0))


def test_a_reserve_makes_answers_fewer_and_better() -> None:
    queue = queue_of(Clock(), reserve_ms=250.0)
    for _ in range(4):
        queue.offer(job_due(1000.0))
    with pytest.raises(Overloaded):
        queue.offer(job_due(1000.0))
    assert taken(queue).budget_ms == pytest.approx(250.0)


def test_who_goes_away_is_forgotten() -> None:
    queue = queue_of(Clock(), workers=2)
    jobs = [job_due(1000.0), job_due(1000.0)]
    for job in jobs:
        queue.offer(job)
    assert queue.take(0) is jobs[0]
    for job in jobs:
        job.future.cancel()
    assert queue.take(1) is None
    assert len(queue) == 0


def test_an_idle_engine_tries_what_may_just_be_in_time_and_refuses_what_cannot() -> None:
    queue = queue_of(Clock())
    with pytest.raises(Overloaded):
        queue.offer(job_due(0.4 * LEAST))
    queue.offer(job_due(0.6 * LEAST))


def test_a_bad_moment_does_not_shut_an_idle_service_for_ever() -> None:
    simulation = Simulation(StageCosts(read_ms=20.0, text_ms=20.0, short_text_ms=5.0))
    simulation.engine.costs = StageCosts(read_ms=2000.0)
    slow = [simulation.ask(3000.0 * number, 9000.0) for number in range(9)]
    simulation.run()
    assert all(asked.in_time for asked in slow)
    simulation.engine.costs = StageCosts(read_ms=20.0)
    quick = [simulation.ask(500.0 * number, 300.0) for number in range(9)]
    simulation.run()
    assert all(asked.in_time for asked in quick)


def test_neighbours_asked_for_cost_what_they_cost() -> None:
    simulation = Simulation(StageCosts(read_ms=20.0, neighbour_ms=10.0), neighbours=4)
    simulation.ask(0.0, 20_000.0, k=100)
    simulation.run()
    simulation.ask(0.0, 20_000.0, k=100)
    refused = simulation.ask(10.0, 500.0)  # behind the 1,020 ms of the other
    simulation.run()
    assert isinstance(refused.result, Overloaded)


def test_an_estimate_is_careful_where_times_vary() -> None:
    steady, varying = CostEstimate(100.0), CostEstimate(100.0)
    for number in range(50):
        steady.observe(100.0)
        varying.observe(50.0 if number % 2 else 150.0)
    assert steady.careful == pytest.approx(115.0)
    assert varying.careful > 180.0


def in_time(asked: list[Asked]) -> float:
    return sum(each.in_time for each in asked) / len(asked)


def capacity_of(costs: StageCosts, neighbours: int, budget_ms: float, seconds: float) -> float:
    """The highest rate of photos at which 99 % are answered in time."""
    low, high, rate = 0.0, float("inf"), 20.0
    for seed in range(100, 109):
        simulation = Simulation(costs, neighbours)
        asked = simulation.ask_at_random(rate, seconds, budget_ms, seed)
        simulation.run()
        if in_time(asked) >= 0.99:
            low = rate
        else:
            high = rate
        rate = min(1.5 * rate, (low + high) / 2)
    return low


@pytest.mark.parametrize(
    ("neighbour_ms", "neighbours", "budget_ms", "spread"),
    [(0.0, 0, 1000.0, 0.1), (0.0, 0, 1000.0, 0.4), (0.0, 0, 500.0, 0.2), (3.6, 32, 1000.0, 0.2)],
)
def test_load_makes_answers_shorter_then_fewer_and_passes(
    neighbour_ms: float, neighbours: int, budget_ms: float, spread: float
) -> None:
    """At 80 % of the capacity texts stay; at 300 % goodput does, and what follows is as before."""
    seconds = 15.0
    costs = StageCosts(25.0, 17.0, 6.0, neighbour_ms, spread)
    capacity = capacity_of(costs, neighbours, budget_ms, seconds)
    simulation = Simulation(costs, neighbours)
    most = simulation.ask_at_random(0.8 * capacity, seconds, budget_ms, seed=0)
    simulation.run()
    over = simulation.ask_at_random(3.0 * capacity, seconds, budget_ms, seed=1)
    simulation.run(until_ms=simulation.now_ms + 1e3 * seconds)  # and with no pause behind it
    ended_ms = simulation.now_ms
    again = simulation.ask_at_random(0.8 * capacity, seconds, budget_ms, seed=2)
    simulation.run()

    answers = [each.result for each in most if isinstance(each.result, Assessment)]
    assert len(answers) == len(most)
    assert sum(answer.summary is not None for answer in answers) >= 0.8 * len(answers)
    assert np.percentile([each.took_ms for each in most], 99) <= budget_ms
    assert sum(each.in_time for each in over) / seconds >= 0.9 * capacity
    missed_ms = [each.at_ms - ended_ms for each in again if not each.in_time]
    assert max(missed_ms, default=0.0) <= 2000.0


def test_full_answers_turn_nobody_away_where_budgets_are_tight() -> None:
    simulation = Simulation(StageCosts(25.0, 17.0, 6.0, 3.6, 0.15))  # 157 ms of 300 for a full one
    asked = simulation.ask_at_random(8.0, 60.0, 300.0, seed=0)
    simulation.run()
    assert in_time(asked) >= 0.99
    seldom = simulation.ask_at_random(0.2, 300.0, 300.0, seed=1)
    simulation.run()
    full = [isinstance(each.result, Assessment) and not each.result.degraded for each in seldom]
    assert sum(full) >= 0.9 * len(full)


def test_a_photo_that_cannot_be_judged_fails_alone() -> None:
    simulation = Simulation(StageCosts(read_ms=20.0))
    asked = [simulation.ask(0.0, 5000.0, image=photo) for photo in (grey(9), b"broken", grey(9))]
    simulation.run()
    assert [type(each.result) for each in asked] == [Assessment, DecodeError, Assessment]


def test_an_engine_that_fails_takes_none_with_it_that_waits() -> None:
    simulation = Simulation(StageCosts(read_ms=20.0))
    asked = [simulation.ask(10.0 * number, 5000.0) for number in range(4)]
    simulation.engine.fails = RuntimeError("the model is gone")
    simulation.run(until_ms=simulation.now_ms + 1.0)
    simulation.engine.fails = None
    simulation.run()
    assert [type(each.result) for each in asked] == [RuntimeError, *[Assessment] * 3]


def test_a_hurried_request_overtakes_a_patient_one() -> None:
    simulation = Simulation(StageCosts(read_ms=50.0))
    patient = [simulation.ask(0.0, 9000.0) for _ in range(5)]
    hurried = simulation.ask(10.0, 400.0)
    simulation.run()
    ended_ms = sorted(each.at_ms + each.took_ms for each in patient)
    assert hurried.at_ms + hurried.took_ms < ended_ms[2]


def test_what_is_late_against_all_estimates_is_refused_and_not_worked_for() -> None:
    simulation = Simulation(StageCosts(read_ms=20.0))
    simulation.engine.costs = StageCosts(read_ms=250.0)  # much longer than measured
    asked = [simulation.ask(0.0, 300.0) for _ in range(6)]
    simulation.run()
    assert sum(isinstance(each.result, Overloaded) for each in asked) >= 3
    assert len(simulation.engine.given_ms) <= 3
    late = [each for each in asked if isinstance(each.result, Assessment) and not each.in_time]
    counted = simulation.metrics.registry.get_sample_value("meiqa_late_total")
    assert counted == len(late) > 0


def test_each_photo_is_scored_with_settings_of_its_own() -> None:
    simulation = Simulation(StageCosts(read_ms=20.0))
    for k, learn in ((1, False), (2, True), (1, True)):
        simulation.ask(0.0, 5000.0, k=k, learn=learn)
    simulation.run()
    assert simulation.engine.asked[-3:] == [
        ("grey", 1, False),
        ("grey", 2, True),
        ("grey", 1, True),
    ]


def test_the_time_of_one_taken_ahead_counts_from_its_turn() -> None:
    simulation = Simulation(StageCosts(read_ms=20.0))
    for _ in range(3):
        simulation.ask(0.0, 5020.0)
    simulation.run()
    assert simulation.engine.given_ms == pytest.approx(
        [5000.0 / 3 / 2, (5000.0 - 20.0) / 3, 5000.0 - 20.0 - 20.0], rel=1e-9
    )


def test_who_waits_is_answered_whatever_becomes_of_the_books(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(self: Metrics, result: Assessment) -> None:
        raise ValueError("no such label")

    simulation = Simulation(StageCosts(read_ms=20.0))
    monkeypatch.setattr(Metrics, "assessed", failing)
    asked = [simulation.ask(0.0, 5000.0) for _ in range(3)]
    simulation.run()
    assert all(each.in_time for each in asked)
    assert caplog.text.count("could not be entered into the books") == 3
    monkeypatch.undo()
    after = simulation.ask(0.0, 5000.0)
    simulation.run()
    assert isinstance(after.result, Assessment)
    assert "queue" in after.result.timings_ms  # the books are kept again


@asynccontextmanager
async def opened(*engines: FakeEngine) -> AsyncIterator[Scheduler]:
    """Give a scheduler with threads, whose engines take no time but can be held up."""
    scheduler = Scheduler(engines, Settings(budget_ms=60_000), Metrics())
    scheduler.start()
    for engine in engines:
        engine.forget()
    try:
        yield scheduler
    finally:
        for engine in engines:
            engine.close()
        await asyncio.to_thread(scheduler.close)


def with_threads(check: Callable[[Scheduler, FakeEngine], Awaitable[None]]) -> None:
    """Run a check of a scheduler with one engine."""

    async def run() -> None:
        engine = FakeEngine()
        async with opened(engine) as scheduler:
            await check(scheduler, engine)

    asyncio.run(run())


def test_who_goes_away_is_not_worked_for() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.open.clear()
        tasks = [asyncio.create_task(scheduler.score(grey(level))) for level in range(8)]
        await asyncio.to_thread(engine.begun.wait)
        for task in tasks[3:]:
            task.cancel()
        await asyncio.gather(*tasks[3:], return_exceptions=True)
        engine.open.set()
        assert all(isinstance(each, Assessment) for each in await asyncio.gather(*tasks[:3]))
        await scheduler.score(grey(9))
        assert len(engine.asked) == 4

    with_threads(check)


def test_closing_finishes_what_was_accepted_and_takes_no_more() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        engine.open.clear()
        tasks = [asyncio.create_task(scheduler.score(grey(level))) for level in range(5)]
        await asyncio.to_thread(engine.begun.wait)
        closing = asyncio.create_task(asyncio.to_thread(scheduler.close))
        while scheduler.ready:
            await asyncio.sleep(0)
        with pytest.raises(ServiceError, match="ending"):
            await scheduler.score(b"")
        engine.open.set()
        assert len(await asyncio.gather(*tasks)) == 5
        await closing

    with_threads(check)


def test_two_engines_work_at_once() -> None:
    async def run() -> None:
        both = threading.Barrier(2)
        engines = [FakeEngine(), FakeEngine()]
        async with opened(*engines) as scheduler:
            for engine in engines:
                engine.spend = lambda ms: both.wait() and None
            await asyncio.gather(*(scheduler.score(grey(level)) for level in range(2)))

    asyncio.run(run())


def test_other_work_goes_through_the_same_queue() -> None:
    async def check(scheduler: Scheduler, engine: FakeEngine) -> None:
        assert await scheduler.run(lambda served, _: served is engine) is True
        with pytest.raises(ZeroDivisionError):
            await scheduler.run(lambda served, _: 1 / 0)

    with_threads(check)


def test_a_set_is_given_what_each_of_its_photos_may_cost() -> None:
    simulation = Simulation(StageCosts(read_ms=20.0))
    given: list[Budget] = []
    simulation.ask(0.0, 3020.0, photos=3, call=lambda engine, budget: given.append(budget))
    simulation.run()
    assert given == [Budget(ms=1000.0)]
