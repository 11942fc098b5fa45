"""What memory, retrieval key, number of neighbours and both orders are worth, one at a time.

Each photo is read, described and graded once, and each pair of photo and neighbour is asked once
in each order, whatever the number of rows: the rows differ in which of the answers they retrieve
and fuse, with the engine's own functions.

Rows about the contrast memory need one. It is learnt from photos whose human scores are not
looked at: a quarter of the anchors, which then are no anchors in any of these rows, or the photos
of another table. Photos that the model was trained on teach more than new ones would, since their
initial scores are nearly the human ones; the anchors were kept out of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np

from meiqa.benchmarks.accuracy import photos_of
from meiqa.benchmarks.machine import machine, versions
from meiqa.benchmarks.metrics import summarise, tied_pairs
from meiqa.benchmarks.recording import (
    Parts,
    Recorded,
    Recorder,
    anchors_of,
    random_key,
    write_anchors,
)
from meiqa.benchmarks.tables import Column, table_text
from meiqa.engine.fusing import Posterior
from meiqa.engine.reflecting import gate_opens, reflect
from meiqa.errors import ImageError, UsageError
from meiqa.labels import LabelTable
from meiqa.memory import Case, ContrastPolicy, MemoryBank, RetrievalPolicy, Snapshot
from meiqa.types import Failure, KeyKind

__all__ = ["NEIGHBOURS", "ablate", "ablation_text"]

KEY_KINDS: tuple[KeyKind, ...] = get_args(KeyKind)
NEIGHBOURS = (0, 1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Place:
    """Where neighbours come from: a memory, and the kind of its keys, None for random ones."""

    snapshot: Snapshot
    kind: KeyKind | None


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        factor: what is varied; name: its value.
        place: name of the memory; policy: what is retrieved from it.
        both_orders: whether both answers are used, or the one with the photo shown first.
    """

    factor: str
    name: str
    place: str
    policy: RetrievalPolicy
    both_orders: bool = True


