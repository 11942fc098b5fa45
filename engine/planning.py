"""What a budget buys: a plan made from measured costs, given up in a declared order.

A call to the model is never broken off, so what may run over is one call at a time: reading the
photo, a token, a wave. Costs are therefore planned with the spread that was seen of them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.comparing import WAVE, Verdicts
from meiqa.engine.manifest import Calibration
from meiqa.engine.scoring import Opinion
from meiqa.engine.vlm import RATING_TOKENS, ROWS_PER_CALL, Vlm
from meiqa.kernels.thurstone import thurstone_map
from meiqa.locations import user_cache
from meiqa.types import Budget

LOG = logging.getLogger(__name__)

SHORT_SUMMARY_TOKENS = 16
USUAL_SHARE = 0.5
"""Share of its limit that a description is taken to need before one was seen."""
FEWEST_NEIGHBOURS = 4
HEADROOM = 1.15
"""Stages are planned to take at least this much longer than measured."""
DEVIATIONS = 2.5
"""And at least as many mean deviations longer as this, where they have been seen to vary."""
_FALL = 1.0 - 2.0 / math.pi
"""φ²/(Φ(1 - Φ)) is close to (2/π) exp(-_FALL z²), since 4 Φ(1 - Φ) is to exp(-2z²/π)."""
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
        rest_ms: what there is to do beside: finding neighbours, fusing, naming distortions.
        spreads: mean deviation of each cost, as a share of it.
    """

    token_ms: float
    summary_tokens: float
    pair_ms: float
    grade_ms: float
    rest_ms: float = 0.0
    spreads: dict[str, float] = field(default_factory=dict)

    def observe(self, name: str, value: float) -> None:
        """Move one cost, and its spread, towards a measurement."""
        before = getattr(self, name)
        if before == 0.0:
            setattr(self, name, value)
            return
        # One that took ages, because something was busy, does not count as more than twice as long.
        off = min(1.0, abs(value / before - 1.0))
        self.spreads[name] = self.spreads.get(name, 0.0) * (1 - SMOOTHING) + SMOOTHING * off
        setattr(self, name, before * (1 - SMOOTHING) + SMOOTHING * value)

    def of(self, plan: Plan) -> float:
        """Milliseconds that a plan should take, with headroom."""
        words = min(self.summary_tokens, plan.summary_tokens) * self._careful("token_ms")
        waves = self.of_wave(plan, plan.neighbours)
        return self._careful("grade_ms") + words + waves + self._careful("rest_ms")

    def of_wave(self, plan: Plan, neighbours: int) -> float:
        """Milliseconds that a wave of comparisons should take, with headroom."""
        return neighbours * (2 if plan.both_orders else 1) * self._careful("pair_ms")

    def affordable(self, plan: Plan, remaining_ms: float) -> int:
        """Neighbours that can be asked about in the time left, at most a wave."""
        spare_ms = remaining_ms - self._careful("rest_ms")
        return max(0, min(WAVE, int(spare_ms / self.of_wave(plan, 1))))

    def writing_ends_ms(self, plan: Plan) -> float:
        """Milliseconds that have to be left when the description ends.

        Enough to print a rating and to ask about the fewest neighbours.
        """
        rating_ms = RATING_TOKENS * self._careful("token_ms")
        waves = self.of_wave(plan, min(FEWEST_NEIGHBOURS, plan.neighbours))
        return rating_ms + waves + self._careful("rest_ms")

    def _careful(self, name: str) -> float:
        """A cost with its headroom."""
        cost: float = getattr(self, name)
        return cost * max(HEADROOM, 1.0 + DEVIATIONS * self.spreads.get(name, 0.0))


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


def most_telling(
    score: float,
    std: float,
    scores: NDArray[np.float64],
    stds: NDArray[np.float64],
    preferences: NDArray[np.float64],
    sigma: float,
    count: int,
) -> NDArray[np.intp]:
    """Whom to ask about next: whose answers are expected to shrink the variance most.

    An answer about neighbour j adds φ²/(Φ(1 - Φ)) / w_j² at z = (s - s_j)/w_j to the curvature of
    the loss, w_j² = σ² + std_j², if it turns out as the score predicts. Its expectation over what
    is believed of the score is compared, in closed form since it is nearly a Gaussian in z; the
    variance that is left falls with it.

    Args:
        score, std: what is believed so far.
        scores, stds: of the neighbours, (K,).
        preferences: (K,), NaN where nothing was asked.
        sigma: spread of a comparison.
        count: how many.

    Returns:
        Indices, the most telling first; between equals those that come first.
    """
    unasked = np.flatnonzero(np.isnan(preferences))
    widths = np.hypot(sigma, stds[unasked])
    z = (score - scores[unasked]) / widths
    broadened = 1.0 + 2.0 * _FALL * (std / widths) ** 2
    information = np.exp(-_FALL * z * z / broadened) / (np.sqrt(broadened) * widths**2)
    order: NDArray[np.intp] = unasked[np.argsort(-information, kind="stable")[:count]]
    return order


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
    rest = ("retrieve", "fuse", "patterns")
    costs.observe("rest_ms", sum(clock.timings_ms.get(stage, 0.0) for stage in rest))
    if verdicts.asked:
        orders = 2 if plan.both_orders else 1
        costs.observe("pair_ms", clock.timings_ms["compare"] / (verdicts.asked * orders))


def costs_file(package_digest: str, device: str, threads: int | None) -> Path:
    """Where `meiqa bench calibrate` keeps the costs of a package on this machine."""
    name = f"{package_digest[:16]}-{device}-{threads or os.cpu_count()}.json"
    return user_cache() / "costs" / name


def write_costs(costs: CostModel, path: Path) -> None:
    """Keep costs for later processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(costs), indent=2) + "\n")
    os.replace(unfinished, path)


def read_costs(path: Path) -> CostModel | None:
    """The costs that were kept; None if none were, or they are not of this version."""
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        LOG.warning("%s cannot be read: %s", path, error)
        return None
    names = {each.name for each in fields(CostModel)}
    if not isinstance(values, dict) or values.keys() != names:
        LOG.warning("%s holds other costs; meiqa bench calibrate measures them anew", path)
        return None
    return CostModel(**values)
