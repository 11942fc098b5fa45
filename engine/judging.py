"""What is found out about one photo: read, described, compared with its neighbours, fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.caches import ByteLru, CacheState, ContentKey
from meiqa.engine.comparing import WAVE, Comparer, Verdicts, all_in_order
from meiqa.engine.decoding import Decoding
from meiqa.engine.drafting import Draft
from meiqa.engine.fusing import Posterior, calibrated, fuse, solution
from meiqa.engine.images import Pixels, fit_to_grid
from meiqa.engine.manifest import ImageProcessing
from meiqa.engine.package import EnginePackage
from meiqa.engine.planning import (
    CostModel,
    Plan,
    Stopwatch,
    measure_costs,
    most_telling,
    plan_work,
    read_costs,
)
from meiqa.engine.ranking import Contestant
from meiqa.engine.scoring import Opinion, first_opinion, informed
from meiqa.engine.views import view_of
from meiqa.engine.vlm import Floats, Prefix, VisualTokens, Vlm
from meiqa.errors import ImageError, ImageTooSmall
from meiqa.memory import (
    Case,
    MemoryBank,
    RetrievalPolicy,
    Snapshot,
    layout,
    retrieval_key,
)
from meiqa.types import (
    Budget,
    KeyKind,
    Neighbour,
)

PHOTO_CACHE_BYTES = 12 << 20
ANCHOR_CACHE_BYTES = 80 << 20
SMALLEST_SIDE = 16
DRAFTS = RetrievalPolicy(k=16)
"""Cases whose summaries are drafts of a photo's: likely ones, and of all scores, so that most words
that the model may write are in one of them."""
UNBOUNDED = Budget()


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo that the model has read.

    Attributes:
        known: its prefix was kept from an earlier call.
    """

    pixels: Pixels
    prefix: Prefix
    known: bool


@dataclass(frozen=True, eq=False)
class Judgement:
    """What was found out about a photo, before it is reflected on."""

    photo: Photo
    plan: Plan
    opinion: Opinion
    key: Floats
    neighbours: tuple[Case, ...]
    verdicts: Verdicts
    posterior: Posterior


