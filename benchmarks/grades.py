"""Score heads side by side: how many photos get two modes, and how near each comes to people.

The model is asked once about each photo; what it says is judged by every head, alone and fused
with the same comparisons. With `--screens` pictures that people have not scored are looked at, too:
screen content and generated-looking ones, whose order under blur and compression is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.labelled import engine_of, labelled_parser, labels_of, print_report
from benchmarks.ladder import photographs_of
from benchmarks.screens import KINDS, rungs
from meiqa.engine.calibration import SCORE_HEADS, ScoreHead
from meiqa.engine.engine import Engine
from meiqa.engine.estimates import Z95, fold
from meiqa.engine.images import load_pixels
from meiqa.engine.model import Description, Model, Prefix
from meiqa.engine.scoring import Prediction, Scorer
from meiqa.errors import UsageError
from meiqa.evaluation.accuracy import photos_of
from meiqa.evaluation.measuring import Column, run_on, table_text
from meiqa.evaluation.metrics import rmse, srcc
from meiqa.evaluation.recording import AskedOnce, Recorder
from meiqa.kernels.graded import multimodal, soft_grades
from meiqa.labels import LabelTable
from meiqa.memory import MemoryBank, RetrievalPolicy
from meiqa.progress import Progress

__all__ = ["bench_grades", "bench_screens", "calibration_error", "grades_text", "main"]

Floats = NDArray[np.float64]
Answers = dict[str, tuple[Prefix, Any]]
"""What was asked about the last photo, by question, with its prefix."""

CLEAR_DEPTH = 0.01
"""A dip between two modes that a person would see in the numbers."""
_BINS = 10


class HeadedModel:
    """A model with another score head, over answers about one photo that all heads share."""

    def __init__(
        self, model: Model, head: ScoreHead, answers: dict[str, tuple[Prefix, Any]]
    ) -> None:
        self._model, self.head, self._answers = model, head, answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def grade(self, prefix: Prefix) -> Floats:
        """Give the words' probabilities (5,)."""
        words: Floats = self._once("grade", prefix, lambda: self._model.grade(prefix))
        return words

    def describe(self, prefix: Prefix, max_tokens: int, *_: object) -> Description:
        """Give the description."""
        made: Description = self._once(
            "describe", prefix, lambda: self._model.describe(prefix, max_tokens)
        )
        return made

    def _once(self, question: str, prefix: Prefix, ask: Callable[[], Any]) -> Any:
        asked, _ = self._answers.get(question, (None, None))
        if asked is not prefix:
            self._answers[question] = prefix, ask()
        return self._answers[question][1]


class HeadRecorder(Recorder):
    """Scores by one head what was asked once for all of them."""

    def __init__(
        self,
        asked: AskedOnce,
        memory: MemoryBank,
        head: ScoreHead,
        answers: Answers,
    ) -> None:
        super().__init__(asked, memory)
        self.model = cast(Model, HeadedModel(asked.model, head, answers))

    def predict(self, *arguments: Any) -> Prediction:
        """Make this head's own prediction of the answers."""
        return Scorer.predict(self, *arguments)


def recorders_of(engine: Engine) -> dict[ScoreHead, HeadRecorder]:
    """Give a recorder for each head.

    Raises:
        UsageError: the package has no graded response.
    """
    if engine.model.calibration.graded is None:
        raise UsageError(
            "the package has no graded response",
            hint="fit one: python -m training.graded LABELS.csv --images DIR --package PACKAGE",
        )
    asked, answers = AskedOnce(engine.model), dict[str, tuple[Prefix, Any]]()
    return {head: HeadRecorder(asked, engine.memory, head, answers) for head in SCORE_HEADS}


