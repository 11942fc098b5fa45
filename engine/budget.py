"""What a photo may cost: deadlines, measured costs, and the plan that fits.

A call to the model is never broken off, so what may run over is one call at a time: the prefill,
a token, a wave of comparisons. Costs are therefore planned with the spread that was seen of them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from meiqa.engine.model import RATING_TOKENS, GenerationStats, Model
from meiqa.engine.runtime.decoder import ROWS_PER_CALL
from meiqa.locations import user_cache
from meiqa.types import Budget

LOG = logging.getLogger(__name__)

UNBOUNDED = Budget()
WAVE = ROWS_PER_CALL
"""Neighbours compared before the deadline is looked at again."""
SHORT_SUMMARY_TOKENS = 16
USUAL_SHARE = 0.5
"""Share of its limit that a description is taken to need before one was seen."""
FEWEST_NEIGHBOURS = 4
HEADROOM = 1.15
"""Work is planned to take at least this much longer than measured."""
DEVIATIONS = 2.5
"""And at least as many mean deviations longer as this, where it has been seen to vary."""
SMOOTHING = 0.3
"""Weight of the newest measurement in a cost."""


class Deadline:
    """Knows what is left of a budget, counted from now, and how long each stage took."""

    def __init__(
        self, budget: Budget = UNBOUNDED, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.budget = budget
        self.timings_ms: dict[str, float] = {}
        self._clock, self._started = clock, clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self.timings_ms[name] = 1e3 * (self._clock() - began)

    @property
    def elapsed_ms(self) -> float:
        return 1e3 * (self._clock() - self._started)

    @property
    def remaining_ms(self) -> float | None:
        """What is left, None without a limit."""
        return None if self.budget.ms is None else self.budget.ms - self.elapsed_ms

    def stop_with(self, reserve_ms: float) -> Callable[[], bool]:
        """Give the rule that stops when less than so much is left."""
        return lambda: (left := self.remaining_ms) is not None and left < reserve_ms


@dataclass
class CostEstimate:
    """What something costs: the exponential mean of what was seen, and its relative spread."""

    expected: float = 0.0
    spread: float = 0.0

    def observe(self, cost: float) -> None:
        """Learn from one measurement; an outlier counts as at most twice the expected."""
        if self.expected == 0.0:
            self.expected = cost
            return
        off = min(1.0, abs(cost / self.expected - 1.0))
        self.spread += SMOOTHING * (off - self.spread)
        self.expected += SMOOTHING * (min(cost, 2.0 * self.expected) - self.expected)

    @property
    def careful(self) -> float:
        """The cost to plan with."""
        return self.expected * max(HEADROOM, 1.0 + DEVIATIONS * self.spread)


@dataclass(frozen=True)
class Plan:
    """What will be done for one photo: at most so many tokens, and so many comparisons."""

    summary_tokens: int
    neighbours: int
    both_orders: bool = True

    def pairs(self, neighbours: int) -> int:
        """Count the comparisons that so many neighbours take."""
        return neighbours * (2 if self.both_orders else 1)

    def losses(self, whole: Plan) -> tuple[str, ...]:
        """Name what this plan leaves out of a whole one."""
        losses = []
        if self.summary_tokens < whole.summary_tokens:
            losses.append("shorter summary" if self.summary_tokens else "no summary")
        if not self.neighbours and whole.neighbours:
            losses.append("initial score only")
        elif self.neighbours < whole.neighbours:
            losses.append(f"{self.neighbours} of {whole.neighbours} neighbours")
        if self.neighbours and whole.both_orders and not self.both_orders:
            losses.append("one order")
        return tuple(losses)


@dataclass(frozen=True)
class CostModel:
    """Milliseconds of the stages on this machine, learnt from every photo.

    Attributes:
        token: one written token; summary_tokens: tokens of a usual description (no milliseconds).
        pair: one comparison in one order, the neighbour's prefill included.
        rest: finding neighbours, fusing, naming distortions.
    """

    token: CostEstimate = field(default_factory=CostEstimate)
    summary_tokens: CostEstimate = field(default_factory=CostEstimate)
    pair: CostEstimate = field(default_factory=CostEstimate)
    grade: CostEstimate = field(default_factory=CostEstimate)
    rest: CostEstimate = field(default_factory=CostEstimate)

    def of(self, plan: Plan) -> float:
        """Give the milliseconds that a plan should take, with headroom."""
        words = min(self.summary_tokens.expected, plan.summary_tokens) * self.token.careful
        return self.grade.careful + words + self.of_pairs(plan, plan.neighbours) + self.rest.careful

    def of_pairs(self, plan: Plan, neighbours: int) -> float:
        return plan.pairs(neighbours) * self.pair.careful

    def affordable(self, plan: Plan, remaining_ms: float) -> int:
        """Count the neighbours that can be compared in the time left, at most a wave."""
        each_ms = max(self.of_pairs(plan, 1), 1e-6)
        return max(0, min(WAVE, int((remaining_ms - self.rest.careful) / each_ms)))

    def writing_reserve_ms(self, plan: Plan) -> float:
        """Give the ms to be left when the description ends: for a rating and a few neighbours."""
        rating_ms = RATING_TOKENS * self.token.careful
        pairs_ms = self.of_pairs(plan, min(FEWEST_NEIGHBOURS, plan.neighbours))
        return rating_ms + pairs_ms + self.rest.careful

    def observe(
        self, timings_ms: dict[str, float], plan: Plan, stats: GenerationStats, compared: int
    ) -> None:
        """Learn from the photo just done."""
        if stats.tokens:
            writing_ms = max(0.0, timings_ms["describe"] - self.grade.expected)
            self.token.observe(writing_ms / stats.tokens)
            if stats.complete:
                self.summary_tokens.observe(stats.tokens)
        else:
            self.grade.observe(timings_ms["describe"])
        rest = ("retrieve", "fuse", "patterns")
        self.rest.observe(sum(timings_ms.get(stage, 0.0) for stage in rest))
        if compared:
            self.pair.observe(timings_ms["compare"] / plan.pairs(compared))

    @classmethod
    def measure(cls, model: Model, clock: Callable[[], float] = time.perf_counter) -> CostModel:
        """Time each stage warm, on a blank photo; compiles what is compiled on first use."""
        image = model.image
        side = math.isqrt(image.max_pixels) // image.cell_pixels * image.cell_pixels
        blank = model.encode(np.full((side, side, 3), 127, np.uint8))
        (prefix,) = model.prefill([blank])
        for _ in range(2):
            deadline = Deadline(clock=clock)
            with deadline.stage("describe"):
                written = max(1, model.describe(prefix, SHORT_SUMMARY_TOKENS).stats.tokens)
            with deadline.stage("grade"):
                model.grade(prefix)
            with deadline.stage("pairs"):
                model.prefer_first([prefix], [blank] * WAVE)
                model.prefer_first(model.prefill([blank] * WAVE), [blank] * WAVE)
        taken = deadline.timings_ms
        return cls(
            token=CostEstimate(taken["describe"] / written),
            summary_tokens=CostEstimate(USUAL_SHARE * model.summary_tokens),
            pair=CostEstimate(taken["pairs"] / (2 * WAVE)),
            grade=CostEstimate(taken["grade"]),
        )

    def write(self, path: Path) -> None:
        """Keep the costs for later processes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(unfinished, path)

    @classmethod
    def read(cls, path: Path) -> CostModel | None:
        """Read costs that were kept; None if none were, or they are not of this version."""
        names = {each.name for each in fields(cls)}
        try:
            values = json.loads(path.read_text())
            if values.keys() == names:
                return cls(**{name: CostEstimate(**values[name]) for name in names})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            LOG.warning("%s cannot be read: %s", path, error)
            return None
        except (AttributeError, TypeError):
            pass  # something else that is JSON
        LOG.warning("%s holds other costs; meiqa bench costs measures them anew", path)
        return None


