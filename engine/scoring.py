"""The way of one photo: decode, read, describe, retrieve, compare, fuse, patterns, reflect.

`Scorer.score` is the only place where a photo is scored. Engine, sets, service, evaluation and
calibration all call it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.budget import (
    UNBOUNDED,
    WAVE,
    CostModel,
    Deadline,
    Plan,
    plan_work,
)
from meiqa.engine.comparing import MOST_AT_ONCE, CacheState, Comparer, PrefixCache
from meiqa.engine.detail import measure_detail
from meiqa.engine.estimates import (
    UNDOUBTED,
    Comparisons,
    Doubt,
    Estimate,
    Evidence,
    Grading,
    Posterior,
    before_comparisons,
    fold,
    grading_of,
    mapped,
    preferences_of,
    quality_word,
)
from meiqa.engine.images import ImageSource, Pixels, fit_to_grid
from meiqa.engine.measures import LEAD, verdict_sentence
from meiqa.engine.model import (
    Description,
    Draft,
    Floats,
    GenerationStats,
    Model,
    Prefix,
    StopRule,
)
from meiqa.engine.patterns import PatternScore, PatternScorer, ReferencePhoto, required
from meiqa.engine.prompts import LEVEL_WORDS
from meiqa.engine.shots import ALIKE, likenesses, view_of
from meiqa.errors import StoreError
from meiqa.memory import (
    Case,
    MemoryBank,
    RetrievalPolicy,
    Snapshot,
    retrieval_key,
    spatial_descriptor,
    token_features,
)
from meiqa.types import Assessment, Budget, Detail, Embedding, Neighbour, Reference

LOG = logging.getLogger(__name__)

DRAFTS = RetrievalPolicy(k=16)
"""Cases whose summaries are drafts of a photo's: likely ones, and of all scores, so that most words
that the model may write are in one of them."""

SMALL_PIXELS = 250_000
"""Photos of fewer are said to be small: at a screen's size they look worse than they score."""