class PhotoJudge:
    """Judges photos one at a time.

    Args:
        vlm: the model.
        package: its settings.
        memory: whose kind of key photos get.
        costs_file: where measured costs are kept.
        drafting: whether descriptions are drafted from remembered ones.
    """

    def __init__(
        self,
        vlm: Vlm,
        package: EnginePackage,
        memory: MemoryBank,
        *,
        costs_file: Path | None = None,
        drafting: bool = True,
    ) -> None:
        self.vlm, self.package = vlm, package
        self.calibration = package.manifest.calibration
        self.comparer = Comparer(vlm, package.digest, ByteLru(ANCHOR_CACHE_BYTES))
        self._memory, self._drafting = memory, drafting
        self._summary_tokens = package.manifest.prompt.summary_tokens
        self._photos: ByteLru[Prefix] = ByteLru(PHOTO_CACHE_BYTES)
        self._costs: CostModel | None = None
        self._costs_file = costs_file

    def judge(
        self,
        decoding: Decoding,
        snapshot: Snapshot,
        policy: RetrievalPolicy,
        clock: Stopwatch,
        costs: CostModel | None,
    ) -> Judgement:
        """Decode, read, describe, retrieve, compare and fuse."""
        with clock.stage("decode"):
            pixels = decoding.pixels()
        with clock.stage("read"):
            photo = self.read(pixels)
        plan = plan_work(policy.k, self._summary_tokens, clock.remaining_ms, costs)
        with clock.stage("describe"):
            drafts = self._drafts(photo, snapshot) if plan.summary_tokens else ()
            opinion = first_opinion(
                self.vlm,
                photo.prefix,
                self.calibration,
                plan.summary_tokens,
                drafts,
                writing_deadline(plan, clock, costs),
                head=self.package.manifest.score_head,
            )
        with clock.stage("retrieve"):
            tokens = photo.prefix.tokens
            opinion = informed(opinion, snapshot.regression, tokens.values, self.calibration)
            summary_key = self._projected_key(photo) if opinion.key is None else opinion.key
            key = retrieval_key(self._memory.key_kind, summary_key, tokens.values)
            neighbours = snapshot.retrieve(
                key,
                replace(policy, k=plan.neighbours),
                exclude_digest=pixels.digest,
                layout=layout(tokens.values, tokens.grid),
            )
        with clock.stage("compare"):
            verdicts = self._compared(photo, opinion, neighbours, plan, clock, costs)
        with clock.stage("fuse"):
            posterior = fuse(
                opinion.prior,
                opinion.prior_std,
                neighbours,
                verdicts.preferences,
                self.calibration,
            )
        return Judgement(photo, plan, opinion, key, neighbours, verdicts, posterior)

    def read(self, pixels: Pixels) -> Photo:
        """Encode and read a photo, unless the same pixels were read before."""
        image = self.vlm.image
        fitted = fitted_to(pixels, image)
        grid = fitted.shape[0] // image.cell_pixels, fitted.shape[1] // image.cell_pixels
        key = ContentKey(pixels.digest, grid, self.package.digest)
        known = self._photos.get(key)
        prefix = known or self.vlm.read([self.vlm.encode(fitted)])[0]
        if known is None:
            self._photos.put(key, prefix)
        return Photo(pixels, prefix, known is not None)

    def _compared(
        self,
        photo: Photo,
        opinion: Opinion,
        neighbours: tuple[Case, ...],
        plan: Plan,
        clock: Stopwatch,
        costs: CostModel | None,
    ) -> Verdicts:
        """Compare in waves until the budget's time or precision is reached."""

        scores = np.array([case.score for case in neighbours])
        stds = np.array([case.std for case in neighbours])

        def next_wave(preferences: NDArray[np.float64]) -> NDArray[np.intp]:
            calibration, remaining_ms = self.calibration, clock.remaining_ms
            most = WAVE
            if remaining_ms is not None and costs is not None:
                most = costs.affordable(plan, remaining_ms)
            so_far = solution(opinion.prior, neighbours, preferences, calibration)
            if clock.budget.std is not None and not np.isnan(preferences).all():
                most = 0 if calibrated(*so_far, calibration).std <= clock.budget.std else most
            return most_telling(*so_far, scores, stds, preferences, calibration.sigma, most)

        return self.comparer.compare(
            photo.prefix,
            neighbours,
            both_orders=plan.both_orders,
            temperature=self.calibration.temperature,
            next_wave=all_in_order if clock.budget == UNBOUNDED else next_wave,
        )

    def counters(self, judged: Judgement, before: CacheState) -> dict[str, int]:
        """What a photo took, and what the caches hold after it."""
        effort, verdicts = judged.opinion.effort, judged.verdicts
        caches = self.caches()
        return {
            "visual_tokens": len(judged.photo.prefix.tokens.values),
            "photo_cache_hits": int(judged.photo.known),
            "written_tokens": judged.opinion.written_tokens,
            "writing_calls": effort.calls,
            "drafted_tokens": effort.drafted,
            "accepted_tokens": effort.accepted,
            "comparisons": verdicts.asked * (2 if judged.plan.both_orders else 1),
            "reused_tokens": verdicts.reused_tokens,
            "photo_cache_bytes": caches["photos"].used_bytes,
            "anchor_cache_hits": caches["neighbours"].hits - before.hits,
            "anchor_cache_misses": caches["neighbours"].misses - before.misses,
            "anchor_cache_bytes": caches["neighbours"].used_bytes,
        }

    def caches(self) -> dict[str, CacheState]:
        """How the caches stand: what was read of photos, and of neighbours.

        Both hold a picture's visual tokens with the keys and values of its prefix. Decoded pixels
        are not kept: finding out that a file is the same takes decoding it.
        """
        return {"photos": self._photos.state, "neighbours": self.comparer.anchor_prefixes.state}

    def forget_photos(self) -> None:
        """Drop what was read of photos, so that each is read anew; neighbours are kept."""
        self._photos = ByteLru(PHOTO_CACHE_BYTES)

    def _drafts(self, photo: Photo, snapshot: Snapshot) -> tuple[Draft, ...]:
        """Guesses at what will be written about a photo."""
        if not self._drafting:
            return ()
        return remembered_drafts(
            snapshot,
            self._memory.key_kind,
            photo.prefix.tokens,
            self.package.array("key_projection.npy"),
            photo.pixels.digest,
        )

    def _projected_key(self, photo: Photo) -> Floats:
        """Retrieval key of a photo about which nothing was written."""
        return projected_key(photo.prefix.tokens, self.package.array("key_projection.npy"))

    def measure(self) -> CostModel:
        """Measure the costs anew, from nothing."""
        self._costs = measure_costs(self.vlm, self.calibration, self._summary_tokens)
        return self._costs

    def costs(self) -> CostModel:
        """Costs on this machine, measured once with a blank photo."""
        if self._costs is None:
            # Even where costs are known, this compiles and allocates what a first call does.
            now = self.measure()
            kept = None if self._costs_file is None else read_costs(self._costs_file)
            self._costs = kept or now
        return self._costs