@dataclass(frozen=True)
class Lesson:
    """Cases that photos without human scores taught.

    Attributes:
        cases: of all photos; gated: ids of those whose score moved past the gate.
        source: what they are, in words.
        anchors: what they were compared with.
    """

    cases: tuple[Case, ...]
    gated: frozenset[str]
    source: str
    anchors: tuple[Case, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give the counts."""
        return {
            "source": self.source,
            "anchors": len(self.anchors),
            "cases": len(self.cases),
            "gated": len(self.gated),
        }


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a setting says of one photo.

    Attributes:
        posterior: the fused score.
        neighbours: how many there were; learnt: how many of them were learnt ones.
    """

    posterior: Posterior
    neighbours: int
    learnt: int


@dataclass(frozen=True, eq=False)
class Sheet:
    """One photo under all settings, and its human score on 1-5."""

    human: float
    initial: float
    outcomes: tuple[Outcome, ...]


def ablate(
    parts: Parts,
    labels: LabelTable,
    images_dir: str | Path,
    *,
    contrast_from: LabelTable | None = None,
    neighbours: Sequence[int] = NEIGHBOURS,
    on_photo: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Judge the photos of a table under every setting.

    Args:
        parts: The model and the memory whose anchors are used.
        labels: The photos, relative to ``images_dir``, and their human scores.
        images_dir: Where the photos are, those of ``contrast_from`` too.
        contrast_from: Photos that the contrast memory is learnt from; None for a quarter of the
            anchors.
        neighbours: The numbers K to try.
        on_photo: Called after each photo of ``labels``.

    Returns:
        JSON-ready: rows (factor, setting, k, orders, the mean number of neighbours and of learnt
        ones among them, the metrics of `summarise`, tied_pairs, coverage95, and gain, the SRCC
        above that of the initial score), contrast (what was learnt), comparisons (how many were
        asked, each order counted), machine, versions and failures.

    Raises:
        ImageError: a photo of ``contrast_from`` cannot be judged.
        StoreMismatch: the memory holds no summary keys, which other kinds of key are made of.
        UsageError: there is no such directory, fewer than two photos can be judged, the memory
            has too few anchors, or nothing was learnt.
    """
    photos = photos_of(labels, images_dir)
    teachers = None if contrast_from is None else photos_of(contrast_from, images_dir)
    recorder, settings = Recorder(parts), settings_of(parts, neighbours)
    sheets: list[Sheet] = []
    failures: list[Failure] = []
    with TemporaryDirectory(prefix="meiqa-ablation-") as folder, ExitStack() as stack:
        anchors = anchors_of(parts)
        lesson = lesson_of(recorder, anchors, teachers)
        places = places_of(parts, anchors, lesson, Path(folder), stack)
        for photo, human in zip(photos, labels.scores_1_to_5(), strict=True):
            try:
                recorded = recorder.photo(photo)
            except ImageError as error:
                failures.append(Failure(str(photo), error))
            else:
                outcomes = tuple(outcome(recorder, recorded, one, places) for one in settings)
                sheets.append(Sheet(human, recorded.opinion.score, outcomes))
            on_photo()
    if len(sheets) < 2:
        raise UsageError(f"{len(sheets)} of {len(photos)} photos could be judged", allowed="2 up")
    return {
        "n": len(sheets),
        "rows": rows_of(settings, sheets),
        "contrast": lesson.to_dict(),
        "comparisons": recorder.asked,
        "machine": machine(),
        "versions": versions("numpy", "onnxruntime"),
        "failures": [failure.to_dict() for failure in failures],
    }


def settings_of(parts: Parts, neighbours: Sequence[int]) -> list[Setting]:
    """List the rows: each factor is varied about what the package does by default."""
    usual = parts.policy
    anchors = replace(usual, anchor_share=1.0)
    flat, contrast = replace(anchors, stratified=False), replace(usual, anchor_share=0.0)
    return [
        Setting("memory", "none", "taught", replace(usual, k=0)),
        Setting("memory", "anchors, flat", "taught", flat),
        Setting("memory", "anchors, stratified", "taught", anchors),
        Setting("memory", "contrast only", "taught", contrast),
        Setting("memory", "both", "taught", usual),
        Setting("memory", "both, gated cases", "taught by gated", usual),
        *(Setting("key", kind, kind, anchors) for kind in ("random", *KEY_KINDS)),
        *(Setting("neighbours", str(k), "usual", replace(anchors, k=k)) for k in neighbours),
        Setting("orders", "photo first", "usual", anchors, both_orders=False),
        Setting("orders", "both", "usual", anchors),
    ]


def lesson_of(
    recorder: Recorder, anchors: Sequence[Case], teachers: Sequence[Path] | None
) -> Lesson:
    """Learn from photos, or from a quarter of the anchors as if they were photos.

    Raises:
        ImageError: a photo cannot be judged.
        UsageError: there is too little to learn from.
    """
    if teachers is None:
        held = set(sorted((case.id for case in anchors), key=name_order)[: len(anchors) // 4])
        kept = tuple(case for case in anchors if case.id not in held)
        learners = (recorder.remembered(case) for case in anchors if case.id in held)
        source = "a quarter of the anchors"
    else:
        kept, source = tuple(anchors), "another table"
        learners = (recorder.photo(photo) for photo in teachers)
    if not kept:
        raise UsageError("the memory has too few anchors", seen=len(anchors), allowed="4 or more")
    return learnt(recorder, kept, learners, source)


def name_order(name: str) -> str:
    """A place in an order that has nothing to do with what is shown."""
    return hashlib.sha256(name.encode()).hexdigest()


def learnt(
    recorder: Recorder, anchors: tuple[Case, ...], photos: Iterable[Recorded], source: str
) -> Lesson:
    """Compare photos with anchors, and reflect on each whether or not its score moved."""
    parts = recorder.parts
    gate = parts.package.manifest.calibration.reflect_above
    cases: list[Case] = []
    gated: set[str] = set()
    with (
        TemporaryDirectory(prefix="meiqa-lesson-") as folder,
        learner(parts, anchors, Path(folder, "anchors")) as bank,
    ):
        snapshot, kind = bank.snapshot(), bank.key_kind
        for photo in photos:
            neighbours = photo.neighbours(snapshot, parts.policy, kind)
            posterior = recorder.posterior(photo, neighbours)
            case = case_of(parts, photo, posterior, kind)
            if case is None:
                continue
            cases.append(case)
            if gate_opens(photo.opinion, posterior, gate):
                gated.add(case.id)
    if not cases:
        raise UsageError("nothing was learnt", hint="give more photos with --contrast-from")
    return Lesson(tuple(cases), frozenset(gated), source, anchors)


def case_of(parts: Parts, photo: Recorded, posterior: Posterior, kind: KeyKind) -> Case | None:
    """Reflect on a photo; None where nothing is written."""
    opinion = photo.opinion
    if opinion.summary is None:
        return None
    reflection = reflect(
        parts.vlm, photo.prefix, photo.digest, opinion.summary, opinion.score, posterior, kind
    )
    return None if reflection is None else reflection.case


@contextmanager
def learner(parts: Parts, anchors: Sequence[Case], path: Path) -> Iterator[MemoryBank]:
    """Write anchors to a new memory of the same kind, and open it to learn everything."""
    digest, everything = parts.package.digest, ContrastPolicy(admission="all", merge_above=1.0)
    write_anchors(anchors, path, digest, parts.memory.key_kind)
    with MemoryBank.open(path, "rw", package_digest=digest, policy=everything) as bank:
        yield bank


def places_of(
    parts: Parts, anchors: Sequence[Case], lesson: Lesson, folder: Path, stack: ExitStack
) -> dict[str, Place]:
    """Make the memories that neighbours are retrieved from, by name.

    Raises:
        StoreMismatch: the memory holds no summary keys, which other kinds are made of.
    """
    usual, digest = parts.memory.key_kind, parts.package.digest
    places = {"usual": Place(parts.memory.snapshot(), usual)}

    def opened(path: Path) -> Snapshot:
        return stack.enter_context(MemoryBank.open(path, package_digest=digest)).snapshot()

    for kind in KEY_KINDS:
        if kind == usual:
            places[kind] = places["usual"]
        else:
            parts.memory.rekey(kind, folder / kind)
            places[kind] = Place(opened(folder / kind), kind)
    scrambled = [replace(case, key=random_key(case.image_digest)) for case in anchors]
    write_anchors(scrambled, folder / "random", digest)
    places["random"] = Place(opened(folder / "random"), None)
    every = {case.id for case in lesson.cases}
    for name, ids in (("taught", every), ("taught by gated", lesson.gated)):
        bank = stack.enter_context(learner(parts, lesson.anchors, folder / name))
        for case in lesson.cases:
            if case.id in ids:
                bank.remember(case, provenance=lesson.source)
        places[name] = Place(bank.snapshot(), usual)
    return places


def outcome(
    recorder: Recorder, photo: Recorded, setting: Setting, places: Mapping[str, Place]
) -> Outcome:
    """Judge one photo under one setting."""
    place = places[setting.place]
    neighbours = photo.neighbours(place.snapshot, setting.policy, place.kind)
    learnt_ones = sum(case.origin == "contrast" for case in neighbours)
    posterior = recorder.posterior(photo, neighbours, both_orders=setting.both_orders)
    return Outcome(posterior, len(neighbours), learnt_ones)


def rows_of(settings: Sequence[Setting], sheets: Sequence[Sheet]) -> list[dict[str, Any]]:
    """Give the figures of the initial score and of every setting."""
    human = np.array([sheet.human for sheet in sheets])
    initial = np.array([sheet.initial for sheet in sheets])
    base = summarise(initial, human)
    rows: list[dict[str, Any]] = [
        {"factor": "memory", "setting": "initial score", "k": 0, "gain": 0.0, **base}
    ]
    for at, setting in enumerate(settings):
        outcomes = [sheet.outcomes[at] for sheet in sheets]
        scores = np.array([one.posterior.score for one in outcomes])
        intervals = np.array([one.posterior.ci95 for one in outcomes])
        covered = (intervals[:, 0] <= human) & (human <= intervals[:, 1])
        figures = summarise(scores, human)
        rows.append(
            {
                "factor": setting.factor,
                "setting": setting.name,
                "k": setting.policy.k,
                "orders": 2 if setting.both_orders else 1,
                "neighbours": float(np.mean([one.neighbours for one in outcomes])),
                "learnt": float(np.mean([one.learnt for one in outcomes])),
                "gain": figures["srcc"] - base["srcc"],
                **figures,
                "tied_pairs": tied_pairs(initial, scores, human),
                "coverage95": float(np.mean(covered)),
            }
        )
    return rows


def ablation_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `ablate` as a table."""
    contrast = report["contrast"]
    rows = [{**row, "tied": row.get("tied_pairs", {}).get("agreement")} for row in report["rows"]]
    return "\n".join(
        [
            f"Ablation: {report['n']} photos, {report['comparisons']} comparisons asked; rows "
            f"about the memory have {contrast['anchors']} anchors and {contrast['cases']} cases "
            f"({contrast['gated']} past the gate) learnt from {contrast['source']}",
            "",
            table_text(rows, _COLUMNS),
        ]
    )


_COLUMNS = (
    Column("factor", "factor"),
    Column("setting", "setting"),
    Column("neighbours", "compared", ".1f"),
    Column("learnt", "learnt", ".1f"),
    Column("srcc", "SRCC", ".4f"),
    Column("gain", "gain", "+.4f"),
    Column("plcc", "PLCC", ".4f"),
    Column("rmse", "RMSE", ".4f"),
    Column("js", "JS", ".3f"),
    Column("effective_bins", "bins", ".1f"),
    Column("tied", "tied pairs", ".3f"),
    Column("coverage95", "in 95 %", ".3f"),
)