@dataclass(frozen=True)
class ScoreRequest:
    """One photo, with settings of its own; see `meiqa.Engine.score`.

    The budget is what may be spent from when the photo is taken up.
    """

    image: ImageSource
    budget: Budget | None = None
    k: int | None = None
    learn: bool = True
    detail: bool = True
    embedding: bool = False


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says of a photo before any comparison.

    Attributes:
        words: (5,) probabilities of the grade words, of which the score head makes `grading`.
        estimates: rating and grade.
    """

    words: NDArray[np.float64]
    grading: Grading
    description: Description | None
    estimates: tuple[Estimate, ...]

    @property
    def stats(self) -> GenerationStats:
        return GenerationStats() if self.description is None else self.description.stats


@dataclass(frozen=True, eq=False)
class Scored:
    """A photo's score, and everything that was found on the way to it.

    Attributes:
        pixels, prefix: the photo; was_cached: its prefix was kept from an earlier call.
        neighbours: K remembered cases; logits: (K, 2) of the comparisons with them, see
            `Comparer.ask`; preferences: (K,) the same as probabilities, NaN where not asked.
        estimates: all of them, in the order in which they were folded into `posterior`.
        patterns: what the distortion patterns see; reference: what a reference brought; detail:
            what is seen at full size, and embedding, None where they were not asked for.
        reflection: the corrected description, None unless the gate opened.
        plan: what was done; whole: what would have been done without a limit.
        degraded: what was left out or went another way.
    """

    pixels: Pixels
    prefix: Prefix
    was_cached: bool
    prediction: Prediction
    key: Floats
    neighbours: tuple[Case, ...]
    logits: NDArray[np.float64]
    preferences: NDArray[np.float64]
    estimates: tuple[Evidence, ...]
    posterior: Posterior
    plan: Plan
    whole: Plan
    deadline: Deadline
    degraded: tuple[str, ...] = ()
    patterns: PatternScore | None = None
    reference: Reference | None = None
    detail: Detail | None = None
    embedding: Embedding | None = None
    reflection: str | None = None
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def initial_score(self) -> float:
        """The model's own score: the printed rating, or the grade where none was printed."""
        return self.prediction.estimates[0].score

    @property
    def asked(self) -> int:
        """How many of the neighbours it was compared with."""
        return int((~np.isnan(self.preferences)).sum())

    @property
    def hurried(self) -> bool:
        """Whether there was no time for all of its text and comparisons."""
        unasked = np.isnan(self.preferences).any() and self.deadline.budget.std is None
        return bool(unasked or self.plan.losses(self.whole))

    def noted(self, note: str) -> Scored:
        """Add a note on something that went another way."""
        return replace(self, degraded=(*self.degraded, note))

    @property
    def doubt(self) -> Doubt:
        """How much farther than usual such photographs are misjudged."""
        return next(each for each in self.estimates if isinstance(each, Doubt))

    def _size_note(self) -> tuple[str, ...]:
        """Name a photo of few pixels, if it is one."""
        height, width = self.pixels.array.shape[:2]
        small = height * width < SMALL_PIXELS
        return (f"small: judged as the {width} x {height} pixels it has",) if small else ()

    @property
    def summary(self) -> str | None:
        """What was written of the photo, in accord with the patterns."""
        description = self.prediction.description
        return None if description is None else self._in_accord(description.text)

    def _in_accord(self, text: str | None) -> str | None:
        """Bring what is written of damage, before what was measured, in accord with the patterns.

        What they see nothing of is left out; what they list is named where nothing is written.
        """
        seen = self.patterns
        if text and self.prefix.tokens.measured and seen:
            if seen.sees_little:
                text = text[max(0, text.find(LEAD)) :]
            elif text.startswith(LEAD) and seen.distortions:
                text = f"{seen.distortions[0].phrase}. {text}"
        return text or None

    def _reflected(self) -> str | None:
        """Give the corrected description; a verdict that it came to by itself is the score's."""
        text = self._in_accord(self.reflection)
        if text and self.prefix.tokens.measured:
            own = verdict_sentence(quality_word(self.posterior.score))
            for word in LEVEL_WORDS:
                text = text.replace(verdict_sentence(word), own)
        return text

    def estimate(self, name: str) -> Estimate | None:
        """Find the estimate of a source."""
        named = (e for e in self.estimates if isinstance(e, Estimate) and e.name == name)
        return next(named, None)

    def assessment(self, snapshot: Snapshot) -> Assessment:
        """Give the result as users see it."""
        regression = self.estimate("regression")
        return Assessment(
            path=self.pixels.name,
            score=self.posterior.score,
            std=self.posterior.std,
            ci95=self.posterior.ci95,
            initial_score=self.initial_score,
            word=quality_word(self.posterior.score),
            percentile=snapshot.percentile(self.posterior.score),
            summary=self.summary,
            memory_score=None if regression is None else regression.score,
            grades=dict(zip(LEVEL_WORDS, self.prediction.grading.grades.tolist(), strict=True)),
            distortions=() if self.patterns is None else self.patterns.distortions,
            reference=self.reference,
            detail=self.detail,
            embedding=self.embedding,
            neighbours=as_neighbours(self.neighbours, self.preferences),
            degraded=self.degraded + self._size_note(),
            reflection=self._reflected(),
            timings_ms={name: round(ms, 3) for name, ms in self.deadline.timings_ms.items()},
            counters=self.counters,
        )


