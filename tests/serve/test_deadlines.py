"""Deadlines and load, with an engine that only takes time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from meiqa.engine.pipeline import Engine
from meiqa.errors import DecodeError, MeiqaError, Overloaded, ServiceError
from meiqa.serve.desk import Desk, ScoreOptions
from meiqa.serve.metrics import Metrics
from meiqa.serve.settings import Settings
from meiqa.types import Assessment, Budget, Failure

LEAST_MS, USUAL_MS = 20.0, 60.0


class Sleeper:
    """Takes the time it is given, between the least and the usual."""

    def __init__(self, takes_ms: float | None = None) -> None:
        self.takes_ms = takes_ms
        self.batches: list[int] = []
        self.given_ms: list[float] = []

    def least_ms(self) -> float:
        return LEAST_MS

    def score(self, photo: Any, *, budget: Budget, learn: bool) -> Assessment:
        return self._assess(budget)

    def score_many(
        self, images: Iterable[bytes], *, budget: Callable[[], Budget], **_: Any
    ) -> Iterator[Assessment | Failure]:
        self.batches.append(0)
        photos = iter(images)
        following = next(photos, None)
        while following is not None:
            photo, following = following, next(photos, None)  # one ahead, as the engine decodes
            self.batches[-1] += 1
            allowed = budget()
            if photo == b"broken":
                yield Failure("photo", DecodeError("it is broken"))
            elif photo == b"fatal":
                raise RuntimeError("the model is gone")
            else:
                yield self._assess(allowed)

    def _assess(self, budget: Budget) -> Assessment:
        assert budget.ms is not None
        self.given_ms.append(budget.ms)
        took_ms = self.takes_ms or min(USUAL_MS, max(LEAST_MS, budget.ms))
        time.sleep(took_ms / 1e3)
        elastic_ms = took_ms - LEAST_MS
        timings = {"describe": elastic_ms, "compare": LEAST_MS, "total": took_ms}
        notes = ("no summary",) if took_ms < USUAL_MS else ()
        return Assessment(
            *("photo", 3.0, 0.5, (2.0, 4.0), 3.0, "fair", 50.0, None),
            degraded=notes,
            timings_ms=timings,
        )


@asynccontextmanager
async def opened(engines: int = 1, **settings: Any) -> AsyncIterator[tuple[Desk, Sleeper]]:
    sleepers = [Sleeper() for _ in range(engines)]
    sleeper = sleepers[0]
    served = [cast(Engine, each) for each in sleepers]
    desk = Desk(served, Settings(margin_ms=5, **settings), Metrics())
    desk.start()
    sleeper.given_ms.clear()
    try:
        yield desk, sleeper
    finally:
        await asyncio.to_thread(desk.close)


async def timed(desk: Desk, budget_ms: float, photo: bytes = b"") -> tuple[object, float]:
    """Ask for a score; give the result or the refusal, and the milliseconds it took."""
    began = time.perf_counter()
    try:
        result: object = await desk.score(photo, budget_ms=budget_ms)
    except MeiqaError as error:
        result = error
    return result, 1e3 * (time.perf_counter() - began)


def test_waiting_counts_and_costs_quality_before_answers() -> None:
    async def check() -> None:
        async with opened() as (desk, sleeper):
            found = await asyncio.gather(*(timed(desk, 1500) for _ in range(30)))
            assert all(isinstance(result, Assessment) for result, _ in found)
            assert sum(took_ms < 1500 for _, took_ms in found) >= 25
            assert sleeper.given_ms[0] < 100  # it left time to those behind it

    asyncio.run(check())


def test_what_cannot_be_met_is_refused_at_once_and_the_rest_is_in_time() -> None:
    async def check() -> None:
        async with opened() as (desk, _):
            found = await asyncio.gather(*(timed(desk, 300) for _ in range(60)))
            refused = [took_ms for result, took_ms in found if isinstance(result, Overloaded)]
            answered = [took_ms for result, took_ms in found if isinstance(result, Assessment)]
            assert len(refused) + len(answered) == 60
            assert 2 <= len(answered) <= 15
            assert sorted(refused)[len(refused) // 2] < 150  # 50 where nothing else runs
            assert sorted(answered)[len(answered) // 2] < 400
            result, _ = await timed(desk, 2000)  # and it has recovered
            assert isinstance(result, Assessment)

    asyncio.run(check())


def test_those_who_wait_together_go_as_a_batch() -> None:
    async def check() -> None:
        async with opened() as (desk, sleeper):
            await asyncio.gather(*(timed(desk, 5000) for _ in range(6)))
            assert max(sleeper.batches) >= 4
            assert sum(sleeper.batches) == 6

    asyncio.run(check())


def test_different_questions_are_not_mixed() -> None:
    async def check() -> None:
        async with opened() as (desk, sleeper):
            await asyncio.gather(
                *(desk.score(b"", budget_ms=5000, options=ScoreOptions(k=k)) for k in (1, 2, 1))
            )
            assert sum(sleeper.batches) == 3
            assert len(sleeper.batches) >= 2

    asyncio.run(check())


def test_a_hurried_request_overtakes_a_patient_one() -> None:
    async def check() -> None:
        async with opened() as (desk, _):
            order: list[str] = []

            async def ask(name: str, budget_ms: float) -> None:
                await desk.score(b"", budget_ms=budget_ms)
                order.append(name)

            tasks = [asyncio.create_task(ask(f"patient {n}", 9000)) for n in range(5)]
            await asyncio.sleep(0.01)
            tasks.append(asyncio.create_task(ask("hurried", 400)))
            await asyncio.gather(*tasks)
            assert order.index("hurried") < 3

    asyncio.run(check())


def test_a_photo_that_cannot_be_judged_fails_alone() -> None:
    async def check() -> None:
        async with opened() as (desk, _):
            asked = (timed(desk, 5000, photo) for photo in (b"", b"broken", b"", b"fatal", b""))
            found = await asyncio.gather(*asked, return_exceptions=True)
            kinds = [type(each[0] if isinstance(each, tuple) else each) for each in found]
            assert kinds == [Assessment, DecodeError, Assessment, RuntimeError, Assessment]

    asyncio.run(check())


def test_who_waits_is_answered_whatever_becomes_of_the_books(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(self: Metrics, result: Assessment) -> None:
        raise ValueError("no such label")

    async def check() -> None:
        async with opened() as (desk, _):
            monkeypatch.setattr(Metrics, "assessed", failing)
            found = await asyncio.gather(*(timed(desk, 5000) for _ in range(3)))
            assert [type(result) for result, _ in found] == [Assessment] * 3
            assert caplog.text.count("could not be entered into the books") == 3
            monkeypatch.undo()
            result, _ = await timed(desk, 5000)
            assert isinstance(result, Assessment)
            assert "queue" in result.timings_ms  # the books are kept again

    asyncio.run(check())


def test_who_goes_away_is_not_worked_for() -> None:
    async def check() -> None:
        async with opened() as (desk, sleeper):
            tasks = [asyncio.create_task(desk.score(b"", budget_ms=5000)) for _ in range(8)]
            await asyncio.sleep(0.02)
            for task in tasks[3:]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await desk.score(b"", budget_ms=5000)
            assert sum(sleeper.batches) <= 5

    asyncio.run(check())


def test_closing_finishes_what_was_accepted_and_takes_no_more() -> None:
    async def check() -> None:
        async with opened() as (desk, _):
            tasks = [asyncio.create_task(desk.score(b"", budget_ms=5000)) for _ in range(5)]
            await asyncio.sleep(0.01)
            closing = asyncio.create_task(asyncio.to_thread(desk.close))
            await asyncio.sleep(0.01)
            with pytest.raises(ServiceError, match="ending"):
                await desk.score(b"")
            assert not desk.ready
            assert len(await asyncio.gather(*tasks)) == 5
            await closing

    asyncio.run(check())


def test_two_engines_work_at_once() -> None:
    async def check() -> None:
        async with opened(engines=2) as (desk, sleeper):
            for _ in range(3):
                while desk._idle < 2:  # answered, but not back yet
                    await asyncio.sleep(0.001)
                before = sum(sleeper.batches)
                await asyncio.gather(*(desk.score(b"", budget_ms=5000) for _ in range(2)))
                assert sum(sleeper.batches) == before + 1  # neither takes the other's

    asyncio.run(check())


def test_what_is_late_against_all_estimates_is_refused_and_not_worked_for() -> None:
    async def check() -> None:
        async with opened() as (desk, sleeper):
            sleeper.takes_ms = 250.0  # much longer than measured
            found = await asyncio.gather(*(timed(desk, 300) for _ in range(6)))
            assert sum(isinstance(result, Overloaded) for result, _ in found) >= 3
            assert sum(sleeper.batches) <= 3

    asyncio.run(check())


def test_other_work_goes_through_the_same_queue() -> None:
    async def check() -> None:
        async with opened() as (desk, sleeper):
            assert await desk.run(lambda engine: engine is cast(Engine, sleeper)) is True
            with pytest.raises(ZeroDivisionError):
                await desk.run(lambda engine: 1 / 0)
            assert isinstance((await timed(desk, 500))[0], Assessment)

    asyncio.run(check())