@dataclass(frozen=True)
class PairTime:
    """What is left of a deadline for the pairs of a set; `costs` is None without a limit."""

    deadline: Deadline
    costs: CostModel | None = None

    @property
    def affordable(self) -> int:
        """Pairs, in both orders, that can be asked before the time is looked at again."""
        left_ms = self.deadline.remaining_ms
        if left_ms is None or self.costs is None:
            return sys.maxsize
        return self.costs.affordable(Plan(0, WAVE), left_ms)


def costs_file(package_digest: str, device: str, threads: int | None) -> Path:
    """Where `meiqa bench costs` keeps the costs of a package on this machine."""
    name = f"{package_digest[:16]}-{device}-{threads or os.cpu_count()}.json"
    return user_cache() / "costs" / name


def plan_work(
    whole: Plan, order: Sequence[str], remaining_ms: float | None, costs: CostModel | None
) -> Plan:
    """Give the first plan, in the package's order of degradation, that fits the time left."""
    if remaining_ms is None or costs is None:
        return whole
    for plan in degraded_plans(whole, order):
        if costs.of(plan) <= remaining_ms:
            return plan
    return Plan(0, 0)


def degraded_plans(whole: Plan, order: Sequence[str]) -> Iterator[Plan]:
    """Give a plan and its lesser versions.

    Args:
        order: what is given up first: "text", "neighbours" and "orders". A few neighbours are kept
            until the end, unless they bring less than the text and so go before it.
    """
    plan = whole
    yield plan
    for part in order:
        if part == "orders" and plan.neighbours:
            plan = replace(plan, both_orders=False)
            yield plan
        elif part == "neighbours":
            while plan.neighbours > FEWEST_NEIGHBOURS:
                plan = replace(plan, neighbours=plan.neighbours - 1)
                yield plan
        elif part == "text":
            if plan.neighbours < whole.neighbours:
                plan = replace(plan, neighbours=0)
                yield plan
            for tokens in (SHORT_SUMMARY_TOKENS, 0):
                if tokens < plan.summary_tokens:
                    plan = replace(plan, summary_tokens=tokens)
                    yield plan
    for fewer in range(plan.neighbours - 1, -1, -1):
        yield replace(plan, neighbours=fewer)
