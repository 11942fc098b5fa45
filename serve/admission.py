"""Who is let in, who is next, and how long each may take: a queue that keeps deadlines.

A photo bears more work or less (`meiqa.engine.planning`), so a queue that grows costs quality
before it costs answers. Three rules, all of them arithmetic on deadlines:

1. A job is let in if, were everybody given the least, it and all behind it would be in time.
   Otherwise it is refused at once, with the time after which it is worth asking again.
2. The earliest deadline goes first.
3. Whoever is taken up gets an equal share of the time that is left to each of those behind it, and
   to as many more as the last seconds brought, but never less than the least: with nobody behind
   and nobody before, all that its own deadline leaves.

Nothing here knows threads, photos or the true time: `Desk` has the lock, and the clock is given.
Times are milliseconds on that clock.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from meiqa.errors import Overloaded

__all__ = ["Admission", "Arrivals", "Clock", "Estimate", "Job", "Pace", "overloaded"]

Clock = Callable[[], float]
_numbers = itertools.count()


class Estimate:
    """What something takes: a mean, carefully above it by the spread that was seen.

    What was seen in a bad moment is forgotten while nothing is seen: with every second the estimate
    goes half of its way back to the best that was seen. Otherwise an estimate by which everything
    is refused would never be mended.
    """

    _WEIGHT = 0.2
    _DEVIATIONS = 2.5
    _HEADROOM = 1.15
    _HALF_LIFE_MS = 1000.0

    def __init__(self, first_ms: float, clock: Clock) -> None:
        self._clock = clock
        self._best = self._mean = first_ms
        self._spread = 0.0
        self._seen = clock()

    def observe(self, ms: float) -> None:
        """Learn from one more; one that took ages does not count as more than twice as long."""
        self._mean, self._spread = self._now()
        off = max(-1.0, min(1.0, ms / self._mean - 1.0)) * self._mean if self._mean else ms
        self._mean += self._WEIGHT * off
        self._spread += self._WEIGHT * (abs(off) - self._spread)
        self._best = min(self._best, ms)
        self._seen = self._clock()

    @property
    def careful_ms(self) -> float:
        """Milliseconds that it should not exceed."""
        mean, spread = self._now()
        return max(mean * self._HEADROOM, mean + self._DEVIATIONS * spread)

    def _now(self) -> tuple[float, float]:
        kept = 0.5 ** ((self._clock() - self._seen) / self._HALF_LIFE_MS)
        return self._best + kept * (self._mean - self._best), kept * self._spread


class Arrivals:
    """How many photos came lately, each fading as it ages."""

    _WINDOW_MS = 2000.0

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._recent = 0.0
        self._seen = clock()

    def note(self, photos: int) -> None:
        """Count photos that came now, whether they are let in or not."""
        self._recent = self._now() + photos
        self._seen = self._clock()

    def expected(self, within_ms: float, at_hand: int) -> float:
        """Give how many more may come, looking no further ahead than one looks back.

        Those at hand came lately themselves, and are no sign of others.
        """
        ahead = min(1.0, max(0.0, within_ms / self._WINDOW_MS))
        return max(0.0, self._now() - at_hand) * ahead

    def _now(self) -> float:
        return self._recent * math.exp(-(self._clock() - self._seen) / self._WINDOW_MS)


@dataclass
class Pace:
    """How fast this machine is with one photo.

    Attributes:
        least: with the least that is worth doing.
        usual: with everything that the time allows.
    """

    least: Estimate
    usual: Estimate


@dataclass(eq=False)
class Job:
    """Something that waits for an engine.

    Attributes:
        deadline: when its answer has to be there.
        photos: how many it is about.
        picked: an engine has it in hand, but has not begun.
    """

    deadline: float
    photos: int = 1
    picked: bool = False
    number: int = field(default_factory=_numbers.__next__)

    def __lt__(self, other: Job) -> bool:
        return (self.deadline, self.number) < (other.deadline, other.number)


class Admission:
    """The queue of one service.

    Args:
        pace: what photos take; who works tells it.
        workers: engines that work at once.
        capacity: jobs that may wait.
        reserve_ms: least time for a photo, if more than the pace's.
    """

    def __init__(
        self,
        clock: Clock,
        pace: Pace,
        *,
        workers: int = 1,
        capacity: int = 256,
        reserve_ms: float | None = None,
    ) -> None:
        self._clock = clock
        self._pace = pace
        self._capacity = capacity
        self._reserve_ms = reserve_ms or 0.0
        self._arrivals = Arrivals(clock)
        self._waiting: list[Job] = []  # by deadline
        self._free_at = dict.fromkeys(range(workers), 0.0)
        self._busy: set[int] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def least_ms(self) -> float:
        """Milliseconds that are kept for every photo that waits."""
        return max(self._reserve_ms, self._pace.least.careful_ms)

    def offer(self, job: Job) -> None:
        """Let a job in.

        Raises:
            Overloaded: it, or one behind it, would be late; `retry_after_s` says when to ask again.
        """
        self._arrivals.note(job.photos)
        late_ms = self._late_ms(job)
        if late_ms > 0:
            raise overloaded("an answer would come too late", late_ms)
        if len(self._waiting) >= self._capacity:
            raise overloaded("too many requests wait", self.least_ms * self._capacity)
        insort(self._waiting, job)

    def pick(self, suits: Callable[[Job], bool] = lambda job: True) -> Job | None:
        """Give the job that is next, if it suits; it waits in hand until it is begun."""
        job = next((job for job in self._waiting if not job.picked), None)
        if job is None or not suits(job):
            return None
        job.picked = True
        return job

    def expired(self) -> list[Job]:
        """Take out the jobs whose deadline passed while they waited, against all estimates."""
        now = self._clock()
        late = [job for job in self._waiting if job.deadline <= now and not job.picked]
        for job in late:
            self._waiting.remove(job)
        return late

    def put_back(self, job: Job) -> None:
        """Leave a job that was picked to whoever comes next."""
        job.picked = False

    def begin(self, worker: int, job: Job) -> float:
        """Take a job up; give the milliseconds that it may take."""
        self._waiting.remove(job)
        now, least_ms = self._clock(), self.least_ms
        share_ms, photos = self._share_ms(job.deadline - now, job, job.photos), job.photos
        for behind in self._waiting:
            photos += behind.photos
            share_ms = min(share_ms, self._share_ms(behind.deadline - now, job, photos))
        allowed_ms = max(least_ms * job.photos, share_ms)
        usual_ms = self._pace.usual.careful_ms * job.photos
        self._free_at[worker] = now + min(allowed_ms, usual_ms)
        self._busy.add(worker)
        return allowed_ms

    def _share_ms(self, left_ms: float, job: Job, photos: int) -> float:
        """Give a job's part of the time that is left to photos, and to those that may come."""
        most_ms, engines = job.deadline - self._clock(), len(self._free_at)
        expected = self._arrivals.expected(left_ms, job.photos)
        return min(most_ms, left_ms * engines * job.photos / (photos + expected))

    def finish(self, worker: int) -> None:
        """Note that an engine is free."""
        self._free_at[worker] = self._clock()
        self._busy.discard(worker)

    def drop(self, job: Job) -> bool:
        """Forget a job that nobody waits for any more; False if it is in hand already."""
        if job.picked or job not in self._waiting:
            return False
        self._waiting.remove(job)
        return True

    def _late_ms(self, job: Job) -> float:
        """By how much the job, or one behind it, would be late with the least for everybody."""
        if not self._waiting and not self._busy:
            # With nothing else to do, a photo that may just be in time is tried, and teaches.
            return self._clock() + self._pace.least.careful_ms * job.photos / 2 - job.deadline
        now = self._clock()
        free_at = [max(now, at) for at in self._free_at.values()]
        heapq.heapify(free_at)
        late_ms = 0.0
        for each in self._with(job):
            ends = free_at[0] + self.least_ms * each.photos
            heapq.heapreplace(free_at, ends)
            # Those before it are late, if they are, through no fault of this one.
            if each is job or job < each:
                late_ms = max(late_ms, ends - each.deadline)
        return late_ms

    def _with(self, job: Job) -> Iterator[Job]:
        return heapq.merge(self._waiting, [job])


def overloaded(what: str, wait_ms: float) -> Overloaded:
    """Say when it is worth asking again."""
    error = Overloaded(what, hint=f"ask again in {wait_ms:.0f} ms, or allow more time: budget_ms")
    error.retry_after_s = wait_ms / 1e3
    return error
