"""Between the event loop and the engines: requests wait here, and each engine has a thread.

The loop never waits for an engine: it hands in a job and awaits a future. An engine's thread takes
what waits as one batch (`Engine.score_many`), so that the next photo is decoded while one is
assessed; each answer goes out as soon as it is there, and is what the photo would get alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from meiqa.engine.pipeline import Engine
from meiqa.errors import MeiqaError, ServiceError
from meiqa.serve.admission import Admission, Estimate, Job, Pace, overloaded
from meiqa.serve.metrics import Metrics
from meiqa.serve.settings import Settings
from meiqa.types import Assessment, Budget, Failure, PairComparison, Ranking

__all__ = ["Desk", "ScoreOptions"]

LOG = logging.getLogger(__name__)
T = TypeVar("T")
_WAY_MS = 1.0
BATCH = 16
"""Photos of one batch at most: what they teach serves the next one."""
_UNHURRIED = Budget(ms=3.6e6)


def milliseconds() -> float:
    """Read the clock that all deadlines of a service are on."""
    return 1e3 * time.monotonic()


@dataclass(frozen=True)
class ScoreOptions:
    """What photos have to have in common to be assessed in one batch; see `Engine.score`."""

    k: int | None = None
    learn: bool = False
    reference: bytes | None = field(default=None, repr=False)


@dataclass(eq=False)
class _Work(Job):
    """A job with whom its answer is for.

    Attributes:
        photo: with `options`, a photo to be scored; otherwise `call` is what there is to do.
        call: told the milliseconds that each photo may take.
        due: when its budget ends; the deadline is earlier by what the way of the answer takes.
        way: how long an answer takes from an engine's thread to the event loop.
    """

    loop: asyncio.AbstractEventLoop = field(kw_only=True)
    answer: asyncio.Future[Any] = field(kw_only=True)
    arrived: float = field(kw_only=True)
    due: float = field(kw_only=True)
    way: Estimate = field(kw_only=True)
    photo: bytes = b""
    options: ScoreOptions | None = None
    call: Callable[[Engine, float], object] | None = None
    begun: float = 0.0

    def settle(self, result: object) -> None:
        """Give the answer, or the error, to whoever awaits it."""
        settled = milliseconds()

        def give() -> None:
            self.way.observe(milliseconds() - settled)
            if self.answer.done():
                return
            if isinstance(result, BaseException):
                self.answer.set_exception(result)
            else:
                self.answer.set_result(result)

        try:
            self.loop.call_soon_threadsafe(give)
        except RuntimeError:  # the loop is closed, and nobody waits
            LOG.warning("an answer came after its loop was closed")


class Desk:
    """Engines behind a queue that keeps deadlines; `start` it, and `close` it in the end.

    Args:
        engines: each gets a thread. They may share a memory.
    """

    def __init__(self, engines: Sequence[Engine], settings: Settings, metrics: Metrics) -> None:
        self.engines = tuple(engines)
        self._settings = settings
        self._metrics = metrics
        self._changed = threading.Condition()
        self._admission: Admission | None = None
        self._pace: Pace | None = None
        self._way = Estimate(_WAY_MS, milliseconds)  # of the event loop alone
        self._closing = False
        self._idle = 0
        self._threads: list[threading.Thread] = []

    @property
    def ready(self) -> bool:
        """Whether requests are taken: engines are warm, and the service is not closing."""
        return self._admission is not None and not self._closing

    def start(self) -> None:
        """Warm the engines up, measure what a photo takes, and begin to work."""
        self._pace = _warm_up(self.engines)
        self._admission = Admission(
            milliseconds,
            self._pace,
            workers=len(self.engines),
            capacity=self._settings.max_waiting,
            reserve_ms=self._settings.reserve_ms,
        )
        LOG.info("ready: %.0f ms are kept for each photo that waits", self._admission.least_ms)
        for number in range(len(self.engines)):
            thread = threading.Thread(target=self._work, args=(number,), name=f"engine-{number}")
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Take nothing more, finish what was accepted, and let the threads end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    async def score(
        self,
        photo: bytes,
        *,
        budget_ms: float | None = None,
        options: ScoreOptions = ScoreOptions(),
    ) -> Assessment:
        """Assess a photo within a budget, waiting included.

        A `NamedBytes` gives the result its path.

        Raises:
            ImageError: the photo cannot be judged.
            Overloaded: the answer would come too late.
        """
        result = await self._done(budget_ms, 1, photo=photo, options=options)
        assert isinstance(result, Assessment)
        return result

    async def compare(
        self, first: bytes, second: bytes, *, budget_ms: float | None = None
    ) -> PairComparison:
        """Compare two photos; errors are those of `score`."""

        def call(engine: Engine, each_ms: float) -> PairComparison:
            return engine.compare(first, second, budget=Budget(ms=each_ms))

        result = await self._done(budget_ms, 2, call=call)
        assert isinstance(result, PairComparison)
        return result

    async def rank(
        self, photos: Sequence[bytes], *, budget_ms: float | None = None, k: int | None = None
    ) -> Ranking:
        """Put photos in order; errors are those of `score`."""

        def call(engine: Engine, each_ms: float) -> Ranking:
            return engine.rank(photos, budget=Budget(ms=each_ms), k=k)

        result = await self._done(budget_ms, len(photos), call=call)
        assert isinstance(result, Ranking)
        return result

    async def run(self, call: Callable[[Engine], T], *, budget_ms: float | None = None) -> T:
        """Do something with an engine, in its thread, that takes about as long as a photo."""
        result: T = await self._done(budget_ms, 1, call=lambda engine, _: call(engine))
        return result

    async def _done(self, budget_ms: float | None, photos: int, **what: Any) -> Any:
        """Hand in a job and await its answer; who stops awaiting takes it back."""
        loop = asyncio.get_running_loop()
        if budget_ms is None:
            budget_ms = min(self._settings.budget_ms * photos, self._settings.max_budget_ms)
        arrived = milliseconds()
        work = _Work(
            arrived + budget_ms - self._margin_ms,
            photos,
            due=arrived + budget_ms,
            loop=loop,
            answer=loop.create_future(),
            arrived=arrived,
            way=self._way,
            **what,
        )
        with self._changed:
            admission = self._open()
            admission.offer(work)
            self._metrics.waiting.set(len(admission))
            self._changed.notify()
        try:
            return await work.answer
        except asyncio.CancelledError:
            with self._changed:
                admission.drop(work)
            raise

    @property
    def _margin_ms(self) -> float:
        """What the way in and the way out take while the event loop is as busy as it is now."""
        return max(self._settings.margin_ms, 2.0 * self._way.careful_ms)

    def _open(self) -> Admission:
        if self._admission is None or self._closing:
            error = ServiceError("the service is " + ("ending" if self._closing else "starting"))
            error.retry_after_s = 1.0
            raise error
        return self._admission

    def _work(self, number: int) -> None:
        """Serve until there is nothing left and the desk closes."""
        engine = self.engines[number]
        while (work := self._next()) is not None:
            if work.options is None:
                self._call(number, engine, work)
            else:
                self._score_batch(number, engine, work, work.options)

    def _next(self) -> _Work | None:
        """Wait for a job; None when the desk closes."""
        with self._changed:
            while True:
                work = self._pick(lambda job: True)
                if work is not None or self._closing:
                    return work
                self._idle += 1
                self._changed.wait()
                self._idle -= 1

    def _pick(self, suits: Callable[[Job], bool]) -> _Work | None:
        assert self._admission is not None
        for late in self._admission.expired():
            assert isinstance(late, _Work)
            late.settle(overloaded("its turn came too late", self._admission.least_ms))
        work = self._admission.pick(suits)
        assert work is None or isinstance(work, _Work)
        return work

    def _call(self, number: int, engine: Engine, work: _Work) -> None:
        allowed_ms = self._begin(number, work)
        assert work.call is not None
        try:
            result: object = work.call(engine, allowed_ms / work.photos)
        except Exception as error:
            result = error
        self._finish(number, work, result)

    def _score_batch(
        self, number: int, engine: Engine, first: _Work, options: ScoreOptions
    ) -> None:
        """Assess what waits and has the same options, each photo as if it were alone."""
        in_hand = deque([first])

        def photos() -> Iterator[bytes]:
            yield first.photo
            for _ in range(BATCH - 1):
                with self._changed:
                    if self._idle:  # another engine can take it up now
                        return
                    work = self._pick(lambda job: isinstance(job, _Work) and job.options == options)
                if work is None:
                    return
                in_hand.append(work)
                yield work.photo

        def budget() -> Budget:
            return Budget(ms=self._begin(number, in_hand[0]))

        try:
            for result in engine.score_many(
                photos(),
                reference=options.reference,
                budget=budget,
                k=options.k,
                learn=options.learn,
            ):
                work = in_hand.popleft()
                self._finish(number, work, result.error if isinstance(result, Failure) else result)
        except Exception as error:
            work = in_hand.popleft()
            if not work.begun:
                self._begin(number, work)
            self._finish(number, work, error)
        finally:
            with self._changed:
                for work in in_hand:
                    if self._admission is not None:
                        self._admission.put_back(work)

    def _begin(self, number: int, work: _Work) -> float:
        with self._changed:
            assert self._admission is not None
            allowed_ms = self._admission.begin(number, work)
            self._metrics.waiting.set(len(self._admission))
        work.begun = milliseconds()
        self._metrics.queue_seconds.observe((work.begun - work.arrived) / 1e3)
        return allowed_ms

    def _finish(self, number: int, work: _Work, result: object) -> None:
        try:
            result = self._noted(number, work, result)
        # Whatever becomes of the books: who waits is answered, and the engine goes on.
        except Exception:
            LOG.exception("an answer could not be entered into the books")
        work.settle(result)

    def _noted(self, number: int, work: _Work, result: object) -> object:
        """Enter a result into the books, and give it with the time it waited."""
        now = milliseconds()
        took_ms = (now - work.begun) / work.photos
        with self._changed:
            assert self._admission is not None
            assert self._pace is not None
            self._admission.finish(number)
            if isinstance(result, Assessment):
                self._learn(self.engines[number], result, took_ms, self._pace)
            self._metrics.least_seconds.set(self._admission.least_ms / 1e3)
        if now > work.due:
            self._metrics.late.inc()
        if not isinstance(result, Assessment):
            return result
        timings = {"queue": round(work.begun - work.arrived, 3), **result.timings_ms}
        self._metrics.assessed(result)
        return replace(result, timings_ms=timings)

    def _learn(self, engine: Engine, result: Assessment, took_ms: float, pace: Pace) -> None:
        """Take the photo just done as a measure of the next ones."""
        elastic_ms = _elastic_ms(result)
        pace.least.observe(min(took_ms, took_ms - elastic_ms + engine.least_ms()))
        if not result.degraded:
            pace.usual.observe(took_ms)


def _elastic_ms(result: Assessment) -> float:
    """Milliseconds of the stages that a budget shortens."""
    return sum(result.timings_ms.get(stage, 0.0) for stage in ("describe", "compare"))


def _warm_up(engines: Sequence[Engine]) -> Pace:
    """Let each engine assess a picture of noise, and take the best times as the pace."""
    random = np.random.default_rng(0)
    picture = random.integers(0, 255, (768, 1024, 3), np.uint8)
    least_ms, usual_ms = [], []
    for engine in engines:
        least_ms.append(engine.least_ms())
        for turn in range(2):  # the second finds neighbours' prefixes kept, as most photos do
            picture[0, 0] = turn  # or the photo itself would be known
            began = milliseconds()
            try:
                result = engine.score(picture, budget=_UNHURRIED, learn=False)
            except MeiqaError as error:
                LOG.warning("the engine was not warmed up: %s", error)
                break
            took_ms = milliseconds() - began
        else:
            elastic_ms = _elastic_ms(result)
            least_ms[-1] = min(took_ms, took_ms - elastic_ms + engine.least_ms())
            usual_ms.append(took_ms)
    least, usual = max(least_ms), max(usual_ms, default=max(least_ms))
    return Pace(Estimate(least, milliseconds), Estimate(usual, milliseconds))