def fitted_to(pixels: Pixels, image: ImageProcessing) -> NDArray[np.uint8]:
    """A photo on the vision tower's grid.

    Raises:
        ImageTooSmall: there is too little to judge.
        ImageError: it is too elongated.
    """
    height, width = pixels.array.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise ImageTooSmall(
            f"{pixels.name} is too small to be judged",
            seen=f"{width} x {height} pixels",
            allowed=f"at least {SMALLEST_SIDE} on each side",
        )
    try:
        return fit_to_grid(
            pixels.array,
            multiple=image.cell_pixels,
            min_pixels=image.min_pixels,
            max_pixels=image.max_pixels,
        )
    except ImageError as error:
        raise type(error)(
            f"{pixels.name}: {error.what}", seen=error.seen, allowed=error.allowed, hint=error.hint
        ) from error


def writing_deadline(plan: Plan, clock: Stopwatch, costs: CostModel | None) -> Callable[[], bool]:
    """Whether the time has come to end a description, for what comes after it to be in time."""
    if costs is None:
        return lambda: False
    needed_ms = costs.writing_ends_ms(plan)
    return lambda: clock.remaining_ms is not None and clock.remaining_ms < needed_ms


def projected_key(tokens: VisualTokens, projection: NDArray[np.float32]) -> Floats:
    """Guess a summary's key from visual tokens: their mean through a linear map (D + 1, D_key)."""
    mean = np.append(tokens.values.mean(axis=0), np.float32(1.0))
    key: Floats = mean @ projection
    return key


def remembered_drafts(
    snapshot: Snapshot,
    kind: KeyKind,
    tokens: VisualTokens,
    projection: NDArray[np.float32],
    exclude_digest: str | None,
) -> tuple[Draft, ...]:
    """Summaries and scores of the cases nearest to a picture about which nothing is written yet.

    Args:
        snapshot: the memory.
        kind: of its keys.
        tokens: the picture.
        projection: see `projected_key`.
        exclude_digest: digest of the picture's own pixels, whose cases are left out.
    """
    key = retrieval_key(kind, projected_key(tokens, projection), tokens.values)
    cases = snapshot.retrieve(key, DRAFTS, exclude_digest)
    return tuple(Draft(case.summary, case.score) for case in cases if case.summary)


def degradations(judged: Judgement) -> tuple[str, ...]:
    """Everything that was left out or went another way."""
    opinion, asked, retrieved = judged.opinion, judged.verdicts.asked, len(judged.neighbours)
    notes = list(judged.plan.degraded)
    if opinion.shortened and "shorter summary" not in notes:
        notes.append("summary cut at the token limit")
    if opinion.unreadable:
        notes.append("rating unreadable: scored by grade word")
    if asked < retrieved:
        notes.append(f"stopped after {asked} of {retrieved} neighbours")
    if judged.neighbours and not judged.key.any():
        notes.append("neighbours not chosen by likeness: the package has no image key")
    return tuple(notes)


def contestant(judged: Judgement, *, views: bool) -> Contestant:
    """A judged photo in a ranking, with its view where that is asked for."""
    return Contestant(
        path=judged.photo.pixels.name,
        image_digest=judged.photo.pixels.digest,
        tokens=judged.photo.prefix.tokens.values,
        grid=judged.photo.prefix.tokens.grid,
        prior=judged.opinion.prior,
        score=judged.posterior.score,
        neighbours=as_neighbours(judged.neighbours, judged.verdicts),
        summary=judged.opinion.summary,
        view=view_of(judged.photo.pixels.array) if views else None,
    )


def as_neighbours(cases: tuple[Case, ...], verdicts: Verdicts) -> tuple[Neighbour, ...]:
    """Neighbours as they stand in an assessment."""
    return tuple(
        Neighbour(
            id=case.id,
            origin=case.origin,
            score=case.score,
            std=case.std,
            preference=None if np.isnan(preference) else float(preference),
        )
        for case, preference in zip(cases, verdicts.preferences, strict=True)
    )
