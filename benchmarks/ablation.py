"""What each estimate, memory, retrieval key, number of neighbours and both orders are worth.

    python -m benchmarks.ablation LABELS.csv --images DIR

Each photo is read, described and graded once, and each pair of photo and neighbour is asked once
in each order, whatever the number of rows. Every row is a score as the engine makes it, with
another memory or policy, or folded again without one of its estimates.

Rows about the contrast memory need one. It is learnt from photos whose human scores are not
looked at: a quarter of the anchors, which then are no anchors in any of these rows, or the photos
of another table. Photos that the model was trained on teach more than new ones would, since their
initial scores are nearly the human ones; the anchors were kept out of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.labelled import engine_of, labelled_parser, labels_of, other_table, print_report
from meiqa.engine.engine import Engine
from meiqa.engine.estimates import Comparisons, Evidence, Posterior, fold, preferences_of
from meiqa.engine.images import Pixels, fit_to_grid, load_pixels
from meiqa.engine.model import VisualTokens
from meiqa.engine.scoring import Scored, learned_case
from meiqa.errors import ImageError, UsageError
from meiqa.evaluation.accuracy import coverage, photos_of
from meiqa.evaluation.measuring import Column, run_on, table_text
from meiqa.evaluation.metrics import summarise, tied_pairs
from meiqa.evaluation.plots import STYLE, draw_agreement
from meiqa.evaluation.recording import AskedOnce, Recorder
from meiqa.labels import LabelTable
from meiqa.memory import (
    AnchorWriter,
    Case,
    ContrastPolicy,
    MemoryBank,
    RetrievalPolicy,
    key_widths,
    retrieval_key,
)
from meiqa.progress import Progress
from meiqa.types import Failure, KeyKind

__all__ = ["ablate", "ablation_text", "draw_neighbours", "main"]

KEY_KINDS: tuple[KeyKind, ...] = get_args(KeyKind)
ESTIMATES = ("rating", "grade", "regression", "comparisons")
NEIGHBOURS = (0, 1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        factor: what is varied; name: its value.
        place: name of the memory; policy: what is retrieved from it.
        both_orders: whether both answers are used, or the one with the photo shown first.
        without: the estimate that is left out.
    """

    factor: str
    name: str
    place: str
    policy: RetrievalPolicy
    both_orders: bool = True
    without: str | None = None

    def posterior(self, scored: Scored) -> Posterior:
        """Fold a photo's estimates as this row has them; one that all others need stays."""
        estimates = [self._as_asked(each, scored) for each in scored.estimates]
        kept = [each for each in estimates if each.name != self.without]
        return fold(estimates if isinstance(kept[0], Comparisons) else kept)

    def _as_asked(self, estimate: Evidence, scored: Scored) -> Evidence:
        if self.both_orders or not isinstance(estimate, Comparisons):
            return estimate
        first = scored.logits * [1.0, np.nan]
        return replace(
            estimate, preferences=preferences_of(first, estimate.calibration.temperature)
        )


class Outcome(NamedTuple):
    """What a setting says of one photo: a posterior, of so many neighbours, some of them learnt."""

    posterior: Posterior
    neighbours: int
    learnt: int


@dataclass(frozen=True, eq=False)
class Sheet:
    """One photo under all settings, and its human score on 1-5."""

    human: float
    initial: float
    outcomes: tuple[Outcome, ...]


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


def ablate(
    engine: Engine,
    labels: LabelTable,
    images_dir: str | Path,
    *,
    contrast_from: LabelTable | None = None,
    neighbours: Sequence[int] = NEIGHBOURS,
    on_photo: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Judge the photos of a table under every setting.

    Args:
        engine: Whose model and anchors are used.
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
    settings = settings_of(engine.scorer.retrieval, neighbours)
    sheets: list[Sheet] = []
    failures: list[Failure] = []
    with TemporaryDirectory(prefix="meiqa-ablation-") as folder, ExitStack() as stack:
        places = Places(engine, Path(folder), stack)
        lesson = places.learn(teachers)
        for photo, human in zip(photos, labels.scores_1_to_5(), strict=True):
            try:
                sheets.append(sheet_of(load_pixels(photo), human, settings, places))
            except ImageError as error:
                failures.append(Failure(str(photo), error))
            on_photo()
    if len(sheets) < 2:
        raise UsageError(f"{len(sheets)} of {len(photos)} photos could be judged", allowed="2 up")
    return {
        "n": len(sheets),
        "rows": rows_of(settings, sheets),
        "contrast": {
            "source": lesson.source,
            "anchors": len(lesson.anchors),
            "cases": len(lesson.cases),
            "gated": len(lesson.gated),
        },
        "comparisons": places.asked.count,
        **run_on("numpy", "onnxruntime"),
        "failures": [failure.to_dict() for failure in failures],
    }


def settings_of(usual: RetrievalPolicy, neighbours: Sequence[int]) -> list[Setting]:
    """List the rows: each factor is varied about what the package does by default."""
    anchors = replace(usual, anchor_share=1.0)
    flat, contrast = replace(anchors, bins=1), replace(usual, anchor_share=0.0)
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
        *(Setting("without", name, "usual", anchors, without=name) for name in ESTIMATES),
    ]


