"""Requests wait here for an engine: who is admitted, who is next, and how long each may take.

A photo bears more work or less (`meiqa.engine.budget`), so requests degrade before they are shed:

1. A request is admitted if, were every photo given the least, it and all behind it would be in
   time. Otherwise it is shed at once, with the time after which it is worth asking again.
2. The earliest deadline goes first.
3. Whoever is taken up may use all that its deadline leaves, as long as those behind it, and those
   who may come while it is at work, wait for at most a third of their time. What goes beyond is
   shared out evenly among the photos, and nobody is given less than the least. The rest is for
   bursts, which make answers shorter and turn nobody away.

The event loop never waits for an engine: it submits a job and awaits a future. Each engine has a
thread, which takes what waits as one batch, so that the next photo is decoded while one is scored;
every answer goes out as soon as it is there, and is what the photo would get alone.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from meiqa.engine.budget import CostEstimate
from meiqa.engine.engine import Engine
from meiqa.engine.scoring import ScoreRequest
from meiqa.errors import MeiqaError, Overloaded, ServiceError
from meiqa.serve.access import Settings
from meiqa.serve.middleware import Metrics
from meiqa.types import Assessment, Budget, Failure

LOG = logging.getLogger(__name__)
T = TypeVar("T")
Clock = Callable[[], float]

_BATCH = 16
"""Photos of one batch at most: what they teach serves the next one."""
_WAIT_SHARE = 1 / 3
"""Share of its time that a request may wait before answers get shorter."""
_LATENCY_MS = 1.0
_UNHURRIED_MS = 3.6e6
_ELASTIC = ("describe", "compare")
"""Stages that a budget shortens."""
_numbers = itertools.count()


def milliseconds() -> float:
    """Read the clock that all deadlines of a service are on."""
    return 1e3 * time.monotonic()


@dataclass(eq=False)
class Job:
    """A request that waits for an engine, or that an engine has in hand; times are the clock's."""

    arrived: float
    deadline: float
    margin_ms: float = 0.0  # behind the deadline, for the way of the answer
    photos: int = 1  # how many it is about
    image: bytes = field(default=b"", repr=False)
    k: int | None = None
    learn: bool = False
    embedding: bool = False
    call: Callable[[Engine, Budget], object] | None = None  # done instead of scoring the image
    budget_ms: float = 0.0  # what it may take, once it is taken
    begun: float = 0.0
    ended: float = 0.0
    future: Future[Any] = field(default_factory=Future, repr=False)  # cancelled by who goes away
    number: int = field(default_factory=_numbers.__next__)

    def __lt__(self, other: Job) -> bool:
        return (self.deadline, self.number) < (other.deadline, other.number)

    def answer(self, result: object) -> None:
        """Give the result, or the error, to whoever still waits for it."""
        if self.future.set_running_or_notify_cancel():
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class Costs:
    """What a photo takes here: at the least, and with everything that was asked for.

    Args:
        reserve_ms: kept for every photo, if more than the least.
    """

    def __init__(self, reserve_ms: float | None = None) -> None:
        self._reserve_ms = reserve_ms or 0.0
        self._least = CostEstimate()
        self._full: dict[int | None, CostEstimate] = {None: CostEstimate()}
        self.best_ms = 0.0
        """The least that was ever seen."""

    @property
    def least_ms(self) -> float:
        """Milliseconds that are kept for every photo that waits."""
        return max(self._reserve_ms, self._least.careful)

    def full_ms(self, k: int | None) -> float:
        """Milliseconds of an answer from which nothing is left out; as by default for a new k."""
        return self._full.get(k, self._full[None]).careful

    def learn(self, job: Job, result: Assessment, took_ms: float, rest_ms: float) -> None:
        """Take a photo just done as a measure of the next ones.

        Args:
            rest_ms: what the least of a photo's elastic stages takes; see `Engine.least_ms`.
        """
        elastic_ms = sum(result.timings_ms.get(stage, 0.0) for stage in _ELASTIC)
        least_ms = min(took_ms, took_ms - elastic_ms + rest_ms)
        self._least.observe(least_ms)
        self.best_ms = min(self.best_ms or least_ms, least_ms)
        # What is left out in spite of time enough would be so in any time.
        if not result.left_out or job.budget_ms > self.full_ms(job.k):
            self._full.setdefault(job.k, CostEstimate()).observe(took_ms)


