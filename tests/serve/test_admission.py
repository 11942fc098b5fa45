"""Who is let in and how long each may take, on a clock that the test turns."""

from __future__ import annotations

import pytest

from meiqa.errors import Overloaded
from meiqa.serve.admission import Admission, Estimate, Job, Pace


class Clock:
    """Milliseconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


LEAST, USUAL = 100.0, 400.0


def admission(clock: Clock, **options: float) -> Admission:
    pace = Pace(Estimate(LEAST / 1.15, clock), Estimate(USUAL / 1.15, clock))
    return Admission(clock, pace, **options)  # type: ignore[arg-type]


def later(clock: Clock) -> float:
    """Let so much time pass that what came before is not taken for a sign of more to come."""
    clock.now += 60_000.0
    return clock.now


def begun(queue: Admission, worker: int = 0) -> tuple[Job, float]:
    """Pick the next job and begin it."""
    job = queue.pick()
    assert job is not None
    return job, queue.begin(worker, job)


def test_who_is_alone_may_take_all_its_time() -> None:
    queue = admission(Clock())
    queue.offer(Job(1000.0))
    assert begun(queue)[1] == 1000.0


def test_those_behind_are_left_an_equal_share() -> None:
    clock = Clock()
    queue = admission(clock)
    for _ in range(4):
        queue.offer(Job(61_000.0))
    later(clock)
    assert begun(queue)[1] == pytest.approx(250.0)


def test_as_many_more_are_expected_as_came_lately() -> None:
    clock = Clock()
    queue = admission(clock)
    for _ in range(5):
        queue.offer(Job(1000.0))
    for _ in range(4):
        begun(queue)
    # Of five the four others, but in half the time that they are remembered for.
    assert begun(queue)[1] == pytest.approx(1000.0 / (1 + 2))
    later(clock)
    queue.offer(Job(61_000.0))
    assert begun(queue)[1] == pytest.approx(1000.0)


def test_nobody_is_given_less_than_the_least() -> None:
    queue = admission(Clock())
    for _ in range(10):
        queue.offer(Job(1000.0))
    clock_free = begun(queue)[1]
    assert clock_free == pytest.approx(LEAST)


def test_a_hurried_one_behind_limits_the_one_before_it() -> None:
    clock = Clock()
    queue = admission(clock)
    first = Job(65_000.0)
    queue.offer(first)
    assert queue.pick() is first  # in hand, when the hurried one comes
    queue.offer(Job(60_300.0))
    later(clock)
    assert queue.begin(0, first) == pytest.approx(150.0)


def test_who_would_be_late_is_refused_with_the_time_to_wait() -> None:
    queue = admission(Clock())
    for _ in range(5):
        queue.offer(Job(500.0))
    with pytest.raises(Overloaded) as refused:
        queue.offer(Job(500.0))
    assert refused.value.retry_after_s == pytest.approx(0.1)
    assert refused.value.retryable
    queue.offer(Job(600.0))


def test_who_would_make_another_late_is_refused() -> None:
    queue = admission(Clock())
    queue.offer(Job(200.0))
    queue.offer(Job(200.0))
    with pytest.raises(Overloaded):
        queue.offer(Job(150.0))  # in time itself, but not those that it would go before


def test_the_earliest_deadline_goes_first_and_equals_in_their_order() -> None:
    queue = admission(Clock())
    late, early, second = Job(2000.0), Job(1000.0), Job(1000.0)
    for job in (late, early, second):
        queue.offer(job)
    assert [begun(queue)[0] for _ in range(3)] == [early, second, late]


def test_what_is_under_way_counts_as_long_as_it_usually_takes() -> None:
    clock = Clock()
    queue = admission(clock)
    queue.offer(Job(60_000.0))
    begun(queue)
    with pytest.raises(Overloaded):
        queue.offer(Job(450.0))  # 400 for the one under way, and the least
    clock.now = 100.0
    queue.offer(Job(550.0))


def test_what_takes_longer_than_foreseen_is_taken_to_end_now() -> None:
    clock = Clock()
    queue = admission(clock)
    queue.offer(Job(60_000.0))
    begun(queue)
    clock.now = 5000.0
    queue.offer(Job(5150.0))


def test_who_is_alone_may_take_all_its_time_for_several_photos() -> None:
    queue = admission(Clock())
    queue.offer(Job(10_000.0, photos=50))
    assert begun(queue)[1] == 10_000.0


def test_a_ranking_counts_as_many_photos_as_it_has() -> None:
    queue = admission(Clock())
    queue.offer(Job(1000.0, photos=6))
    queue.offer(Job(1000.0, photos=2))
    with pytest.raises(Overloaded):
        queue.offer(Job(1000.0, photos=3))
    job, allowed_ms = begun(queue)
    assert (job.photos, allowed_ms) == (6, pytest.approx(600.0))


def test_two_engines_take_twice_as_much() -> None:
    queue = admission(Clock(), workers=2)
    for _ in range(10):
        queue.offer(Job(500.0))
    with pytest.raises(Overloaded):
        queue.offer(Job(500.0))
    assert begun(queue, worker=1)[1] == pytest.approx(100.0)


def test_only_so_many_wait() -> None:
    queue = admission(Clock(), capacity=2)
    queue.offer(Job(9000.0))
    queue.offer(Job(9000.0))
    with pytest.raises(Overloaded, match="too many"):
        queue.offer(Job(9000.0))


def test_a_reserve_makes_answers_fewer_and_better() -> None:
    queue = admission(Clock(), reserve_ms=250.0)
    for _ in range(4):
        queue.offer(Job(1000.0))
    with pytest.raises(Overloaded):
        queue.offer(Job(1000.0))
    assert begun(queue)[1] == pytest.approx(250.0)


def test_who_goes_away_is_forgotten_unless_in_hand() -> None:
    queue = admission(Clock())
    jobs = [Job(1000.0), Job(1000.0)]
    for job in jobs:
        queue.offer(job)
    assert queue.pick() is jobs[0]
    assert [queue.drop(job) for job in jobs] == [False, True]
    assert len(queue) == 1


def test_what_does_not_suit_waits_for_the_next_batch() -> None:
    queue = admission(Clock())
    job = Job(1000.0)
    queue.offer(job)
    assert queue.pick(lambda other: False) is None
    assert queue.pick() is job
    queue.put_back(job)
    assert queue.pick() is job


def test_an_idle_engine_tries_what_may_just_be_in_time_and_refuses_what_cannot() -> None:
    queue = admission(Clock())
    with pytest.raises(Overloaded):
        queue.offer(Job(0.4 * LEAST))
    queue.offer(Job(0.6 * LEAST))


def test_an_estimate_is_careful_where_times_vary() -> None:
    steady, varying = Estimate(100.0, Clock()), Estimate(100.0, Clock())
    for number in range(50):
        steady.observe(100.0)
        varying.observe(50.0 if number % 2 else 150.0)
    assert steady.careful_ms == pytest.approx(115.0)
    assert varying.careful_ms > 180.0


def test_a_bad_moment_is_forgotten() -> None:
    clock = Clock()
    estimate = Estimate(100.0, clock)
    for _ in range(20):
        estimate.observe(1000.0)
    assert estimate.careful_ms > 500.0
    clock.now = 10_000.0
    assert estimate.careful_ms == pytest.approx(115.0, rel=0.05)
