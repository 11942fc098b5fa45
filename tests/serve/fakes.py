"""An engine that takes time, and a scheduler whose clock is turned by it."""

from __future__ import annotations

import heapq
import io
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meiqa import testing
from meiqa.engine.images import ImageSource, NamedBytes, Pixels, load_pixels
from meiqa.errors import Overloaded
from meiqa.serve.access import Settings
from meiqa.serve.camera import frame_stats
from meiqa.serve.middleware import Metrics
from meiqa.serve.scheduler import Job, Scheduler
from meiqa.types import Assessment, Budget, Distortion

DARK = Distortion("darkening", 5.0, 0.9)
FEWEST = 4


def grey(level: int, size: tuple[int, int] = (48, 64), form: str = "JPEG") -> bytes:
    """A photo of one grey."""
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(file, form, quality=95)
    return file.getvalue()


def scene_of(seed: int, scale: int = 1) -> NDArray[np.uint8]:
    """Give a scene (240, 320, 3) with fine and coarse parts, well lit, or one so much larger."""
    tiles = np.random.default_rng(seed).integers(40, 216, (12, 16, 3))
    fine = np.random.default_rng(seed + 100).integers(-25, 26, (120 * scale, 160 * scale, 1))
    side = 20 * scale
    pixels = np.kron(tiles, np.ones((side, side, 1))) + np.kron(fine, np.ones((2, 2, 1)))
    return pixels.clip(0, 255).astype(np.uint8)


def perceived(pixels: Pixels) -> float:
    """Score a picture by how fine, bright and clean it is."""
    stats = frame_stats(pixels.array)
    return 0.3 * stats.crispness + 0.8 * stats.light - 0.15 * stats.measured["noise"] - 1.5


@dataclass(frozen=True)
class StageCosts:
    """Milliseconds of the stages, and how much each photo varies about them."""

    read_ms: float = 0.0
    text_ms: float = 0.0
    short_text_ms: float = 0.0
    neighbour_ms: float = 0.0
    spread: float = 0.0


class FakeEngine(testing.FakeEngine):
    """Take what the stages cost, as the budget allows, and score 1 for black to 5 for white.

    Neighbours are given up first, down to four, then the text is shortened, and left out in the
    end.

    Args:
        costs: of its stages.
        neighbours: K.
        spend: how time passes.
        rule: another score.

    Attributes:
        open: set unless photos are to wait; `begun` is set when one is taken up.
        fails: raised in place of a score; given: the assessments so far.
    """

    def __init__(
        self,
        costs: StageCosts = StageCosts(),
        neighbours: int = 32,
        spend: Callable[[float], None] = lambda ms: None,
        rule: Callable[[Pixels], float] = lambda pixels: 1 + 4 * float(pixels.array.mean()) / 255,
    ) -> None:
        super().__init__(rule, neighbours=neighbours)
        self.costs, self.spend = costs, spend
        self.open, self.begun = threading.Event(), threading.Event()
        self.open.set()
        self.fails: Exception | None = None
        self.given: list[Assessment] = []
        self._dice = random.Random(1)

    @property
    def asked(self) -> list[tuple[str, int | None, bool]]:
        """Each photo's name, k and `learn`."""
        return [(call.name, call.k, call.learn) for call in self.calls]

    @property
    def given_ms(self) -> list[float]:
        """The budgets."""
        return [ms_of(call.budget) for call in self.calls]

    def close(self) -> None:
        self.open.set()

    def forget(self) -> None:
        """Take what was asked for so far, as by a warm-up, for nothing."""
        self.calls.clear()
        self.begun.clear()

    def least_ms(self) -> float:
        fewest = min(FEWEST, self.model.calibration.neighbours)
        return self.costs.short_text_ms + fewest * self.costs.neighbour_ms

    def score(
        self,
        image: ImageSource,
        *,
        reference: ImageSource | None = None,
        budget: Budget | None = None,
        k: int | None = None,
        learn: bool = True,
        detail: bool = True,
        embedding: bool = False,
    ) -> Assessment:
        self.begun.set()
        self.open.wait()
        if self.fails is not None:
            raise self.fails
        found = super().score(
            image,
            reference=reference,
            budget=budget,
            k=k,
            learn=learn,
            detail=detail,
            embedding=embedding,
        )
        if reference is not None:
            load_pixels(reference)
        read_ms = self._varied(self.costs.read_ms)
        text_ms, count, notes = self._plan(len(found.neighbours), ms_of(budget) - read_ms)
        text_ms, compare_ms = self._varied(text_ms), self._varied(count * self.costs.neighbour_ms)
        self.spend(read_ms + text_ms + compare_ms)
        given = replace(
            found,
            summary=None if "no summary" in notes else found.summary,
            neighbours=found.neighbours[:count],
            degraded=notes,
            timings_ms={"read": read_ms, "describe": text_ms, "compare": compare_ms, "total": 9.5},
            distortions=(DARK,) if found.score < 1.8 else (),
        )
        self.given.append(given)
        return given

    def _plan(self, most: int, left_ms: float) -> tuple[float, int, tuple[str, ...]]:
        fewest = min(FEWEST, most)
        plans = [(self.costs.text_ms, k, ()) for k in range(most, fewest - 1, -1)]
        plans.append((self.costs.short_text_ms, fewest, ("shorter summary",)))
        for text_ms, k, notes in plans:
            if text_ms + k * self.costs.neighbour_ms <= left_ms:
                fewer = () if k == most else (f"{k} of {most} neighbours",)
                return text_ms, k, (*notes, *fewer)
        return 0.0, 0, ("no summary", "initial score only")

    def _varied(self, ms: float) -> float:
        return ms * self._dice.uniform(1 - self.costs.spread, 1 + self.costs.spread)


