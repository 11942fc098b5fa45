"""The engine: opens a model and its memory, scores photos, and sets them side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from meiqa.engine.asking import Question, answer_all
from meiqa.engine.budget import (
    FEWEST_NEIGHBOURS,
    SHORT_SUMMARY_TOKENS,
    CostModel,
    Deadline,
    PairTime,
    Plan,
    costs_file,
)
from meiqa.engine.comparing import CacheState
from meiqa.engine.images import ImageSource, Pixels, load_pixels, source_name
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Model
from meiqa.engine.package import EnginePackage
from meiqa.engine.patterns import PatternScore, PatternScorer, ReferencePhoto, required
from meiqa.engine.priors import QualityPrior
from meiqa.engine.runtime import open_runtime
from meiqa.engine.scoring import Scorer, ScoreRequest
from meiqa.engine.sets import (
    RIVALS,
    Candidate,
    culled,
    left_out,
    preference_of,
    ranked,
    require_even,
    shots_compared,
    solve,
)
from meiqa.engine.shots import ALIKE, require_cosine
from meiqa.errors import ImageError, UsageError
from meiqa.locations import embedded_assets
from meiqa.memory import Admission, MemoryBank, RetrievalPolicy, open_memory
from meiqa.types import (
    Answer,
    Assessment,
    Budget,
    Culling,
    Failure,
    PairComparison,
    Ranking,
    ShotComparison,
)

UNHURRIED = Budget(ms=3.6e6)
"""Everything is done, and the costs are learnt from it."""


class Engine:
    """Scores photos; a context manager.

    >>> with Engine.open() as engine:  # doctest: +SKIP
    ...     engine.score("photo.jpg", budget=Budget(ms=300)).score
    3.41
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @classmethod
    def open(
        cls,
        package: str | Path | EnginePackage | None = None,
        memory: str | Path | None = None,
        *,
        device: str = "cpu",
        threads: int | None = None,
        learn: bool | Admission = True,
        retrieval: RetrievalPolicy | None = None,
    ) -> Engine:
        """Open an engine; PackageError, StoreError, DeviceUnavailable or UsageError if it can't be.

        Args:
            package: directory of an engine package, or one that was opened with settings of its own
                (`EnginePackage.open`); the embedded one by default.
            memory: directory of a memory. One without anchors of its own gets the embedded
                anchors. By default what is learnt goes to the user's data directory, apart for
                each package.
            device: "cpu", "cuda", or "tensorrt" for engines that `meiqa build` made.
            threads: of the runtime; as many as there are cores by default, and at most.
            learn: remember photos: those whose score moved far from the first (True or
                "gated"), or "all", the others with their first description. False opens the memory
                read-only.
            retrieval: how neighbours are chosen; the package's numbers by default.
        """
        if not isinstance(package, EnginePackage):
            package = EnginePackage.open(package or embedded_assets() / "package")
        model, patterns = opened_model(package, device, threads)
        # Last, so that an engine that is refused does not hold the memory's lock.
        bank = open_memory(memory, package.digest, learn=learn)
        costs = costs_file(package.digest, device, threads)
        return cls(Scorer(model, bank, retrieval, patterns=patterns, costs_file=costs))

    @classmethod
    def connect(
        cls,
        url: str,
        memory: str | Path,
        *,
        model: str | None = None,
        keep_pictures: bool | Admission = False,
        head: str | None = None,
        retrieval: RetrievalPolicy | None = None,
    ) -> Engine:
        """Open an engine whose model is behind an OpenAI-compatible server: photos are sent there.

        Args:
            url: of the API, as `http://host:8000/v1`.
            memory: directory of a memory that `meiqa memory build --remote` made.
            model: what the server calls the model; UsageError for another than the memory's.
            keep_pictures: learn, as `learn` says in `open`, for which the pictures of learned
                photos are kept, scaled down.
            head: what makes the first score: "text", "levels" or "grm".
            retrieval: how neighbours are chosen; the memory's numbers by default.
        """
        from meiqa.engine.remote import RemoteModel

        remote = RemoteModel.connect(url, memory, model=model, head=head)
        try:
            bank = open_memory(memory, remote.digest, learn=keep_pictures)
        except BaseException:
            remote.close()
            raise
        # A server writes by itself: there is nothing to draft.
        return cls(Scorer(remote, bank, retrieval, drafting=False))

    def beside(self, device: str = "cpu", threads: int | None = None) -> Engine:
        """Open another engine with this one's package, to work beside it on the same memory."""
        model, patterns = opened_model(self.package, device, threads)
        return Engine(Scorer(model, self.memory, self.scorer.retrieval, patterns=patterns))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.memory.close()
        self.model.close()

    @property
    def model(self) -> Model:
        return self.scorer.model

    @property
    def package(self) -> EnginePackage:
        """The package of the model; UsageError for one behind a server."""
        if isinstance(self.model, LocalModel):
            return self.model.package
        raise UsageError("a model behind a server has no package")

    @property
    def memory(self) -> MemoryBank:
        return self.scorer.memory

    def caches(self) -> dict[str, CacheState]:
        """Tell how the cache of prefixes stands: that of photos, and that of neighbours."""
        return {str(role): state for role, state in self.scorer.prefixes.state().items()}

    def forget_photos(self) -> None:
        """Drop what was read of photos, so that each is read anew; neighbours are kept."""
        self.scorer.prefixes.forget("photos")

    def least_ms(self) -> float:
        """Tell how many ms a photo takes that was read, at the least that is worth doing.

        What its package gives up last is kept: a short text, or the fewest neighbours.
        """
        k = self.scorer.retrieval.k
        parts = [part for part in self.model.calibration.degradation if part == "text" or k]
        keeps_text = parts[-1] == "text"
        least = Plan(SHORT_SUMMARY_TOKENS, 0) if keeps_text else Plan(0, min(FEWEST_NEIGHBOURS, k))
        return self.scorer.costs().of(least)

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
        """Assess one photo: a path, encoded bytes, a file, a Pillow image or a uint8 array.

        Args:
            reference: the photo as it should be, of the same shape; nothing is learned then, since
                the score is that of the likeness as well.
            budget: what may be spent; everything by default.
            k: neighbours to compare with; the package's number by default.
            learn: remember the photo if its score moved far from the first.
            detail: measure sharpness, motion and noise at full size, and JPEG quality, beside the
                score.
            embedding: give what the vision tower sees as a vector; see `Embedding`. It takes no
                time.

        Raises:
            ImageError: the photo can't be judged.
            UsageError: an embedding is asked of a model behind a server.
        """
        request = ScoreRequest(image, budget, k, learn, detail, embedding)
        (result,) = self.score_many([request], reference=reference)
        if isinstance(result, Failure):
            raise result.error
        return result

    def score_many(
        self,
        images: Iterable[ImageSource | ScoreRequest],
        *,
        reference: ImageSource | None = None,
        budget: Budget | None = None,
        k: int | None = None,
        learn: bool = True,
        detail: bool = True,
        embedding: bool = False,
    ) -> Iterator[Assessment | Failure]:
        """Assess photos one after the other; one that can't be judged gives a Failure.

        All of them see the memory as it is now, so neither their order nor their number changes a
        score; what they teach serves the next call. Arguments are those of `score`; a
        `ScoreRequest` among the images brings its own.
        """
        common = ScoreRequest(b"", budget, k, learn, detail, embedding)
        require_several(images)
        self._check(common)
        requests = (
            image if isinstance(image, ScoreRequest) else replace(common, image=image)
            for image in images
        )
        snapshot = self.memory.snapshot()
        beside = None if reference is None else self._reference(reference)

        def results() -> Iterator[Assessment | Failure]:
            for request, decoded in decode_ahead(map(self._check, requests)):
                try:
                    scored = self.scorer.score(decoded, request, snapshot, beside)
                except ImageError as error:
                    yield Failure(source_name(request.image), error)
                else:
                    yield scored.assessment(snapshot)

        return results()

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

        Each is scored as by `score`, without learning. Then each is compared, in both orders, with
        those next to it in the order of these scores, and all scores are solved for together, from
        the comparisons with remembered photos and with each other.

        Args:
            budget: what each photo may cost. All of them together have one deadline, of that many
                milliseconds for each, which covers decoding, scoring and pairs.
            k: remembered photos to compare each with; the package's number by default.
            rivals: photos of the set that each is compared with, an even number: half of them
                before it and half behind it; fewer at the ends.
            on_photo: called after each photo is scored.
        """
        require_even(rivals)
        task = SetTask(self.scorer, images, budget, k, pairs_each=rivals / 2)
        candidates, failures = task.candidates(on_photo)
        solution = solve(candidates, self.scorer.comparer, rivals, task.pair_time)
        return Ranking(ranked(candidates, solution), failures, left_out(candidates, [solution]))

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

        Exposure brackets, focus stacks and panoramas are groups of their own, kept whole. Each
        photo is scored as by `score`, without learning. Then the shots of each group are compared
        with each other, in both orders, and their scores are solved for together.

        Args:
            budget, k, on_photo: see `rank`.
            alike: mean cosine of views from which on photos belong together; higher makes more and
                smaller groups.
        """
        require_cosine(alike)
        task = SetTask(self.scorer, images, budget, k, pairs_each=1, culled=True)
        candidates, failures = task.candidates(on_photo)
        groups, solutions = culled(candidates, self.scorer.comparer, alike, task.pair_time)
        return Culling(groups, failures, left_out(candidates, solutions))

    def compare(
        self, first: ImageSource, second: ImageSource, *, budget: Budget | None = None
    ) -> PairComparison:
        """Score two photos, ask which looks better, in both orders, and solve for both together.

        The budget is what each may cost; see `rank`. ImageError if one of them can't be judged.
        """
        task = SetTask(self.scorer, [first, second], budget, None, pairs_each=0.5)
        candidates, failures = task.candidates(lambda: None)
        if failures:
            raise failures[0].error
        solution = solve(candidates, self.scorer.comparer, 2, task.pair_time)
        one, two = solution.posteriors
        return PairComparison(
            first=candidates[0].path,
            second=candidates[1].path,
            preference=preference_of(solution),
            first_score=one.score,
            second_score=two.score,
            timings_ms={"total": task.deadline.elapsed_ms},
            degraded=left_out(candidates, [solution]),
        )

    def read_shot(self, image: ImageSource) -> Candidate:
        """Read a shot, so that it can be compared with others of its scene again and again.

        Pixels that were scored a moment ago are not read again; ImageError if it can't be judged.
        """
        return Candidate.graded(load_pixels(image), self.scorer, self.memory.snapshot())

    def compare_shots(self, first: Candidate, second: Candidate) -> ShotComparison:
        """Ask which of two shots of one scene looks better, in both orders, and by how much.

        That takes as long as one remembered photo. What both show is taken for the same; see
        `compare` for any two photos.

        Args:
            first, second: what `read_shot` gave.
        """
        return shots_compared(first, second, self.scorer.comparer)

    def options(
        self,
        image: ImageSource,
        question: str,
        options: Sequence[str],
        *,
        second: ImageSource | None = None,
        reply: str = "",
    ) -> Answer:
        """Tell how probable each option is as the reply to a question; see `Question`.

        Raises:
            ImageError: a photo can't be judged.
            UsageError: the question makes no sense, or the model is behind a server.
        """
        return self.options_many(image, [Question(question, options, second, reply)])[0]

    def options_many(self, image: ImageSource, questions: Sequence[Question]) -> list[Answer]:
        """Answer many questions about one photo, which is read once; see `options`.

        Each answer is what the question would get alone.
        """
        if not isinstance(self.model, LocalModel):
            raise UsageError(
                "a model behind a server cannot be asked for options",
                seen="a server names the likeliest tokens only",
                hint="export the model: meiqa export",
            )
        photo = load_pixels(image)
        return answer_all(self.model, photo, self.scorer.prefill(photo)[0], questions)

    def patterns(self, image: ImageSource, reference: ImageSource | None = None) -> PatternScore:
        """See what distortion patterns alone say of a photo; UsageError if the package has none."""
        patterns = required(self.scorer.patterns)
        beside = None if reference is None else self._reference(reference)
        pixels = load_pixels(image)
        prefix, _ = self.scorer.prefill(pixels)
        return patterns.seen(pixels, prefix.tokens, beside)

    def quality_prior(
        self, image: ImageSource, *, reference: ImageSource | None = None
    ) -> QualityPrior:
        """Score a photo without learning; give score, distortions, map and embedding as arrays.

        Raises:
            ImageError: the photo can't be judged.
            UsageError: the package has no distortion patterns.
        """
        kinds = required(self.scorer.patterns).kinds
        request = ScoreRequest(image, learn=False, detail=False, embedding=True)
        beside = None if reference is None else self._reference(reference)
        snapshot = self.memory.snapshot()
        scored = self.scorer.score(partial(load_pixels, image), request, snapshot, beside)
        return QualityPrior.of(scored, kinds)

    def calibrate_costs(self, images: Iterable[ImageSource], *, k: int | None = None) -> CostModel:
        """Measure what each stage costs here, on photos, and keep it for later processes."""
        self.scorer.measure_costs()
        for image in images:
            self.score(image, budget=UNHURRIED, k=k, learn=False)
        return self.scorer.keep_costs()

    def _check(self, request: ScoreRequest) -> ScoreRequest:
        """See `check_request`; UsageError for an embedding by a model that gives none."""
        if request.embedding and not isinstance(self.model, LocalModel):
            raise UsageError(
                "a model behind a server keeps what it sees to itself: it gives no embedding",
                hint="leave the embedding out, or open an engine package",
            )
        return check_request(request)

    def _reference(self, source: ImageSource) -> ReferencePhoto:
        """Decode a reference, if the package can use one."""
        required(self.scorer.patterns)
        return ReferencePhoto(load_pixels(source), self.model.image, self.model.encode)


