"""The engine: photos are judged, seen by the patterns, learned from; compared, ranked, culled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from meiqa.engine.caches import CacheState
from meiqa.engine.comparing import preferences_of
from meiqa.engine.culling import ALIKE, culled, require_cosine
from meiqa.engine.decoding import Decoding, decode_ahead
from meiqa.engine.fusing import Posterior
from meiqa.engine.images import ImageSource, load_pixels, source_name
from meiqa.engine.judging import (
    UNBOUNDED,
    Judgement,
    Photo,
    PhotoJudge,
    as_neighbours,
    contestant,
    degradations,
    fitted_to,
)
from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.patterns import (
    PatternJudge,
    PatternOpinion,
    opened_patterns,
    required,
    with_reference,
)
from meiqa.engine.planning import (
    FEWEST_NEIGHBOURS,
    CostModel,
    Plan,
    Stopwatch,
    costs_file,
    observe_costs,
    write_costs,
)
from meiqa.engine.ranking import RIVALS, Contestant, ranked, require_even
from meiqa.engine.reference import ReferencePhoto
from meiqa.engine.reflecting import gate_opens, learned_case, reflect
from meiqa.engine.remembering import open_memory
from meiqa.engine.runtime.sessions import sessions_on
from meiqa.engine.scoring import Opinion
from meiqa.engine.vlm import Floats, Vlm
from meiqa.errors import ImageError, StoreError, UsageError
from meiqa.locations import embedded_assets
from meiqa.memory import (
    NEAR_DUPLICATE,
    Admission,
    Case,
    MemoryBank,
    RetrievalPolicy,
    Snapshot,
)
from meiqa.types import (
    Assessment,
    Budget,
    Culling,
    Failure,
    PairComparison,
    Ranking,
    Reference,
    grades_by_word,
    quality_word,
)

LOG = logging.getLogger(__name__)
UNHURRIED = Budget(ms=3.6e6)
"""Everything is done, and the costs are learnt from it."""


class Engine:
    """Scores photos; a context manager.

    >>> with Engine.open() as engine:  # doctest: +SKIP
    ...     engine.score("photo.jpg", budget=Budget(ms=300)).score
    3.41
    """

    def __init__(
        self,
        vlm: Vlm,
        package: EnginePackage,
        memory: MemoryBank,
        *,
        exclude_above: float = NEAR_DUPLICATE,
        costs_file: Path | None = None,
        patterns: PatternJudge | None = None,
        drafting: bool = True,
    ) -> None:
        self.package = package
        self.memory = memory
        self._retrieval = RetrievalPolicy(
            k=package.manifest.calibration.neighbours,
            bins=package.manifest.calibration.bins,
            exclude_above=exclude_above,
        )
        self._judge = PhotoJudge(vlm, package, memory, costs_file=costs_file, drafting=drafting)
        self._calibration = package.manifest.calibration
        self._costs_file = costs_file
        self._patterns = patterns

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
        admission: Admission = "gated",
        exclude_above: float = NEAR_DUPLICATE,
        head: str | None = None,
        remote: str | None = None,
        model: str | None = None,
        keep_pictures: bool = False,
    ) -> Engine:
        """Open an engine.

        Args:
            package: directory of an engine package; the embedded one by default.
            memory: directory of a memory. One without anchors of its own gets the embedded
                anchors. By default what is learnt goes to the user's data directory, apart for
                each package.
            device: "cpu", "cuda", or "tensorrt" for engines that `meiqa build` made.
            threads: threads of the runtime; as many as there are cores by default.
            verify: compare the digests of the package's files. Cases of a memory are checked when
                they are read; `meiqa memory verify` checks all.
            learn: open the memory for writing, creating it if need be; False opens it read-only,
                and a `memory` must exist then.
            admission: which photos are remembered: those whose score the comparisons moved a lot
                ("gated"), or "all", the others with their first description.
            exclude_above: near-duplicates of a photo are not its neighbours: those whose layout has
                a higher cosine with its own (`meiqa.memory.likeness`); 1 excludes none but itself.
            head: what makes the first score: "text", "levels" or "grm"; the package's by default.
            remote: address of a server with a model that takes the package's place; `memory` was
                made with it then (`meiqa.engine.remote`).
            model: what that server calls it; by default the memory's.
            keep_pictures: of a remote model: learn, for which the pictures of learned photos are
                kept, scaled down. Without it nothing is learned, whatever `learn` says.

        Raises:
            PackageError, StoreError, DeviceUnavailable, ServiceError, UsageError.
        """
        if remote is not None:
            from meiqa.engine.remote import open_remote

            if package is not None or device != "cpu":
                raise UsageError("a remote model takes the place of a package and its device")
            return open_remote(
                remote,
                model,
                memory,
                learn=learn and keep_pictures,
                admission=admission,
                exclude_above=exclude_above,
                head=head,
            )
        if threads is not None and threads < 1:
            raise UsageError("threads must be positive", seen=threads, allowed="1 or more")
        opened = EnginePackage.open(package or embedded_assets() / "package", verify=verify)
        opened = opened.headed(head)
        vlm = LocalVlm(opened, *sessions_on(device, opened, threads, verify=verify))
        patterns = opened_patterns(opened, device, threads, verify=verify)
        # Last, so that an engine that is refused does not hold the memory's lock.
        bank = open_memory(memory, opened.digest, learn=learn, admission=admission)
        try:
            costs = costs_file(opened.digest, device, threads)
            return cls(
                vlm,
                opened,
                bank,
                exclude_above=exclude_above,
                costs_file=costs,
                patterns=patterns,
            )
        except BaseException:
            bank.close()
            raise

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

    @property
    def vlm(self) -> Vlm:
        """The model that judges."""
        return self._judge.vlm

    def least_ms(self) -> float:
        """Milliseconds that a photo takes once it is read, at the least that is worth doing.

        Nothing is written, and it is compared with the fewest neighbours.
        """
        return self._judge.costs().of(Plan(0, FEWEST_NEIGHBOURS, both_orders=True))

    def caches(self) -> dict[str, CacheState]:
        """How the caches stand; see `PhotoJudge.caches`."""
        return self._judge.caches()

    def forget_photos(self) -> None:
        """Drop what was read of photos, so that each is read anew; neighbours are kept."""
        self._judge.forget_photos()

    def score(
        self,
        image: ImageSource,
        *,
        reference: ImageSource | None = None,
        budget: Budget | None = None,
        k: int | None = None,
        learn: bool = True,
    ) -> Assessment:
        """Assess one photo.

        Args:
            image: path, encoded bytes, Pillow image or uint8 array.
            reference: the photo as it should be, of the same shape; nothing is learned then, since
                the score is that of the likeness as well.
            budget: what may be spent; everything by default.
            k: neighbours to compare with; the package's number by default.
            learn: remember the photo if the comparisons moved its score a lot.

        Raises:
            ImageError: the photo can't be judged.
            UsageError: k is negative, or the package can't use a reference.
        """
        (result,) = self.score_many([image], reference=reference, budget=budget, k=k, learn=learn)
        if isinstance(result, Failure):
            raise result.error
        return result

    def score_many(
        self,
        images: Iterable[ImageSource],
        *,
        reference: ImageSource | None = None,
        budget: Budget | Callable[[], Budget] | None = None,
        k: int | None = None,
        learn: bool = True,
    ) -> Iterator[Assessment | Failure]:
        """Assess photos one after the other; one that can't be judged gives a Failure.

        While one is assessed, the next is decoded.

        All of them see the memory as it is now, so neither their order nor their number changes a
        score; what they teach serves the next call. Arguments are those of `score`; a budget that
        is a function is asked when each photo is taken up.
        """
        policy = self._retrieval if k is None else replace(self._retrieval, k=k)
        snapshot = self.memory.snapshot()
        beside = None if reference is None else self._reference(reference)
        return (
            self._result(
                photo,
                snapshot,
                policy,
                budget() if callable(budget) else budget or UNBOUNDED,
                learn and beside is None,
                beside,
            )
            for photo in decode_ahead(images)
        )

    def rank(
        self,
        images: Iterable[ImageSource],
        *,
        budget: Budget | None = None,
        k: int | None = None,
        rivals: int = RIVALS,
        on_photo: Callable[[], None] = lambda: None,
    ) -> Ranking:
        """Order photos, best first, by comparing them with each other as well.

        Each is assessed as by `score`, without learning. Then each is compared, in both orders,
        with those next to it in the order of these scores, and all scores are solved for together,
        from the comparisons with remembered photos and with each other.

        Args:
            images: paths, encoded bytes, Pillow images or uint8 arrays.
            budget: what may be spent on assessing each photo; everything by default.
            k: remembered photos to compare each with; the package's number by default.
            rivals: photos of the set that each is compared with: half of them before it and half
                behind it; fewer at the ends.
            on_photo: called after each photo is assessed.

        Raises:
            UsageError: k or rivals is negative, or rivals is odd.
        """
        require_even(rivals)
        contestants, failures = self._contestants(images, budget, k, on_photo, views=False)
        order = ranked(contestants, self._judge.comparer, self._calibration, rivals)
        return Ranking(order, failures)

    def cull(
        self,
        images: Iterable[ImageSource],
        *,
        budget: Budget | None = None,
        k: int | None = None,
        alike: float = ALIKE,
        on_photo: Callable[[], None] = lambda: None,
    ) -> Culling:
        """Group near-identical shots, and tell the best of each group.

        Each photo is assessed as by `score`, without learning. Then the photos of each group are
        compared with each other, in both orders, and their scores are solved for together.

        Args:
            images: paths, encoded bytes, Pillow images or uint8 arrays.
            budget: what may be spent on assessing each photo; everything by default.
            k: remembered photos to compare each with; the package's number by default.
            alike: mean cosine of views from which on photos belong together; higher makes more and
                smaller groups.
            on_photo: called after each photo is assessed.

        Raises:
            UsageError: k is negative, or `alike` no cosine.
        """
        require_cosine(alike)
        contestants, failures = self._contestants(images, budget, k, on_photo, views=True)
        groups = culled(contestants, self._judge.comparer, self._calibration, alike)
        return Culling(groups, failures)

    def _contestants(
        self,
        images: Iterable[ImageSource],
        budget: Budget | None,
        k: int | None,
        on_photo: Callable[[], None],
        *,
        views: bool,
    ) -> tuple[list[Contestant], tuple[Failure, ...]]:
        """Photos that were assessed alone, to be compared with each other, and the others."""
        policy = self._retrieval if k is None else replace(self._retrieval, k=k)
        snapshot = self.memory.snapshot()
        contestants: list[Contestant] = []
        failures: list[Failure] = []
        costs = self._judge.costs() if budget is not None and budget.ms is not None else None
        for photo in decode_ahead(images):
            try:
                clock = Stopwatch(budget or UNBOUNDED)
                judged = self._judge.judge(photo, snapshot, policy, clock, costs)
                contestants.append(contestant(judged, views=views))
                if costs:
                    observe_costs(costs, clock, judged.opinion, judged.verdicts, judged.plan)
            except ImageError as error:
                failures.append(Failure(source_name(photo.source), error))
            on_photo()
        return contestants, tuple(failures)

    def compare(
        self, first: ImageSource, second: ImageSource, *, budget: Budget | None = None
    ) -> PairComparison:
        """Ask which of two photos looks better, in both orders, and score both.

        Args:
            first, second: paths, encoded bytes, Pillow images or uint8 arrays.
            budget: what may be spent on scoring each; everything by default.

        Raises:
            ImageError: one of them can't be judged.
        """
        clock = Stopwatch(UNBOUNDED)
        scores = [self.score(image, budget=budget, learn=False).score for image in (first, second)]
        photos = [self._judge.read(load_pixels(image)) for image in (first, second)]
        one, two = (photo.prefix for photo in photos)
        forth, back = self._judge.vlm.prefer_first([one, two], [two.tokens, one.tokens])
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
        decoding: Decoding,
        snapshot: Snapshot,
        policy: RetrievalPolicy,
        budget: Budget,
        learn: bool,
        beside: ReferencePhoto | None,
    ) -> Assessment | Failure:
        try:
            return self._assess(decoding, snapshot, policy, budget, learn, beside)
        except ImageError as error:
            return Failure(source_name(decoding.source), error)

    def _assess(
        self,
        decoding: Decoding,
        snapshot: Snapshot,
        policy: RetrievalPolicy,
        budget: Budget,
        learn: bool,
        beside: ReferencePhoto | None,
    ) -> Assessment:
        """The way of one photo."""
        costs = self._judge.costs() if budget.ms is not None else None
        clock = Stopwatch(budget)
        before = self.caches()["neighbours"]
        judged = self._judge.judge(decoding, snapshot, policy, clock, costs)
        opinion = judged.opinion
        with clock.stage("patterns"):
            seen, reference, posterior = self._seen(judged, beside)
        if costs:
            observe_costs(costs, clock, opinion, judged.verdicts, judged.plan)
        reflection, notes = None, degradations(judged)
        if learn and gate_opens(opinion, posterior, self._calibration.reflect_above):
            with clock.stage("reflect"):
                reflection, unlearnt = self._learn(judged.photo, opinion, posterior, clock)
            notes += unlearnt
        elif learn and self.memory.admission == "all":
            notes += self._remember_as_seen(judged.photo, opinion, posterior, judged.key)
        clock.timings_ms["total"] = clock.elapsed_ms
        return Assessment(
            path=judged.photo.pixels.name,
            score=posterior.score,
            std=posterior.std,
            ci95=posterior.ci95,
            initial_score=opinion.score,
            word=quality_word(posterior.score),
            percentile=snapshot.percentile(posterior.score),
            summary=opinion.summary,
            memory_score=opinion.memory_score,
            grades=grades_by_word(opinion.grades),
            distortions=() if seen is None else seen.distortions,
            reference=reference,
            neighbours=as_neighbours(judged.neighbours, judged.verdicts),
            degraded=notes,
            reflection=reflection,
            timings_ms={name: round(ms, 3) for name, ms in clock.timings_ms.items()},
            counters=self._judge.counters(judged, before),
        )

    def patterns(self, image: ImageSource, reference: ImageSource | None = None) -> PatternOpinion:
        """What the distortion patterns alone say of a photo: score, kinds, and where they are.

        Args:
            image: path, encoded bytes, Pillow image or uint8 array.
            reference: the photo as it should be, of the same shape.

        Raises:
            ImageError: one of them can't be judged, or they are of different shapes.
            UsageError: the package has no patterns.
        """
        judge = required(self._patterns, self.package)
        beside = None if reference is None else self._reference(reference)
        return self._opinion(judge, self._judge.read(load_pixels(image)), beside)

    def _reference(self, source: ImageSource) -> ReferencePhoto:
        """Decode a reference, if the package can use one."""
        required(self._patterns, self.package)
        return ReferencePhoto.load(
            source, lambda pixels: fitted_to(pixels, self._judge.vlm.image), self._judge.vlm.encode
        )

    def _seen(
        self, judged: Judgement, beside: ReferencePhoto | None
    ) -> tuple[PatternOpinion | None, Reference | None, Posterior]:
        """What the patterns see, what the reference brings, and the score with it."""
        before, judge = judged.posterior, self._patterns
        if judge is None:
            return None, None, before
        photo = judged.photo
        seen = self._opinion(judge, photo, beside)
        if beside is None:
            return seen, None, before
        after = with_reference(
            before,
            seen,
            judge.calibration.correlation,
            identical=beside.is_same(photo.pixels),
        )
        reference = Reference(
            path=beside.pixels.name,
            score=seen.score,
            std=seen.std,
            weight=seen.weight,
            quality=judge.judge(beside.tokens_beside(photo.pixels)).score,
            moved=after.score - before.score,
        )
        return seen, reference, after

    def _opinion(
        self, judge: PatternJudge, photo: Photo, beside: ReferencePhoto | None
    ) -> PatternOpinion:
        """The mode follows from whether there is a reference."""
        tokens = photo.prefix.tokens
        if beside is None:
            return judge.judge(tokens)
        if beside.is_same(photo.pixels):
            return judge.identical(tokens)
        return judge.judge(tokens, beside.tokens_beside(photo.pixels))

    def _learn(
        self, photo: Photo, opinion: Opinion, posterior: Posterior, clock: Stopwatch
    ) -> tuple[str | None, tuple[str, ...]]:
        """Reflect and remember; the corrected description and what could not be done."""
        if opinion.summary is None:
            return None, ("not reflected: no summary",)
        if clock.remaining_ms is not None and clock.remaining_ms < self._reflection_ms(clock):
            return None, ("not reflected: no time",)
        reflection = reflect(
            self._judge.vlm,
            photo.prefix,
            photo.pixels.digest,
            opinion.summary,
            opinion.score,
            posterior,
            self.memory.key_kind,
        )
        if reflection is None:
            return None, ("not reflected: nothing was written",)
        name = photo.pixels.name
        notes = self._remember(reflection.case, f"reflected on {name}", name, gated=True)
        return reflection.description.text, notes

    def _remember_as_seen(
        self, photo: Photo, opinion: Opinion, posterior: Posterior, key: Floats
    ) -> tuple[str, ...]:
        """Remember a photo whose gate stayed shut, with its first description."""
        if opinion.summary is None:
            return ("not remembered: no summary",)
        tokens, pixels = photo.prefix.tokens, photo.pixels
        case = learned_case(tokens, pixels.digest, opinion.summary, key, posterior)
        return self._remember(case, f"scored {pixels.name}", pixels.name, gated=False)

    def _remember(self, case: Case, provenance: str, name: str, *, gated: bool) -> tuple[str, ...]:
        try:
            self.memory.remember(case, provenance=provenance, gated=gated)
        except StoreError as error:
            LOG.warning("%s was not remembered: %s", name, error)
            return (f"not remembered: {error.what}",)
        return ()

    def _reflection_ms(self, clock: Stopwatch) -> float:
        """A corrected description takes about as long as the first."""
        return clock.timings_ms["describe"]

    def calibrate(self, images: Iterable[ImageSource], *, k: int | None = None) -> CostModel:
        """Measure what each stage costs here, on photos, and keep it for later processes.

        Raises:
            ImageError: a photo can't be judged.
        """
        costs = self._judge.measure()
        for image in images:
            self.score(image, budget=UNHURRIED, k=k, learn=False)
        if self._costs_file is not None:
            write_costs(costs, self._costs_file)
        return costs