def ms_of(budget: Budget | None) -> float:
    return float("inf") if budget is None or budget.ms is None else budget.ms


@dataclass
class Asked:
    """A request of a simulation, and what became of it: an assessment, or the error."""

    at_ms: float
    budget_ms: float
    took_ms: float = 0.0
    result: object = None

    @property
    def in_time(self) -> bool:
        return isinstance(self.result, Assessment) and self.took_ms <= self.budget_ms


class Simulation:
    """A service with one engine, on a clock that is turned by what that engine takes."""

    def __init__(self, costs: StageCosts, neighbours: int = 32, **settings: Any) -> None:
        self.now_ms = 0.0
        self._coming: list[tuple[float, int, Asked, dict[str, Any]]] = []
        self._open = self._count = 0
        self.engine = FakeEngine(costs, neighbours, self.spend)
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            [self.engine], Settings(**settings), self.metrics, lambda: self.now_ms
        )
        self.scheduler.warm_up()
        self.engine.forget()

    def ask(self, at_ms: float, budget_ms: float, **what: Any) -> Asked:
        """Let a request come at some time from now."""
        self._count += 1
        asked = Asked(self.now_ms + at_ms, budget_ms)
        heapq.heappush(self._coming, (asked.at_ms, self._count, asked, what))
        return asked

    def ask_at_random(
        self, rate: float, seconds: float, budget_ms: float, seed: int
    ) -> list[Asked]:
        """Let requests come at the moments of a Poisson process."""
        dice, at_ms, asked = random.Random(seed), 0.0, []
        while (at_ms := at_ms + 1e3 * dice.expovariate(rate)) < 1e3 * seconds:
            asked.append(self.ask(at_ms, budget_ms))
        return asked

    def run(self, until_ms: float = float("inf")) -> None:
        """Work until everything that comes is answered, or until some time."""
        while (self._open or self._coming) and self.now_ms < until_ms:
            if self._open:
                self.scheduler.serve(0)
            else:
                self.spend(max(0.0, self._coming[0][0] - self.now_ms))

    def spend(self, ms: float) -> None:
        """Let time pass, and those come whose time has come."""
        ends_ms = self.now_ms + ms
        while self._coming and self._coming[0][0] <= ends_ms:
            at_ms, _, asked, what = heapq.heappop(self._coming)
            self.now_ms = max(self.now_ms, at_ms)
            self._submit(asked, what)
        self.now_ms = ends_ms

    def _submit(self, asked: Asked, what: dict[str, Any]) -> None:
        def answered(future: Future[Any]) -> None:
            asked.result = future.exception() or future.result()
            asked.took_ms = self.now_ms - asked.at_ms
            self._open -= 1

        margin_ms = 20.0
        deadline = asked.at_ms + asked.budget_ms - margin_ms
        photo = NamedBytes(grey(120, (16, 16), "PPM"), "grey")
        job = Job(asked.at_ms, deadline, margin_ms, **{"image": photo, **what})
        try:
            self.scheduler.submit(job)
        except Overloaded as error:
            asked.result = error
        else:
            self._open += 1
            job.future.add_done_callback(answered)
