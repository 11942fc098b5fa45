"""What a budget buys: a plan made from measured costs, given up in a declared order."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from meiqa.engine.comparing import Verdicts
from meiqa.engine.package import Calibration
from meiqa.engine.scoring import Opinion
from meiqa.engine.vlm import ROWS_PER_CALL, Vlm
from meiqa.kernels.thurstone import thurstone_map
from meiqa.types import Budget

SHORT_SUMMARY_TOKENS = 16
USUAL_SHARE = 0.5
"""Share of its limit that a description is taken to need before one was seen."""
FEWEST_NEIGHBOURS = 4
HEADROOM = 1.15
"""Stages are planned to take this much longer than measured."""
SMOOTHING = 0.3
"""Weight of the newest measurement in a cost."""


@dataclass(frozen=True)
class Plan:
    """What will be done for one photo.

    Attributes:
        summary_tokens: limit of the description, 0 for none.
        neighbours: how many to compare with.
        both_orders: whether each comparison is also asked the other way round.
        degraded: what the budget left out, in the declared order.
    """

    summary_tokens: int
    neighbours: int
    both_orders: bool
    degraded: tuple[str, ...] = ()


@dataclass
class CostModel:
    """Milliseconds of the stages on this machine, learnt from every photo.

    Attributes:
        token_ms: one written token; summary_tokens: tokens of a usual description.
        pair_ms: one comparison in one order, reading the neighbour's prefix included.
        grade_ms: a grade word.
    """

    token_ms: float
    summary_tokens: float
    pair_ms: float
    grade_ms: float

    def observe(self, name: str, value: float) -> None:
        """Move one cost towards a measurement."""
        setattr(self, name, getattr(self, name) * (1 - SMOOTHING) + SMOOTHING * value)

    def of(self, plan: Plan) -> float:
        """Milliseconds that a plan should take, with headroom."""
        words = min(self.summary_tokens, plan.summary_tokens) * self.token_ms
        pairs = plan.neighbours * (2 if plan.both_orders else 1) * self.pair_ms
        return HEADROOM * (self.grade_ms + words + pairs)

    def of_wave(self, plan: Plan, neighbours: int) -> float:
        """Milliseconds that a wave of comparisons should take, with headroom."""
        return HEADROOM * neighbours * (2 if plan.both_orders else 1) * self.pair_ms


def plan_work(
    k: int, summary_tokens: int, remaining_ms: float | None, costs: CostModel | None
) -> Plan:
    """The first plan, in the declared order of degradation, that fits the time left.

    Shorter summary, no summary, fewer neighbours, one order, first opinion only.
    """
    whole = Plan(summary_tokens, k, both_orders=True)
    if remaining_ms is None or costs is None:
        return whole
    for plan in degraded_plans(whole):
        if costs.of(plan) <= remaining_ms:
            return plan
    return Plan(0, 0, both_orders=False, degraded=("no summary", "initial score only"))


def degraded_plans(whole: Plan) -> Iterator[Plan]:
    """A plan and its lesser versions, in the declared order."""
    k = whole.neighbours
    yield whole
    yield Plan(SHORT_SUMMARY_TOKENS, k, both_orders=True, degraded=("shorter summary",))
    yield Plan(0, k, both_orders=True, degraded=("no summary",))
    for fewer in range(k - 1, min(FEWEST_NEIGHBOURS, k) - 1, -1):
        yield Plan(
            0, fewer, both_orders=True, degraded=("no summary", f"{fewer} of {k} neighbours")
        )
    yield Plan(0, k, both_orders=False, degraded=("no summary", "one order"))
    for fewer in range(k - 1, 0, -1):
        lost = ("no summary", f"{fewer} of {k} neighbours", "one order")
        yield Plan(0, fewer, both_orders=False, degraded=lost)


@dataclass
class Stopwatch:
    """Times the stages of one photo and knows what is left of its budget."""

    budget: Budget
    started: float = field(default_factory=time.perf_counter)
    timings_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.timings_ms[name] = 1e3 * (time.perf_counter() - began)

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the photo was taken up."""
        return 1e3 * (time.perf_counter() - self.started)

    @property
    def remaining_ms(self) -> float | None:
        """Milliseconds left, None without a limit."""
        return None if self.budget.ms is None else self.budget.ms - self.elapsed_ms


def measure_costs(vlm: Vlm, calibration: Calibration, summary_tokens: int) -> CostModel:
    """Time each stage warm, on a blank photo; compiles what is compiled on first use."""
    image = vlm.image
    side = math.isqrt(image.max_pixels) // image.cell_pixels * image.cell_pixels
    prefix = vlm.read([vlm.encode(np.full((side, side, 3), 127, np.uint8))])[0]
    for _ in range(2):
        clock = Stopwatch(Budget())
        with clock.stage("describe"):
            written = max(1, vlm.describe(prefix, SHORT_SUMMARY_TOKENS).tokens)
        with clock.stage("grade"):
            vlm.grade(prefix)
        with clock.stage("pairs"):
            vlm.prefer_first([prefix], [prefix.tokens] * ROWS_PER_CALL)
            vlm.prefer_first(
                vlm.read([prefix.tokens] * ROWS_PER_CALL), [prefix.tokens] * ROWS_PER_CALL
            )
        one = np.ones((1, 1))
        thurstone_map(one[0], one, one, one, calibration.sigma, calibration.lam)
    return CostModel(
        token_ms=clock.timings_ms["describe"] / written,
        summary_tokens=USUAL_SHARE * summary_tokens,
        pair_ms=clock.timings_ms["pairs"] / (2 * ROWS_PER_CALL),
        grade_ms=clock.timings_ms["grade"],
    )


def observe_costs(
    costs: CostModel, clock: Stopwatch, opinion: Opinion, verdicts: Verdicts, plan: Plan
) -> None:
    """Learn from the photo just done."""
    if opinion.written_tokens:
        writing_ms = max(0.0, clock.timings_ms["describe"] - costs.grade_ms)
        costs.observe("token_ms", writing_ms / opinion.written_tokens)
        if not opinion.shortened:
            costs.observe("summary_tokens", opinion.written_tokens)
    else:
        costs.observe("grade_ms", clock.timings_ms["describe"])
    if verdicts.asked:
        orders = 2 if plan.both_orders else 1
        costs.observe("pair_ms", clock.timings_ms["compare"] / (verdicts.asked * orders))
