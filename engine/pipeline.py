"""The way of a photo: decode, encode, read, describe, retrieve, compare, fuse, reflect."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.caches import ByteLru, ContentKey
from meiqa.engine.comparing import Comparer, Verdicts, preferences_of
from meiqa.engine.fusing import Posterior, fuse
from meiqa.engine.images import ImageSource, Pixels, fit_to_grid, load_pixels, source_name
from meiqa.engine.package import EnginePackage, ImageProcessing, check_device
from meiqa.engine.planning import (
    CostModel,
    Plan,
    Stopwatch,
    measure_costs,
    observe_costs,
    plan_work,
)
from meiqa.engine.reflecting import gate_opens, reflect
from meiqa.engine.remembering import open_memory
from meiqa.engine.runtime.base import GraphSession
from meiqa.engine.scoring import Opinion, first_opinion
from meiqa.engine.vlm import Floats, LocalVlm, Prefix, VisualTokens, Vlm
from meiqa.errors import ImageError, ImageTooSmall, StoreError, UsageError
from meiqa.locations import embedded_assets
from meiqa.memory import Case, MemoryBank, RetrievalPolicy, Snapshot
from meiqa.types import (
    Assessment,
    Budget,
    Failure,
    Neighbour,
    PairComparison,
    quality_word,
)

LOG = logging.getLogger(__name__)
PHOTO_CACHE_BYTES = 64 << 20
ANCHOR_CACHE_BYTES = 512 << 20
SMALLEST_SIDE = 16
UNBOUNDED = Budget()


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo that the model has read."""

    pixels: Pixels
    prefix: Prefix