def bench_grades(
    engine: Engine,
    labels: LabelTable,
    images_dir: str | Path,
    *,
    on_photo: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Judge the photos of a table by every head.

    Args:
        engine: Of a package with a graded response.
        labels: The photos, relative to ``images_dir``, and their human scores.
        images_dir: Where the photos are.
        on_photo: Called after each photo.

    Returns:
        JSON-ready: n, multimodal (shares of photos whose grades have more than one mode, and more
        than one with a dip of a hundredth between them) of the softmax over the grade words and of
        the graded response, and for each head: alone (the head's own score) and fused, each with
        srcc, rmse and coverage95; and of its grades the expected calibration error and the
        log-loss, people's scores being shared between the two grades around them.

    Raises:
        ImageError: a photo cannot be judged.
        UsageError: the directory is missing, or the package has no graded response.
    """
    recorders = recorders_of(engine)
    rows: dict[ScoreHead, list[tuple[float, ...]]] = {head: [] for head in recorders}
    grades: dict[ScoreHead, list[Floats]] = {head: [] for head in recorders}
    for photo in photos_of(labels, images_dir):
        pixels = load_pixels(photo)
        for head, recorder in recorders.items():
            scored = recorder.recorded(pixels, engine.scorer.retrieval)
            alone, fused = fold(scored.prediction.estimates), scored.posterior
            rows[head].append((alone.score, alone.std, fused.score, fused.std))
            grades[head].append(scored.prediction.grading.grades)
        on_photo()
    human = np.array(labels.scores_1_to_5())
    return {
        "n": len(human),
        "multimodal": {
            "softmax": mode_shares(grades["levels"]),
            "graded": mode_shares(grades["grm"]),
        },
        "heads": {
            head: {**head_figures(np.array(rows[head]), human), **fit_of(grades[head], human)}
            for head in recorders
        },
        "default": engine.model.head,
    }


def mode_shares(grades: Sequence[Floats]) -> dict[str, float]:
    """Shares of photos with more than one mode, and with a clear dip between them."""
    rows = np.array(grades)
    return {
        "share": float(np.mean(multimodal(rows))),
        "clear": float(np.mean(multimodal(rows, CLEAR_DEPTH))),
    }


def head_figures(rows: Floats, human: Floats) -> dict[str, Any]:
    """Agreement of rows (N, 4): score and deviation alone, then fused."""
    return {
        stage: {
            "srcc": srcc(scores, human),
            "rmse": rmse(scores, human),
            "coverage95": float(np.mean(np.abs(scores - human) <= Z95 * stds)),
        }
        for stage, scores, stds in (
            ("alone", rows[:, 0], rows[:, 1]),
            ("fused", rows[:, 2], rows[:, 3]),
        )
    }


def fit_of(grades: Sequence[Floats], human: Floats) -> dict[str, float]:
    """How grade probabilities go with people's scores."""
    probabilities, shares = np.array(grades), soft_grades(human)
    logs = np.log(np.maximum(probabilities, 1e-12))
    return {
        "calibration_error": calibration_error(probabilities, shares),
        "log_loss": float(-np.mean(np.sum(shares * logs, axis=1))),
    }


def calibration_error(probabilities: ArrayLike, shares: ArrayLike) -> float:
    """Return the expected calibration error of grade probabilities, the mean over the five grades.

    For each grade, photos are put into ten equal bins by its probability; in each bin its mean is
    compared with the mean share that people gave it.

    Args:
        probabilities: ``(N, 5)``; shares: ``(N, 5)`` of people's votes.

    Example:
        >>> calibration_error([[0, 0, 1, 0, 0]] * 2, [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]])
        0.2
    """
    predicted = np.asarray(probabilities, np.float64)
    given = np.asarray(shares, np.float64)
    bins = np.minimum((predicted * _BINS).astype(np.intp), _BINS - 1)
    gaps = [
        abs(float(np.sum((predicted - given)[:, grade][bins[:, grade] == one])))
        for grade in range(5)
        for one in range(_BINS)
    ]
    return sum(gaps) / (5 * len(predicted))


def bench_screens(
    engine: Engine, photographs: Sequence[Path], *, on_photo: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Judge pictures made from photographs, at four levels of blur and of compression each.

    Args:
        engine: Of a package with a graded response.
        photographs: Pristine ones.
        on_photo: Called after each photograph.

    Returns:
        JSON-ready: photographs, and for each kind of picture and each head: srcc (of the score and
        the level, within each picture and ladder, the mean; positive when scores fall), falling
        (share of steps down the ladder on which the score falls), moved (mean difference of the
        unspoilt picture's score from the photograph's), and for the softmax over the grade words
        and the graded response the shares with more than one mode.
    """
    recorders = recorders_of(engine)
    scores: dict[tuple[str, ScoreHead], list[float]] = {}
    grades: dict[tuple[str, ScoreHead], list[Floats]] = {}
    for photograph in photographs:
        pixels = load_pixels(photograph)
        for rung in rungs(pixels.array, int(pixels.digest[:8], 16)):
            made = load_pixels(rung.pixels)
            for head, recorder in recorders.items():
                prediction = recorder.recorded(made, RetrievalPolicy(k=0)).prediction
                score = fold(prediction.estimates).score
                scores.setdefault((rung.kind, head), []).append(score)
                grades.setdefault((rung.kind, head), []).append(prediction.grading.grades)
        on_photo()
    ladders = {
        key: np.array(column).reshape(len(photographs), -1, 4) for key, column in scores.items()
    }
    return {
        "photographs": len(photographs),
        "kinds": {
            kind: {
                "heads": {
                    head: ladder_figures(ladders[kind, head], ladders["photograph", head])
                    for head in recorders
                },
                "multimodal": {
                    "softmax": mode_shares(grades[kind, "levels"]),
                    "graded": mode_shares(grades[kind, "grm"]),
                },
            }
            for kind in KINDS
        },
    }


def ladder_figures(scores: Floats, photographs: Floats) -> dict[str, float]:
    """Figures of scores (P, 2, 4) on P pictures' two ladders, beside those of the photographs."""
    levels = np.arange(scores.shape[2], dtype=np.float64)
    return {
        "srcc": float(np.mean([-srcc(one, levels) for one in scores.reshape(-1, len(levels))])),
        "falling": float(np.mean(np.diff(scores, axis=2) < 0.0)),
        "moved": float(np.mean(scores[:, :, 0] - photographs[:, :, 0])),
    }


def grades_text(report: Mapping[str, Any]) -> str:
    """Lay out the report as tables."""
    modes = report["multimodal"]
    lines = [
        f"{report['n']} photos; more than one mode: softmax over the grade words "
        f"{100 * modes['softmax']['share']:.1f} % ({100 * modes['softmax']['clear']:.1f} % with a "
        f"dip of {CLEAR_DEPTH}), graded response {100 * modes['graded']['share']:.1f} %",
        "",
        table_text(list(_head_rows(report)), _HEAD_COLUMNS),
    ]
    if "screens" in report:
        lines += ["", f"made from {report['screens']['photographs']} photographs", ""]
        lines.append(table_text(list(_screen_rows(report["screens"])), _SCREEN_COLUMNS))
    return "\n".join(lines)


def _head_rows(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for head, figures in report["heads"].items():
        yield {
            "head": f"{head} (default)" if head == report["default"] else head,
            **{f"alone_{name}": value for name, value in figures["alone"].items()},
            **{f"fused_{name}": value for name, value in figures["fused"].items()},
            "calibration_error": figures["calibration_error"],
            "log_loss": figures["log_loss"],
        }


def _screen_rows(screens: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for kind, found in screens["kinds"].items():
        for head, figures in found["heads"].items():
            modes = found["multimodal"]["graded" if head == "grm" else "softmax"]
            yield {"kind": kind, "head": head, **figures, "modes": modes["share"]}


_HEAD_COLUMNS = (
    Column("head", "head"),
    Column("alone_srcc", "SRCC", ".4f"),
    Column("alone_rmse", "RMSE", ".4f"),
    Column("alone_coverage95", "in 95 %", ".1%"),
    Column("fused_srcc", "fused SRCC", ".4f"),
    Column("fused_rmse", "RMSE", ".4f"),
    Column("fused_coverage95", "in 95 %", ".1%"),
    Column("calibration_error", "grades: calibration error", ".4f"),
    Column("log_loss", "log-loss", ".4f"),
)
_SCREEN_COLUMNS = (
    Column("kind", "picture"),
    Column("head", "head"),
    Column("srcc", "SRCC with the level", ".4f"),
    Column("falling", "steps that fall", ".1%"),
    Column("moved", "moved", "+.2f"),
    Column("modes", "more than one mode", ".1%"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables, or JSON."""
    parser = labelled_parser("grades", __doc__)
    parser.add_argument("--screens", help="a directory of pristine photographs to draw on")
    parser.add_argument("--screens-index", help="CSV: only those that training keeps unseen")
    parser.add_argument("--screens-limit", type=int, default=12, help="photographs of them")
    given = parser.parse_args(arguments)
    labels = labels_of(given)
    drawn_on = (
        photographs_of(given.screens, given.screens_index)[: given.screens_limit]
        if given.screens
        else []
    )
    steps = len(labels) + len(drawn_on)
    with engine_of(given) as engine, Progress(steps) as progress:
        report = bench_grades(engine, labels, given.images, on_photo=progress.advance)
        if drawn_on:
            report["screens"] = bench_screens(engine, drawn_on, on_photo=progress.advance)
    report |= run_on("numpy", "onnxruntime", "pillow")
    print_report(report, given, grades_text)


if __name__ == "__main__":
    main()