class Places:
    """The memories that neighbours are retrieved from, each with its recorder, by name.

    Args:
        engine: whose model and memory; its memory is "usual".
        folder: where memories may be written; stack: what closes them.

    Raises:
        StoreMismatch: the memory holds no summary keys, which other kinds are made of.
    """

    def __init__(self, engine: Engine, folder: Path, stack: ExitStack) -> None:
        self.asked = AskedOnce(engine.model)
        self.policy = engine.scorer.retrieval
        self._folder, self._stack = folder, stack
        usual = engine.memory
        self._recorders = {"usual": Recorder(self.asked, usual)}
        entries = usual.snapshot().views["anchor"].all_entries()
        self.anchors = sorted((entry.case for entry in entries), key=lambda case: case.id)
        self._kind = usual.key_kind
        self._widths = key_widths(usual.key_kind, *engine.model.widths)
        for kind in KEY_KINDS:
            if kind != usual.key_kind:
                usual.rekey(kind, folder / kind)
                self._open(kind, folder / kind)
            else:
                self._recorders[kind] = self._recorders["usual"]
        self._write(map(with_random_key, self.anchors), folder / "random")
        self._open("random", folder / "random")

    def __getitem__(self, name: str) -> Recorder:
        return self._recorders[name]

    def learn(self, teachers: Sequence[Path] | None) -> Lesson:
        """Learn from photos, or from a quarter of the anchors as if they were photos.

        Raises:
            ImageError: a photo cannot be judged.
            UsageError: there is too little to learn from.
        """
        usual, kept, source = self["usual"], tuple(self.anchors), "another table"
        learners: Iterable[Pixels] = map(load_pixels, teachers or ())
        if teachers is None:
            in_turn = sorted(kept, key=lambda case: hashlib.sha256(case.id.encode()).hexdigest())
            held = in_turn[: len(kept) // 4]
            kept = tuple(in_turn[len(held) :])
            learners, source = (
                (remembered(usual, case) for case in held),
                "a quarter of the anchors",
            )
        if not kept:
            seen = len(self.anchors)
            raise UsageError("the memory has too few anchors", seen=seen, allowed="4 or more")
        recorder = Recorder(self.asked, self._learner(kept, "lesson"))
        cases: list[Case] = []
        gated: set[str] = set()
        for pixels in learners:
            scored = recorder.recorded(pixels, self.policy)
            case = reflected_case(recorder, scored)
            if case is None:
                continue
            cases.append(case)
            moved = abs(scored.posterior.score - scored.initial_score)
            if moved > self.asked.model.calibration.reflect_above:
                gated.add(case.id)
        if not cases:
            raise UsageError("nothing was learnt", hint="give more photos with --contrast-from")
        for name, ids in (("taught", {case.id for case in cases}), ("taught by gated", gated)):
            bank = self._learner(kept, name)
            for case in cases:
                if case.id in ids:
                    bank.remember(case, provenance=source)
            self._recorders[name] = Recorder(self.asked, bank)
        return Lesson(tuple(cases), frozenset(gated), source, kept)

    def _learner(self, anchors: Sequence[Case], name: str) -> MemoryBank:
        """Write anchors to a new memory, and open it to learn everything."""
        self._write(anchors, self._folder / name)
        everything = ContrastPolicy(admission="all", merge_above=1.0)
        return self._opened(self._folder / name, "rw", everything)

    def _open(self, name: str, path: Path) -> None:
        self._recorders[name] = Recorder(self.asked, self._opened(path))

    def _opened(
        self, path: Path, mode: Literal["r", "rw"] = "r", policy: ContrastPolicy | None = None
    ) -> MemoryBank:
        digest = self.asked.model.digest
        bank = MemoryBank.open(path, mode, package_digest=digest, policy=policy)
        return self._stack.enter_context(bank)

    def _write(self, anchors: Iterable[Case], path: Path) -> None:
        digest, widths = self.asked.model.digest, self._widths
        with AnchorWriter(path, digest, widths.key, widths.token, key_kind=self._kind) as writer:
            for case in anchors:
                writer.add(case, provenance="copied from another memory")
            writer.finish()


def remembered(recorder: Recorder, case: Case) -> Pixels:
    """Stand in for a remembered photo, of which the visual tokens are kept.

    Its prefix is read from them; a blank of its size takes the place of its pixels.
    """
    (prefix,) = recorder.model.prefill([VisualTokens(case.tokens, case.grid)])
    recorder.prefixes.put("photos", case.image_digest, prefix)
    rows, columns = (side * recorder.model.image.cell_pixels for side in case.grid)
    blank = Pixels(np.zeros((rows, columns, 3), np.uint8), case.image_digest, case.id)
    assert fit_to_grid(blank, recorder.model.image).shape == blank.array.shape
    return blank


def reflected_case(recorder: Recorder, scored: Scored) -> Case | None:
    """Reflect on a photo, whether or not its score moved; None where nothing is written."""
    description, prefix = scored.prediction.description, scored.prefix
    if description is None:
        return None
    corrected = recorder.model.reflect(
        prefix, description.text, scored.initial_score, scored.posterior.score
    )
    if corrected.key is None:
        return None
    key = retrieval_key(recorder.memory.key_kind, corrected.key, prefix.tokens.values)
    return learned_case(scored, corrected.text, key)


def with_random_key(case: Case) -> Case:
    """Give a case a key that says nothing, drawn by the digest of the pixels: always the same."""
    random = np.random.default_rng(int(case.image_digest, 16))
    return replace(case, key=random.standard_normal(len(case.key), np.float32))


def sheet_of(pixels: Pixels, human: float, settings: Sequence[Setting], places: Places) -> Sheet:
    """Judge one photo under all settings."""
    outcomes = []
    for setting in settings:
        scored = places[setting.place].recorded(pixels, setting.policy)
        learnt = sum(case.origin == "contrast" for case in scored.neighbours)
        outcomes.append(Outcome(setting.posterior(scored), len(scored.neighbours), learnt))
    return Sheet(human, scored.initial_score, tuple(outcomes))


def rows_of(settings: Sequence[Setting], sheets: Sequence[Sheet]) -> list[dict[str, Any]]:
    """Give the figures of the initial score and of every setting."""
    human = np.array([sheet.human for sheet in sheets])
    initial = np.array([sheet.initial for sheet in sheets])
    base = summarise(initial, human)
    rows: list[dict[str, Any]] = [
        {"factor": "memory", "setting": "initial score", "k": 0, "gain": 0.0, **base}
    ]
    for at, setting in enumerate(settings):
        posteriors, neighbours, learnt = zip(*(sheet.outcomes[at] for sheet in sheets), strict=True)
        scores = np.array([posterior.score for posterior in posteriors])
        figures = summarise(scores, human)
        rows.append(
            {
                "factor": setting.factor,
                "setting": setting.name,
                "k": setting.policy.k,
                "orders": 2 if setting.both_orders else 1,
                "neighbours": float(np.mean(neighbours)),
                "learnt": float(np.mean(learnt)),
                "gain": figures["srcc"] - base["srcc"],
                **figures,
                "tied_pairs": tied_pairs(initial, scores, human),
                "coverage95": coverage([posterior.ci95 for posterior in posteriors], human),
            }
        )
    return rows


def ablation_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `ablate` as a table."""
    contrast = report["contrast"]
    rows = [{**row, "tied": row.get("tied_pairs", {}).get("agreement")} for row in report["rows"]]
    columns = (
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
    heading = (
        f"Ablation: {report['n']} photos, {report['comparisons']} comparisons asked; rows about "
        f"the memory have {contrast['anchors']} anchors and {contrast['cases']} cases "
        f"({contrast['gated']} past the gate) learnt from {contrast['source']}"
    )
    return f"{heading}\n\n{table_text(rows, columns)}"


def draw_neighbours(report: Mapping[str, Any]) -> Figure:
    """Draw the agreement by the number of neighbours."""
    chosen = [row for row in report["rows"] if row["factor"] == "neighbours"]
    figure, axes = draw_agreement(
        "agreement by the number of neighbours",
        "neighbours compared with, K",
        range(len(chosen)),
        [row["srcc"] for row in chosen],
        {"initial score": report["rows"][0]["srcc"]},
    )
    axes.set_xticks(range(len(chosen)), [row["setting"] for row in chosen])
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ablation and print its table, or JSON."""
    parser = labelled_parser("ablation", __doc__)
    parser.add_argument("--contrast-from", help="a table to learn the contrast memory from")
    parser.add_argument("--train-split", help="only the rows of this split of --contrast-from")
    parser.add_argument("--plot", type=Path, help="draw the SRCC by the number of neighbours")
    given = parser.parse_args(arguments)
    labels = labels_of(given)
    contrast = other_table(given.contrast_from, given.train_split, labels)
    with engine_of(given) as engine, Progress(len(labels)) as progress:
        report = ablate(
            engine, labels, given.images, contrast_from=contrast, on_photo=progress.advance
        )
    if given.plot is not None:
        with rc_context(STYLE):
            draw_neighbours(report).savefig(given.plot)
    print_report(report, given, ablation_text)


if __name__ == "__main__":
    main()