class Queue:
    """The jobs of one service, in the order of their deadlines.

    It knows neither threads nor photos nor the true time: the scheduler has the lock, and the clock
    is given.

    Args:
        workers: engines that work at once.
        capacity: jobs that may wait.
    """

    def __init__(
        self, clock: Clock, costs: Costs, *, workers: int = 1, capacity: int = 128
    ) -> None:
        self._clock = clock
        self._costs = costs
        self._capacity = capacity
        self._gap = CostEstimate()  # milliseconds from one photo to the next
        self._last_offer: float | None = None
        self._waiting: list[Job] = []
        self._taken: list[list[Job]] = [[] for _ in range(workers)]

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, job: Job) -> None:
        """Admit a job.

        Raises:
            Overloaded: it, or one behind it, would be late; `retry_after_s` says when to ask again.
        """
        self.clear_out()
        if self._last_offer is not None:
            self._gap.observe((self._clock() - self._last_offer) / job.photos)
        self._last_offer = self._clock()
        late_ms = self._late_ms(job)
        if late_ms > 0:
            raise overloaded("an answer would come too late", late_ms)
        if len(self._waiting) >= self._capacity:
            raise overloaded("too many requests wait", self._costs.least_ms * self._capacity)
        insort(self._waiting, job)

    def take(self, worker: int) -> Job | None:
        """Give a worker the next job, with its budget; it begins once those in hand are done.

        A worker that has one in hand gets another one only if no other is free for it, and only if
        both are photos to be scored.
        """
        self.clear_out()
        in_hand = self._taken[worker]
        if in_hand and len(self._waiting) <= sum(not taken for taken in self._taken):
            return None
        if not self._waiting or (in_hand and self._waiting[0].call is not None):
            return None
        job = self._waiting.pop(0)
        job.budget_ms = self._budget_ms(job, self._free_at(worker))
        job.begun = self._clock()
        in_hand.append(job)
        return job

    def finish(self, worker: int) -> Job:
        """Give the job that a worker is done with; it turns to the next one in its hand."""
        in_hand = self._taken[worker]
        done = in_hand.pop(0)
        done.ended = self._clock()
        if in_hand:
            in_hand[0].begun = done.ended
        return done

    def put_back(self, worker: int) -> None:
        """Leave what a worker has in hand to whoever comes next."""
        for job in self._taken[worker]:
            insort(self._waiting, job)
        self._taken[worker].clear()

    def clear_out(self) -> None:
        """Forget the jobs that nobody waits for, and refuse those that are late after all."""
        now, waiting = self._clock(), self._waiting
        self._waiting = [
            job for job in waiting if job.deadline > now and not job.future.cancelled()
        ]
        for job in waiting:
            if job.deadline <= now:
                job.answer(overloaded("its turn came too late", self._costs.least_ms))

    def _budget_ms(self, job: Job, starts: float) -> float:
        """Milliseconds that a job may take, with those that still wait behind it."""
        each_ms, photos, workers = math.inf, job.photos, len(self._taken)
        if self._gap.expected:  # for those who come while it is at work
            gap_ms = self._gap.expected * workers
            each_ms = _WAIT_SHARE * max(job.deadline - job.arrived, gap_ms)
        for behind in self._waiting:
            wait_ms = _WAIT_SHARE * (behind.deadline - starts) * workers
            each_ms = min(each_ms, wait_ms / photos)
            photos += behind.photos
        fair_ms = job.photos * max(each_ms, self._costs.least_ms)
        return max(1.0, min(fair_ms, job.deadline - starts))

    def _free_at(self, worker: int) -> float:
        """When a worker should be done with what it has in hand."""
        now, in_hand = self._clock(), self._taken[worker]
        if not in_hand:
            return now
        first_ms, *others_ms = (
            min(job.budget_ms, self._costs.full_ms(job.k) * job.photos) for job in in_hand
        )
        return max(now, in_hand[0].begun + first_ms) + sum(others_ms)

    def _late_ms(self, job: Job) -> float:
        """By how much the job, or one behind it, would be late with the least for everybody."""
        now = self._clock()
        if not self._waiting and not any(self._taken):
            # With nothing else to do, a photo that may just be in time is tried, and teaches.
            return now + self._costs.best_ms * job.photos / 2 - job.deadline
        free_at = [self._free_at(worker) for worker in range(len(self._taken))]
        heapq.heapify(free_at)
        late_ms = 0.0
        for each in heapq.merge(self._waiting, [job]):
            ends = free_at[0] + self._costs.least_ms * each.photos
            heapq.heapreplace(free_at, ends)
            # Those before it are late, if they are, through no fault of this one.
            if each is job or job < each:
                late_ms = max(late_ms, ends - each.deadline)
        return late_ms