class Engine:
    """Scores photos; a context manager.

    >>> with Engine.open() as engine:  # doctest: +SKIP
    ...     engine.score("photo.jpg", budget=Budget(ms=300)).score
    3.41
    """

    def __init__(self, vlm: Vlm, package: EnginePackage, memory: MemoryBank) -> None:
        self.package = package
        self.memory = memory
        self._vlm = vlm
        self._calibration = package.manifest.calibration
        self._summary_tokens = package.manifest.prompt.summary_tokens
        self._photos: ByteLru[Prefix] = ByteLru(PHOTO_CACHE_BYTES)
        self._comparer = Comparer(vlm, package.digest, ByteLru(ANCHOR_CACHE_BYTES))
        self._costs: CostModel | None = None

    @classmethod
    def open(
        cls,
        package: str | Path | None = None,
        memory: str | Path | None = None,
        *,
        device: str = "cpu",
        threads: int | None = None,
        verify: bool = True,
        learn: bool = True,
    ) -> Engine:
        """Open an engine.

        Args:
            package: directory of an engine package; the embedded one by default.
            memory: directory of a memory. One without anchors of its own gets the embedded
                anchors. By default what is learnt goes to the user's data directory, apart for
                each package.
            device: "cpu", "cuda", or "tensorrt" for engines that `meiqa build` made.
            threads: threads of the runtime; as many as there are cores by default.
            verify: compare digests of package and memory.
            learn: open the memory for writing, creating it if need be; False opens it read-only,
                and a `memory` must exist then.

        Raises:
            PackageError, StoreError, DeviceUnavailable, UsageError.
        """
        if threads is not None and threads < 1:
            raise UsageError("threads must be positive", seen=threads, allowed="1 or more")
        opened = EnginePackage.open(package or embedded_assets() / "package", verify=verify)
        vlm = LocalVlm(opened, *sessions_on(device, opened, threads, verify=verify))
        # Last, so that an engine that is refused does not hold the memory's lock.
        return cls(vlm, opened, open_memory(memory, opened.digest, verify=verify, learn=learn))

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the memory."""
        self.memory.close()

    def score(
        self,
        image: ImageSource,
        *,
        budget: Budget | None = None,
        k: int | None = None,
        learn: bool = True,
    ) -> Assessment:
        """Assess one photo.

        Args:
            image: path, encoded bytes, Pillow image or uint8 array.
            budget: what may be spent; everything by default.
            k: neighbours to compare with; the package's number by default.
            learn: remember the photo if the comparisons moved its score a lot.

        Raises:
            ImageError: the photo can't be judged.
            UsageError: k is negative.
        """
        (result,) = self.score_many([image], budget=budget, k=k, learn=learn)
        if isinstance(result, Failure):
            raise result.error
        return result

    def score_many(
        self,
        images: Iterable[ImageSource],
        *,
        budget: Budget | None = None,
        k: int | None = None,
        learn: bool = True,
    ) -> Iterator[Assessment | Failure]:
        """Assess photos one after the other; one that can't be judged gives a Failure.

        All of them see the memory as it is now, so neither their order nor their number changes a
        score; what they teach serves the next call. Arguments are those of `score`.
        """
        policy = RetrievalPolicy(
            k=self._calibration.neighbours if k is None else k, bins=self._calibration.bins
        )
        snapshot = self.memory.snapshot()
        return (
            self._result(image, snapshot, policy, budget or UNBOUNDED, learn) for image in images
        )

    def compare(self, first: ImageSource, second: ImageSource) -> PairComparison:
        """Ask which of two photos looks better, in both orders, and score both.

        Raises:
            ImageError: one of them can't be judged.
        """
        clock = Stopwatch(UNBOUNDED)
        scores = [self.score(image, learn=False).score for image in (first, second)]
        photos = [self._read(load_pixels(image)) for image in (first, second)]
        one, two = (photo.prefix for photo in photos)
        forth, back = self._vlm.prefer_first([one, two], [two.tokens, one.tokens])
        preference = preferences_of(np.array([[forth, -back]]), self._calibration.temperature)
        return PairComparison(
            first=photos[0].pixels.name,
            second=photos[1].pixels.name,
            preference=float(preference[0]),
            first_score=scores[0],
            second_score=scores[1],
            timings_ms={"total": clock.elapsed_ms},
        )

    def _result(
        self,
        image: ImageSource,
        snapshot: Snapshot,
        policy: RetrievalPolicy,
        budget: Budget,
        learn: bool,
    ) -> Assessment | Failure:
        try:
            return self._assess(image, snapshot, policy, budget, learn)
        except ImageError as error:
            return Failure(source_name(image), error)

    def _assess(
        self,
        image: ImageSource,
        snapshot: Snapshot,
        policy: RetrievalPolicy,
        budget: Budget,
        learn: bool,
    ) -> Assessment:
        """The way of one photo."""
        costs = self._measured_costs() if budget.ms is not None else None
        clock = Stopwatch(budget)
        with clock.stage("decode"):
            pixels = load_pixels(image)
        with clock.stage("read"):
            photo, known = self._read_or_known(pixels)
        plan = plan_work(policy.k, self._summary_tokens, clock.remaining_ms, costs)
        with clock.stage("describe"):
            opinion = first_opinion(self._vlm, photo.prefix, self._calibration, plan.summary_tokens)
        with clock.stage("retrieve"):
            key = self._projected_key(photo) if opinion.key is None else opinion.key
            neighbours = snapshot.retrieve(
                key, replace(policy, k=plan.neighbours), exclude_digest=pixels.digest
            )
        with clock.stage("compare"):
            verdicts = self._compared(photo, opinion, neighbours, plan, clock, costs)
        with clock.stage("fuse"):
            posterior = fuse(
                opinion.prior,
                opinion.prior_std,
                neighbours,
                verdicts.preferences,
                self._calibration,
            )
        if costs:
            observe_costs(costs, clock, opinion, verdicts, plan)
        reflection, notes = None, degradations(plan, opinion, verdicts, len(neighbours))
        if neighbours and not key.any():
            notes += ("neighbours not chosen by likeness: the package has no image key",)
        if learn and gate_opens(opinion, posterior, self._calibration.reflect_above):
            with clock.stage("reflect"):
                reflection, unlearnt = self._learn(photo, opinion, posterior, clock)
            notes += unlearnt
        clock.timings_ms["total"] = clock.elapsed_ms
        return Assessment(
            path=pixels.name,
            score=posterior.score,
            std=posterior.std,
            ci95=posterior.ci95,
            initial_score=opinion.score,
            word=quality_word(posterior.score),
            percentile=snapshot.percentile(posterior.score),
            summary=opinion.summary,
            neighbours=as_neighbours(neighbours, verdicts),
            degraded=notes,
            reflection=reflection,
            timings_ms={name: round(ms, 3) for name, ms in clock.timings_ms.items()},
            counters={
                "visual_tokens": len(photo.prefix.tokens.values),
                "photo_cache_hits": int(known),
                "written_tokens": opinion.written_tokens,
                "comparisons": verdicts.asked * (2 if plan.both_orders else 1),
                "reused_tokens": verdicts.reused_tokens,
                "anchor_cache_bytes": self._comparer.anchor_prefixes.used_bytes,
            },
        )

    def _read(self, pixels: Pixels) -> Photo:
        return self._read_or_known(pixels)[0]

    def _read_or_known(self, pixels: Pixels) -> tuple[Photo, bool]:
        """Encode and read a photo, unless the same pixels were read before."""
        image = self._vlm.image
        fitted = fitted_to(pixels, image)
        grid = fitted.shape[0] // image.cell_pixels, fitted.shape[1] // image.cell_pixels
        key = ContentKey(pixels.digest, grid, self.package.digest)
        known = self._photos.get(key)
        prefix = known or self._vlm.read([self._vlm.encode(fitted)])[0]
        if known is None:
            self._photos.put(key, prefix)
        return Photo(pixels, prefix), known is not None

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

        def go_on(preferences: NDArray[np.float64], next_wave: int) -> bool:
            if clock.budget.std is not None:
                so_far = fuse(
                    opinion.prior, opinion.prior_std, neighbours, preferences, self._calibration
                )
                if so_far.std <= clock.budget.std:
                    return False
            remaining_ms = clock.remaining_ms
            if remaining_ms is None or costs is None:
                return True
            return remaining_ms >= costs.of_wave(plan, next_wave)

        return self._comparer.compare(
            photo.prefix,
            opinion.score,
            neighbours,
            both_orders=plan.both_orders,
            temperature=self._calibration.temperature,
            go_on=go_on,
        )

    def _learn(
        self, photo: Photo, opinion: Opinion, posterior: Posterior, clock: Stopwatch
    ) -> tuple[str | None, tuple[str, ...]]:
        """Reflect and remember; the corrected description and what could not be done."""
        if opinion.summary is None:
            return None, ("not reflected: no summary",)
        if clock.remaining_ms is not None and clock.remaining_ms < self._reflection_ms(clock):
            return None, ("not reflected: no time",)
        reflection = reflect(
            self._vlm,
            photo.prefix,
            photo.pixels.digest,
            opinion.summary,
            opinion.score,
            posterior,
        )
        if reflection is None:
            return None, ("not reflected: nothing was written",)
        try:
            self.memory.remember(reflection.case, provenance=f"reflected on {photo.pixels.name}")
        except StoreError as error:
            LOG.warning("%s was not remembered: %s", photo.pixels.name, error)
            return reflection.description.text, (f"not remembered: {error.what}",)
        return reflection.description.text, ()

    def _reflection_ms(self, clock: Stopwatch) -> float:
        """A corrected description takes about as long as the first."""
        return clock.timings_ms["describe"]

    def _projected_key(self, photo: Photo) -> Floats:
        """Retrieval key of a photo about which nothing was written."""
        return projected_key(photo.prefix.tokens, self.package.array("key_projection.npy"))

    def _measured_costs(self) -> CostModel:
        """Costs on this machine, measured once with a blank photo."""
        if self._costs is None:
            self._costs = measure_costs(self._vlm, self._calibration, self._summary_tokens)
        return self._costs


def sessions_on(
    device: str, package: EnginePackage, threads: int | None, *, verify: bool
) -> tuple[GraphSession, GraphSession]:
    """The package's graphs on a device; only the runtime that is asked for is imported."""
    check_device(device)
    if device == "tensorrt":
        from meiqa.engine.runtime.tensorrt import open_tensorrt_sessions

        return open_tensorrt_sessions(package, verify=verify)
    from meiqa.engine.runtime.onnx import open_sessions

    return open_sessions(package, device, threads)


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


def projected_key(tokens: VisualTokens, projection: NDArray[np.float32]) -> Floats:
    """Guess a summary's key from visual tokens: their mean through a linear map (D + 1, D_key)."""
    mean = np.append(tokens.values.mean(axis=0), np.float32(1.0))
    key: Floats = mean @ projection
    return key


def degradations(
    plan: Plan, opinion: Opinion, verdicts: Verdicts, retrieved: int
) -> tuple[str, ...]:
    """Everything that was left out or went another way."""
    notes = list(plan.degraded)
    if opinion.shortened and not plan.degraded:
        notes.append("summary cut at the token limit")
    if opinion.unreadable:
        notes.append("rating unreadable: scored by grade word")
    if verdicts.asked < retrieved:
        notes.append(f"stopped after {verdicts.asked} of {retrieved} neighbours")
    return tuple(notes)


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