class SetTask:
    """The photos of a set under one deadline.

    Args:
        budget: what each may cost.
        pairs_each: pairs of the set for each photo of it, for which time is kept.
        culled: look for what a cull needs as well: detail, and the shot as far as series go.

    Attributes:
        pair_time: how many pairs there is time for.
    """

    def __init__(
        self,
        scorer: Scorer,
        images: Iterable[ImageSource],
        budget: Budget | None,
        k: int | None,
        pairs_each: float,
        culled: bool = False,
    ) -> None:
        require_several(images)
        self._scorer, self._images, self._culled = scorer, list(images), culled
        self._budget, self._pairs_ms = budget or Budget(), 0.0
        self._request = check_request(
            ScoreRequest(b"", budget=self._budget, k=k, learn=False, detail=culled)
        )
        costs, whole, count = None, Budget(), len(self._images)
        if self._budget.ms is not None and count:
            costs, whole = scorer.costs(), Budget(ms=count * self._budget.ms)
            self._pairs_ms = count * pairs_each * costs.of_pairs(Plan(0, 1), 1)
        self.deadline = Deadline(whole, clock=scorer.clock)
        self.pair_time = PairTime(self.deadline, costs)

    def candidates(
        self, on_photo: Callable[[], None]
    ) -> tuple[list[Candidate], tuple[Failure, ...]]:
        """Score the photos alone, to be compared with each other, and give those that failed."""
        snapshot = self._scorer.memory.snapshot()
        candidates: list[Candidate] = []
        failures: list[Failure] = []
        requests = (replace(self._request, image=image) for image in self._images)
        for place, (request, decoded) in enumerate(decode_ahead(requests)):
            taken = replace(request, budget=self._share(len(self._images) - place))
            try:
                scored = self._scorer.score(decoded, taken, snapshot)
                candidates.append(Candidate.of(scored, culled=self._culled))
            except ImageError as error:
                failures.append(Failure(source_name(request.image), error))
            on_photo()
        return candidates, tuple(failures)

    def _share(self, left: int) -> Budget:
        """What the next photo of so many may cost: its share of what is not kept for pairs."""
        own_ms, remaining_ms = self._budget.ms, self.deadline.remaining_ms
        if own_ms is None or remaining_ms is None:
            return self._budget
        # At most half of the time is kept for pairs: a photo's own score comes first.
        ms = max((remaining_ms - self._pairs_ms) / left, own_ms / 2)
        return replace(self._budget, ms=max(min(ms, remaining_ms / left), 1e-3))