def overloaded(what: str, wait_ms: float) -> Overloaded:
    """Say when it is worth asking again."""
    error = Overloaded(what, hint=f"ask again in {wait_ms:.0f} ms, or allow more time: budget_ms")
    error.retry_after_s = wait_ms / 1e3
    return error


class Scheduler:
    """Engines behind a queue that keeps deadlines; `start` it, and `close` it in the end.

    Args:
        engines: each gets a thread. They may share a memory.
        clock: milliseconds.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        settings: Settings,
        metrics: Metrics,
        clock: Clock = milliseconds,
    ) -> None:
        self.engines = tuple(engines)
        self._settings, self._metrics, self._clock = settings, metrics, clock
        self._costs = Costs(settings.reserve_ms)
        workers, capacity = len(self.engines), settings.max_waiting
        self._queue = Queue(clock, self._costs, workers=workers, capacity=capacity)
        self._latency = CostEstimate(_LATENCY_MS)  # from an engine's thread to the event loop
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._warm = self._closing = False

    @property
    def ready(self) -> bool:
        """Whether requests are taken: engines are warm, and the service is not closing."""
        return self._warm and not self._closing

    def start(self) -> None:
        """Warm the engines up, and give each a thread."""
        self.warm_up()
        LOG.info("ready: %.0f ms are kept for each photo that waits", self._costs.least_ms)
        for number in range(len(self.engines)):
            thread = threading.Thread(target=self._work, args=(number,), name=f"engine-{number}")
            self._threads.append(thread)
            thread.start()

    def warm_up(self) -> None:
        """Let each engine score a picture of noise, and learn from it what a photo takes."""
        picture = np.random.default_rng(0).integers(0, 255, (768, 1024, 3), np.uint8)
        job = Job(0.0, 0.0, budget_ms=_UNHURRIED_MS)
        for engine in self.engines:
            try:
                for turn in range(2):  # the second finds neighbours' prefixes kept, as most do
                    picture[0, 0] = turn  # or the photo itself would be known
                    began = self._clock()
                    result = engine.score(picture, budget=Budget(ms=_UNHURRIED_MS), learn=False)
                self._costs.learn(job, result, self._clock() - began, engine.least_ms())
            except MeiqaError as error:
                LOG.warning("the engine was not warmed up: %s", error)
        self._warm = True

    def close(self) -> None:
        """Take nothing more, finish what was accepted, and let the threads end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    async def score(
        self,
        image: bytes,
        *,
        budget_ms: float | None = None,
        k: int | None = None,
        learn: bool = False,
        embedding: bool = False,
        reference: bytes | None = None,
    ) -> Assessment:
        """Score a photo within a budget, waiting included; see `Engine.score`.

        A `NamedBytes` gives the result its path.

        Raises:
            ImageError: the photo cannot be judged.
            Overloaded: the answer would come too late.
        """

        def call(engine: Engine, budget: Budget) -> Assessment:
            return engine.score(
                image, reference=reference, budget=budget, k=k, learn=learn, embedding=embedding
            )

        if reference is not None:
            return await self.run(call, budget_ms=budget_ms)
        found: Assessment = await self._ask(
            budget_ms, image=image, k=k, learn=learn, embedding=embedding
        )
        return found

    async def run(
        self,
        call: Callable[[Engine, Budget], T],
        *,
        budget_ms: float | None = None,
        photos: int = 1,
    ) -> T:
        """Do something with an engine, in its thread, within a budget; errors are its own.

        Args:
            call: is told what each photo may cost.
            photos: how many it is about.
        """
        found: T = await self._ask(budget_ms, photos=photos, call=call)
        return found

    async def _ask(self, budget_ms: float | None, *, photos: int = 1, **what: Any) -> Any:
        """Submit a job and await its answer."""
        if budget_ms is None:
            budget_ms = min(self._settings.budget_ms * photos, self._settings.max_budget_ms)
        # What the way in and the way out take while the event loop is as busy as it is now.
        margin_ms = max(self._settings.margin_ms, 2.0 * self._latency.careful)
        now = self._clock()
        job = Job(now, now + budget_ms - margin_ms, margin_ms, photos, **what)
        self.submit(job)
        result = await asyncio.wrap_future(job.future)
        self._latency.observe(self._clock() - job.ended)
        return result

    def submit(self, job: Job) -> None:
        """Let a job wait for an engine.

        Raises:
            Overloaded: it would come too late.
            ServiceError: the service is starting or ending.
        """
        with self._changed:
            if not self.ready:
                error = ServiceError("the service is " + ("ending" if self._warm else "starting"))
                error.retry_after_s = 1.0
                raise error
            self._queue.offer(job)
            self._metrics.waiting.set(len(self._queue))
            self._changed.notify()

    def _work(self, number: int) -> None:
        """Serve until nothing is left and the scheduler closes."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._queue) or self._closing)
                if not len(self._queue):
                    return
            self.serve(number)

    def serve(self, number: int) -> None:
        """Work off what waits, as one batch, with one engine."""
        try:
            for result in _results(self.engines[number], self._batch(number)):
                self._finish(number, result)
        except Exception as error:
            self._finish(number, error)
        finally:
            with self._changed:
                self._queue.put_back(number)

    def _batch(self, number: int) -> Iterator[Job]:
        for _ in range(_BATCH):
            with self._changed:
                job = self._queue.take(number)
                self._metrics.waiting.set(len(self._queue))
            if job is None:
                return
            yield job

    def _finish(self, number: int, result: object) -> None:
        with self._changed:
            job = self._queue.finish(number)
        try:
            result = self._noted(number, job, result)
        # Whatever becomes of the books: who waits is answered, and the engine goes on.
        except Exception:
            LOG.exception("an answer could not be entered into the books")
        job.answer(result)

    def _noted(self, number: int, job: Job, result: object) -> object:
        """Enter a result into the books, and give it with the time it waited."""
        queue_ms = job.begun - job.arrived
        self._metrics.queue_seconds.observe(queue_ms / 1e3)
        if job.ended > job.deadline + job.margin_ms:
            self._metrics.late.inc()
        if not isinstance(result, Assessment):
            return result
        if job.call is None:
            rest_ms = self.engines[number].least_ms()
            with self._changed:
                self._costs.learn(job, result, job.ended - job.begun, rest_ms)
        self._metrics.least_seconds.set(self._costs.least_ms / 1e3)
        self._metrics.assessed(result)
        return replace(result, timings_ms={"queue": round(queue_ms, 3), **result.timings_ms})


def _results(engine: Engine, jobs: Iterator[Job]) -> Iterator[object]:
    """Let an engine do jobs; it decodes each photo while it works on the one before."""
    first = next(jobs, None)  # before the engine is asked: its error is then somebody's answer
    if first is None:
        return
    calls: list[Job] = []

    def photos() -> Iterator[ScoreRequest]:
        for job in itertools.chain([first], jobs):
            if job.call is not None:
                calls.append(job)
                return
            # A budget counts from its turn, a deadline would while the one before is worked at.
            yield ScoreRequest(
                job.image,
                Budget(ms=job.budget_ms),
                k=job.k,
                learn=job.learn,
                embedding=job.embedding,
            )

    for result in engine.score_many(photos()):
        yield result.error if isinstance(result, Failure) else result
    for job in calls:
        assert job.call is not None
        yield job.call(engine, Budget(ms=job.budget_ms / job.photos))