class Scorer:
    """Scores photos, one at a time; its clock, in seconds, is that of budgets and costs.

    Args:
        retrieval: how neighbours are chosen; the model's numbers by default.
        costs_file: where measured costs are kept between processes.
        drafting: whether descriptions are drafted from remembered ones; by default they are if
            the model writes all of their words itself: where most are measured, drafts save less
            than they take.
    """

    def __init__(
        self,
        model: Model,
        memory: MemoryBank,
        retrieval: RetrievalPolicy | None = None,
        *,
        patterns: PatternScorer | None = None,
        costs_file: Path | None = None,
        drafting: bool | None = None,
    ) -> None:
        numbers = model.calibration
        self.model, self.memory, self.patterns = model, memory, patterns
        self.retrieval = retrieval or RetrievalPolicy(k=numbers.neighbours, bins=numbers.bins)
        self.clock: Callable[[], float] = time.perf_counter
        self.prefixes = PrefixCache.holding(model.largest_prefix_bytes)
        self.comparer = Comparer(model, self.prefixes)
        self._drafting, self._costs_file = drafting, costs_file
        self._costs: CostModel | None = None

    def score(
        self,
        decoded: Callable[[], Pixels],
        request: ScoreRequest,
        snapshot: Snapshot,
        reference: ReferencePhoto | None = None,
    ) -> Scored:
        """Score one photo: the whole way, in order.

        With a reference nothing is learned, since the score is that of the likeness as well.
        """
        limit = request.budget or UNBOUNDED
        # The first time they are measured, which no photo has to pay for.
        costs = None if limit.ms is None else self.costs()
        deadline = Deadline(limit, clock=self.clock)
        before = self.prefixes.state()["neighbours"]
        with deadline.stage("decode"):
            pixels = decoded()
        with deadline.stage("detail"):
            detail = (
                measure_detail(pixels.array, pixels.luminance_table) if request.detail else None
            )
        with deadline.stage("read"):
            prefix, was_cached = self.prefill(pixels)
        k = self.retrieval.k if request.k is None else replace(self.retrieval, k=request.k).k
        whole = Plan(self.model.summary_tokens, k)
        plan = plan_work(whole, self.model.calibration.degradation, deadline.remaining_ms, costs)
        with deadline.stage("describe"):
            pays = not prefix.tokens.measured if self._drafting is None else self._drafting
            drafts = self._drafts(pixels, prefix, snapshot) if pays and plan.summary_tokens else ()
            reserve = deadline.stop_with(costs.writing_reserve_ms(plan)) if costs else None
            prediction = self.predict(prefix, plan.summary_tokens, drafts, reserve)
        estimates: list[Evidence] = list(prediction.estimates)
        with deadline.stage("retrieve"):
            features = token_features(prefix.tokens.values)
            regression, doubt = self._recalled(features, snapshot)
            estimates += regression
            key = self._key(prefix, prediction.description)
            found = self._retrieve(pixels, prefix, key, plan, snapshot)
            neighbours = tuple(case for case in found if len(case.tokens))
        with deadline.stage("compare"):
            prior = before_comparisons(estimates)
            logits, compared, reused = self._compare(
                prefix, neighbours, prior, doubt, plan, deadline
            )
        with deadline.stage("fuse"):
            estimates += [compared, doubt]
            posterior = fold(estimates)
        with deadline.stage("patterns"):
            seen = self.patterns.seen(pixels, prefix.tokens, reference) if self.patterns else None
            if seen is not None and reference is not None:
                estimates.append(self._reference_estimate(seen, pixels, reference))
                posterior = fold(estimates)
        scored = Scored(
            pixels=pixels,
            prefix=prefix,
            was_cached=was_cached,
            prediction=prediction,
            key=key,
            neighbours=neighbours,
            logits=logits,
            preferences=compared.preferences,
            estimates=tuple(estimates),
            posterior=posterior,
            plan=plan,
            whole=whole,
            deadline=deadline,
            patterns=seen,
            detail=detail,
            embedding=(
                Embedding(self.model.digest, tuple(features.tolist()))
                if request.embedding
                else None
            ),
        )
        if costs:
            costs.observe(deadline.timings_ms, plan, prediction.stats, scored.asked)
        scored = replace(scored, degraded=self._degradations(scored))
        if bare := len(found) - len(neighbours):
            scored = scored.noted(
                f"not compared with {bare} neighbours: no tokens are kept of them"
            )
        if reference is not None:
            scored = self._beside(scored, reference)
        elif request.learn:
            scored = self._learn(scored)
        deadline.timings_ms["total"] = deadline.elapsed_ms
        counters = self._counters(scored, reused, before)
        if snapshot.pulled is not None:
            counters["hub_sequence"] = snapshot.pulled
        return replace(scored, counters=counters)

    def prefill(self, pixels: Pixels) -> tuple[Prefix, bool]:
        """Encode and read a photo, unless the same pixels were read before, and tell if so."""
        fitted = fit_to_grid(pixels, self.model.image)
        prefix = self.prefixes.get("photos", pixels.digest, self.model.grid_of(fitted))
        if prefix is not None:
            return prefix, True
        (prefix,) = self.model.prefill([self.model.encode(fitted)])
        self.prefixes.put("photos", pixels.digest, prefix)
        return prefix, False

    def graded(self, pixels: Pixels, snapshot: Snapshot) -> tuple[Prefix, Posterior]:
        """Read a photo and give what its grade and the regression say, with nothing written."""
        prefix, _ = self.prefill(pixels)
        regression, _ = self._recalled(token_features(prefix.tokens.values), snapshot)
        return prefix, before_comparisons([*self.predict(prefix, 0).estimates, *regression])

    def predict(
        self,
        prefix: Prefix,
        summary_tokens: int,
        drafts: Sequence[Draft] = (),
        stop: StopRule = None,
    ) -> Prediction:
        """Ask the model for a grade word and, unless `summary_tokens` is 0, for text and rating."""
        calibration, head = self.model.calibration, self.model.head
        words = self.model.grade(prefix)
        grading = grading_of(words, calibration, head)
        grade = Estimate("grade", grading.score, grading.std)
        if summary_tokens == 0:
            return Prediction(words, grading, None, (grade,))
        description = self.model.describe(prefix, summary_tokens, drafts, stop)
        # With another head the grade words alone are the score, whatever is printed.
        if description.rating is None or head != "text":
            return Prediction(words, grading, description, (grade,))
        printed = mapped(calibration.text, description.rating)
        rating = Estimate("rating", printed, calibration.text_std)
        both = (rating, replace(grade, share=calibration.grade_share))
        return Prediction(words, grading, description, both)

    def costs(self) -> CostModel:
        """Give the costs on this machine, measured once with a blank photo."""
        if self._costs is None:
            # Even where costs are known, this compiles and allocates what a first call does.
            now = self.measure_costs()
            kept = None if self._costs_file is None else CostModel.read(self._costs_file)
            self._costs = kept or now
        return self._costs

    def measure_costs(self) -> CostModel:
        """Measure the costs anew, from nothing."""
        self._costs = CostModel.measure(self.model, self.clock)
        return self._costs

    def keep_costs(self) -> CostModel:
        """Write down what is known of the costs, for later processes."""
        if self._costs_file is not None:
            self.costs().write(self._costs_file)
        return self.costs()

    def _drafts(self, pixels: Pixels, prefix: Prefix, snapshot: Snapshot) -> tuple[Draft, ...]:
        """Guess what will be written: summaries of cases near the picture's projected key."""
        cases = snapshot.retrieve(self._key(prefix), DRAFTS, pixels.digest)
        return tuple(Draft(case.summary, case.score) for case in cases if case.summary)

    def _recalled(self, features: Floats, snapshot: Snapshot) -> tuple[list[Estimate], Doubt]:
        """What the memory's regression on visual tokens says, where it has one, and its doubt."""
        regression = snapshot.regression
        if regression is None:
            return [], UNDOUBTED
        numbers, score = self.model.calibration, regression.score(features)
        trust = numbers.memory_correlation, numbers.memory_share
        said = Estimate("regression", score, regression.std, *trust)
        return [said], Doubt(regression.doubt(features))

    def _key(self, prefix: Prefix, description: Description | None = None) -> Floats:
        """Make the key by which neighbours are found: of what was written, or guessed."""
        written = None if description is None else description.key
        summary = self.model.unwritten_key(prefix.tokens) if written is None else written
        return retrieval_key(self.memory.key_kind, summary, prefix.tokens.values)

    def _retrieve(
        self, pixels: Pixels, prefix: Prefix, key: Floats, plan: Plan, snapshot: Snapshot
    ) -> tuple[Case, ...]:
        if not plan.neighbours:
            return ()
        policy = replace(self.retrieval, k=plan.neighbours)
        descriptor = spatial_descriptor(prefix.tokens.values, prefix.tokens.grid)
        return snapshot.retrieve(key, policy, exclude_digest=pixels.digest, descriptor=descriptor)

    def _comparisons(self, neighbours: Sequence[Case], logits: NDArray[np.float64]) -> Comparisons:
        scores = np.array([case.score for case in neighbours])
        stds = np.array([case.std for case in neighbours])
        calibration = self.model.calibration
        preferences = preferences_of(logits, calibration.temperature)
        return Comparisons(scores, stds, preferences, calibration)

    def _compare(
        self,
        prefix: Prefix,
        neighbours: Sequence[Case],
        prior: Posterior,
        doubt: Doubt,
        plan: Plan,
        deadline: Deadline,
    ) -> tuple[NDArray[np.float64], Comparisons, int]:
        """Compare in waves until all are asked, or the budget is: see `Comparer.ask`."""
        logits, reused = np.full((len(neighbours), 2), np.nan), 0
        while True:
            so_far = self._comparisons(neighbours, logits)
            wave = self._next_wave(so_far, prior, doubt, plan, deadline)
            if not len(wave):
                return logits, so_far, reused
            cases = [neighbours[index] for index in wave]
            logits[wave], saved = self.comparer.ask(prefix, cases, both_orders=plan.both_orders)
            reused += saved

    def _next_wave(
        self, so_far: Comparisons, prior: Posterior, doubt: Doubt, plan: Plan, deadline: Deadline
    ) -> NDArray[np.intp]:
        if deadline.budget == UNBOUNDED:
            return np.flatnonzero(np.isnan(so_far.preferences))[:MOST_AT_ONCE]
        most = WAVE
        if deadline.remaining_ms is not None:
            most = self.costs().affordable(plan, deadline.remaining_ms)
        wanted_std = deadline.budget.std
        if wanted_std is not None and not np.isnan(so_far.preferences).all():
            most = 0 if doubt.combined(so_far.combined(prior)).std <= wanted_std else most
        return so_far.most_informative(prior.score)[:most]

    def _degradations(self, scored: Scored) -> tuple[str, ...]:
        """Name everything that was left out or went another way."""
        notes = [*scored.pixels.notes, *scored.plan.losses(scored.whole)]
        description, retrieved = scored.prediction.description, len(scored.neighbours)
        if scored.prediction.stats.complete:  # few tokens were enough
            notes = [note for note in notes if note != "shorter summary"]
        elif "shorter summary" not in notes:
            notes.append("summary cut at the token limit")
        if description is not None and description.unreadable and self.model.head == "text":
            notes.append("rating unreadable: scored by grade word")
        if scored.asked < retrieved:
            notes.append(f"stopped after {scored.asked} of {retrieved} neighbours")
        if retrieved and not scored.key.any():
            notes.append("neighbours not chosen by likeness: the package has no image key")
        if not self.model.calibration.is_fitted:
            notes.append("package not calibrated: score and deviation are not fitted to people's")
        return tuple(notes)

    def _reference_estimate(
        self, seen: PatternScore, pixels: Pixels, reference: ReferencePhoto
    ) -> Estimate:
        """Give the hybrid score as one more estimate, with the deviation observed."""
        if reference.is_same(pixels):  # the top of the scale, whatever it looks like
            return Estimate("reference", seen.score, seen.std, share=1.0)
        correlation = required(self.patterns).calibration.correlation
        return Estimate("reference", seen.score, seen.std, correlation)

    def _beside(self, scored: Scored, reference: ReferencePhoto) -> Scored:
        """Say what a reference brought."""
        seen, patterns = scored.patterns, required(self.patterns)
        assert seen is not None
        without = fold(each for each in scored.estimates if each.name != "reference")
        brought = Reference(
            path=reference.pixels.name,
            score=seen.score,
            std=seen.std,
            weight=seen.weight,
            quality=patterns.judge(reference.tokens_beside(scored.pixels)).score,
            moved=scored.posterior.score - without.score,
        )
        one, other = (view_of(photo.array) for photo in (scored.pixels, reference.pixels))
        if not reference.is_same(scored.pixels) and likenesses([one], [other]) < ALIKE:
            scored = scored.noted("the reference may show another scene")
        return replace(scored, reference=brought)

    def _learn(self, scored: Scored) -> Scored:
        """Reflect on a score that moved a lot, and remember the photo, if it is to be."""
        deadline, description = scored.deadline, scored.prediction.description
        moved = abs(scored.posterior.score - scored.initial_score)
        gated = moved > self.model.calibration.reflect_above
        if not gated and self.memory.admission != "all":
            return scored
        if description is None:
            return scored.noted(f"not {'reflected' if gated else 'remembered'}: no summary")
        text, key, name, reflection = description.text, scored.key, scored.pixels.name, None
        provenance = f"reflected on {name}" if gated else f"scored {name}"
        if gated:
            left = deadline.remaining_ms
            # A corrected description takes about as long as the first.
            if left is not None and left < deadline.timings_ms["describe"]:
                return scored.noted("not reflected: no time")
            scores = scored.initial_score, scored.posterior.score
            with deadline.stage("reflect"):
                corrected = self.model.reflect(scored.prefix, text, *scores)
            if corrected.key is None:
                return scored.noted("not reflected: nothing was written")
            text = reflection = corrected.text
            key = self._key(scored.prefix, corrected)
        if self.memory.writable:  # whoever opened it was told if it is not
            try:
                case = learned_case(scored, text, key)
                self.memory.remember(case, provenance=provenance, gated=gated)
            except StoreError as error:
                LOG.warning("%s was not remembered: %s", name, error)
                scored = scored.noted(f"not remembered: {error.what}")
        return replace(scored, reflection=reflection)

    def _counters(self, scored: Scored, reused: int, before: CacheState) -> dict[str, int]:
        """Count what a photo took, and what the caches hold after it."""
        stats, caches = scored.prediction.stats, self.prefixes.state()
        photos, neighbours = caches["photos"], caches["neighbours"]
        return {
            "visual_tokens": len(scored.prefix.tokens.values),
            "photo_cache_hits": int(scored.was_cached),
            "written_tokens": stats.tokens,
            "writing_calls": stats.calls,
            "drafted_tokens": stats.drafted,
            "accepted_tokens": stats.accepted,
            "comparisons": scored.plan.pairs(scored.asked),
            "reused_tokens": reused,
            "photo_cache_bytes": photos.used_bytes,
            "anchor_cache_hits": neighbours.hits - before.hits,
            "anchor_cache_misses": neighbours.misses - before.misses,
            "anchor_cache_bytes": neighbours.used_bytes,
        }


def learned_case(scored: Scored, summary: str, key: Floats) -> Case:
    """Give a photo with its fused score as it is remembered; never an anchor."""
    tokens = scored.prefix.tokens
    return Case(
        id=scored.pixels.digest[:16],
        origin="contrast",
        image_digest=scored.pixels.digest,
        score=scored.posterior.score,
        std=scored.posterior.std,
        summary=summary,
        key=key,
        tokens=tokens.values,
        grid=tokens.grid,
    )


def as_neighbours(cases: Sequence[Case], preferences: NDArray[np.float64]) -> tuple[Neighbour, ...]:
    """Give neighbours as they stand in an assessment."""
    given = [None if np.isnan(preference) else float(preference) for preference in preferences]
    return tuple(
        Neighbour(case.id, case.origin, case.score, case.std, preference, case.device or None)
        for case, preference in zip(cases, given, strict=True)
    )