def opened_model(
    package: EnginePackage, device: str, threads: int | None
) -> tuple[LocalModel, PatternScorer | None]:
    """Open a package's model on a device, and its distortion patterns if it has any."""
    runtime = open_runtime(package, device, threads, patterns=True)
    model = LocalModel(package, runtime.vision, runtime.decoder)
    patterns = package.manifest.patterns
    if patterns is None or runtime.patterns is None:
        return model, None
    return model, PatternScorer(patterns, runtime.patterns)


def decode_ahead(
    requests: Iterable[ScoreRequest],
) -> Iterator[tuple[ScoreRequest, Callable[[], Pixels]]]:
    """Give photos in their order, each with the next one being decoded behind it.

    Never more than one is ahead, so that any number of photos takes the memory of three: one at
    work, one decoded, and what decoding the latter took.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        waiting: list[tuple[ScoreRequest, Callable[[], Pixels]]] = []
        for request in requests:
            waiting.append((request, pool.submit(load_pixels, request.image).result))
            if len(waiting) > 1:
                yield waiting.pop(0)
        yield from waiting


def require_several(images: object) -> None:
    """Refuse, as a TypeError, one photo where several are taken: its bytes are no photos."""
    one_array = isinstance(images, np.ndarray) and images.ndim < 4
    one = isinstance(images, str | bytes | bytearray | Path) or hasattr(images, "read") or one_array
    if one or not isinstance(images, Iterable):
        kind = type(images).__name__
        raise TypeError(f"several photos are expected, got one {kind}: give a list of photos")


def check_request(request: ScoreRequest) -> ScoreRequest:
    """Refuse what is no number of neighbours (TypeError, UsageError) or no budget (TypeError)."""
    k, budget = request.k, request.budget
    if k is not None and (isinstance(k, bool) or not isinstance(k, int | np.integer)):
        raise TypeError(f"k is a whole number of neighbours, got {k!r}")
    if k is not None:
        RetrievalPolicy(k=int(k))
    if not isinstance(budget, Budget | None):
        raise TypeError(f"a budget is a Budget, got {budget!r}: Budget(ms={budget!r})?")
    return request
