"""How results are written: text for people, JSON, JSON lines and CSV for programs."""

from __future__ import annotations

import csv
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, TextIO

from meiqa.errors import one_line
from meiqa.types import (
    Assessment,
    CulledPhoto,
    Culling,
    Distortion,
    Failure,
    Neighbour,
    PairComparison,
    QualityWord,
    RankedPhoto,
    Ranking,
)

__all__ = [
    "CSV_COLUMNS",
    "ResultWriter",
    "comparison_phrase",
    "csv_rows",
    "evaluation_text",
    "json_text",
    "result_writer",
    "telling_comparisons",
    "total_ms",
    "write_comparison",
    "write_culling",
    "write_ranking",
]

Format = Literal["text", "json", "jsonl", "csv"]

CSV_COLUMNS = (
    *("path", "score", "std", "ci95_low", "ci95_high", "initial_score", "word", "percentile"),
    *("summary", "compared", "degraded", "reflection", "total_ms", "error", "hint"),
)

RANKING_COLUMNS = (
    *("rank", "path", "score", "std", "alone", "compared", "places", "error", "hint"),
)

CULLING_COLUMNS = (
    *("group", "place", "best", "path", "score", "std", "alone", "likeness", "error", "hint"),
)

_LEAST_SHARE = 0.05
_METRICS = ("srcc", "plcc", "krcc", "rmse", "js", "effective_bins", "distinct", "tie_rate")


class ResultWriter(ABC):
    """Write results one by one as they come; closing completes the document."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def write(self, result: Assessment | Failure) -> None:
        """Write one result and hand it to the reader at once."""

    def close(self) -> None:
        """Complete the document; most formats are complete after every result."""
        self._stream.flush()

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class _TextWriter(ResultWriter):
    """One paragraph a photo; failures are left to the list at the end of the run."""

    def write(self, result: Assessment | Failure) -> None:
        if isinstance(result, Assessment):
            self._put(_assessment_text(result) + "\n")


class _JsonWriter(ResultWriter):
    """One array, whatever the number of photos; it is complete even if the run is cut short."""

    _separator = "[\n"

    def write(self, result: Assessment | Failure) -> None:
        self._put(self._separator + json_text(result.to_dict(), indent=2))
        self._separator = ",\n"

    def close(self) -> None:
        self._put("[]\n" if self._separator == "[\n" else "\n]\n")


class _JsonLinesWriter(ResultWriter):
    def write(self, result: Assessment | Failure) -> None:
        self._put(json_text(result.to_dict()) + "\n")


class _CsvWriter(ResultWriter):
    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._rows = csv_rows(stream, CSV_COLUMNS)

    def write(self, result: Assessment | Failure) -> None:
        if isinstance(result, Assessment):
            self._rows.writerow(_csv_row(result))
        else:
            self._rows.writerow(result.to_dict())
        self._stream.flush()


class _NewlineEnds:
    """Ends rows with a newline, not with a carriage return before it.

    The csv module, before Python 3.13, quotes carriage returns only where they end its rows, and
    does not read them unquoted.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, row: str) -> int:
        return self._stream.write(row.removesuffix("\r\n") + "\n")


def csv_rows(stream: TextIO, columns: Sequence[str]) -> csv.DictWriter[str]:
    """Write a table's header, and give the writer of its rows; a value may hold anything."""
    rows = csv.DictWriter(_NewlineEnds(stream), columns, restval="", lineterminator="\r\n")
    rows.writeheader()
    return rows


def result_writer(format: Format, stream: TextIO) -> ResultWriter:
    """Make the writer of a format."""
    writers: dict[Format, type[ResultWriter]] = {
        "text": _TextWriter,
        "json": _JsonWriter,
        "jsonl": _JsonLinesWriter,
        "csv": _CsvWriter,
    }
    return writers[format](stream)


def json_text(value: object, indent: int | None = None) -> str:
    """Serialise to JSON that every parser takes: ASCII, and null for NaN and infinities.

    >>> json_text({"srcc": float("nan")})
    '{"srcc": null}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def telling_comparisons(assessment: Assessment, count: int = 2) -> list[Neighbour]:
    """Pick the comparisons that say most beyond the initial score.

    These are the ones whose preference lies farthest from what the initial score predicts,
    Φ((initial − s_j) / √(1 + std_j²)) with one point of the scale as the unit of perception.
    """
    asked = [one for one in assessment.neighbours if one.preference is not None]
    return sorted(asked, key=lambda one: -_surprise(one, assessment.initial_score))[:count]


def comparison_phrase(neighbour: Neighbour) -> str:
    """Say how the photo fared against a neighbour.

    >>> comparison_phrase(Neighbour("a7", "anchor", 3.2, 0.1, 0.81))
    'beats a7 (3.20) 81 %'
    """
    if neighbour.preference is None:
        return f"not compared with {neighbour.id} ({neighbour.score:.2f})"
    wins = neighbour.preference >= 0.5
    share = neighbour.preference if wins else 1 - neighbour.preference
    verb = "beats" if wins else "loses to"
    return f"{verb} {neighbour.id} ({neighbour.score:.2f}) {100 * share:.0f} %"


def total_ms(timings_ms: Mapping[str, float]) -> float:
    """Give the whole time of a photo: the "total" stage, or else the sum of the stages."""
    return timings_ms["total"] if "total" in timings_ms else sum(timings_ms.values())


def write_comparison(comparison: PairComparison, format: Format, stream: TextIO) -> None:
    """Write one pair comparison; JSON is one object."""
    if format == "text":
        stream.write(_comparison_text(comparison) + "\n")
    elif format == "csv":
        values = comparison.to_dict()
        values["total_ms"] = f"{total_ms(values.pop('timings_ms')):.1f}"
        csv_rows(stream, list(values)).writerow(values)
    else:
        indent = 2 if format == "json" else None
        stream.write(json_text(comparison.to_dict(), indent) + "\n")


def write_ranking(ranking: Ranking, format: Format, stream: TextIO) -> None:
    """Write photos best first, and behind them those that could not be judged, but in text."""
    if format == "text":
        stream.writelines(f"{_ranked_text(photo)}\n" for photo in ranking.photos)
        return
    entries = [photo.to_dict() for photo in ranking.photos]
    entries += [failure.to_dict() for failure in ranking.failures]
    if format == "csv":
        csv_rows(stream, RANKING_COLUMNS).writerows(entries)
    else:
        stream.write(json_text(entries, indent=2) + "\n")


def write_culling(culling: Culling, format: Format, stream: TextIO) -> None:
    """Write the groups, best shot first, and behind them what could not be judged, but in text."""
    if format == "text":
        for group in culling.groups:
            stream.writelines(f"{_culled_text(photo, len(group))}\n" for photo in group)
    elif format == "csv":
        csv_rows(stream, CULLING_COLUMNS).writerows(culling.to_dicts())
    else:
        stream.write(json_text(culling.to_dicts(), indent=2) + "\n")


def _culled_text(photo: CulledPhoto, shots: int) -> str:
    mark = "*" if photo.place == 1 else " "
    like = "" if photo.place == 1 else f", likeness {photo.likeness:.2f}"
    facts = f"   ({photo.place} of {shots}, {photo.alone:.2f} alone{like})" if shots > 1 else ""
    return f"{mark} {photo.score:.2f} ± {photo.std:.2f}  {one_line(photo.path)}{facts}"


def _ranked_text(photo: RankedPhoto) -> str:
    moved = (
        "" if photo.places == 0 else f", {abs(photo.places)} {'up' if photo.places > 0 else 'down'}"
    )
    alone = f"{photo.alone:.2f} alone, {photo.compared} compared{moved}"
    return (
        f"{photo.rank:>4}  {photo.score:.2f} ± {photo.std:.2f}  {one_line(photo.path)}   ({alone})"
    )


def evaluation_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `meiqa eval` as a table."""
    low, high = report["mos_range"]
    lines = [
        f"{report['n']} photos, K = {report['k']}, human scores {low:g} to {high:g} mapped to 1-5",
        "",
        "".join([" " * 8, *(f"{name:>15}" for name in _METRICS)]),
    ]
    for stage in ("initial", "fused"):
        cells = (f"{report[stage][name]:15.4f}" for name in _METRICS)
        lines.append(f"{stage:<8}{''.join(cells)}")
    lines += [
        "",
        f"{100 * report['coverage95']:.1f} % of the human scores lie within the 95 % interval; "
        f"{report['seconds_per_image']:.3f} s a photo",
        "within other intervals: "
        + ", ".join(
            f"{100 * row['observed']:.1f} % in {100 * row['nominal']:.0f} %"
            for row in report["reliability"]
        ),
        _tied_text(report["tied_pairs"]),
    ]
    return "\n".join(lines)


def _tied_text(tied: Mapping[str, Any]) -> str:
    if not tied["pairs"]:
        return "no two photos that people tell apart have the same initial score"
    return (
        f"of {tied['pairs']} pairs that people tell apart and the initial score does not, "
        f"the fused score orders {100 * tied['agreement']:.1f} % as people do"
    )


def _assessment_text(assessment: Assessment) -> str:
    facts = [f"initial {assessment.initial_score:.2f}"]
    if not math.isnan(assessment.percentile):
        facts.append(f"better than {assessment.percentile:.0f} % of the anchors")
    facts.append(f"{total_ms(assessment.timings_ms):.0f} ms")
    lines = [
        assessment.path,
        f"  {assessment.score:.2f} ± {assessment.std:.2f}  {assessment.word}"
        f"   ({', '.join(facts)})",
    ]
    if assessment.summary:
        lines.append(f"  {assessment.summary}")
    if assessment.distortions:
        lines.append(f"  {', '.join(map(_distortion_phrase, assessment.distortions))}")
    if (beside := assessment.reference) is not None:
        lines.append(
            f"  beside {beside.path}: {beside.score:.2f} ± {beside.std:.2f}, "
            f"which moved the score by {beside.moved:+.2f}"
        )
    if assessment.grades:
        lines.append(f"  the model's grade: {_likely_grades(assessment.grades)}")
    if telling := telling_comparisons(assessment):
        asked = sum(one.preference is not None for one in assessment.neighbours)
        lines.append(f"  {_phrases(telling)} ({asked} compared)")
    if assessment.reflection:
        lines.append(f"  on reflection: {assessment.reflection}")
    if assessment.degraded:
        lines.append(f"  note: {'; '.join(assessment.degraded)}")
    return "\n".join(lines)


def _distortion_phrase(distortion: Distortion) -> str:
    share = f"{100 * distortion.probability:.0f} %"
    return f"{distortion.kind} {distortion.strength:.1f} of 5 ({share})"


def _likely_grades(grades: Mapping[QualityWord, float]) -> str:
    """The words that have a share worth naming."""
    named = {word: one for word, one in grades.items() if one >= _LEAST_SHARE}
    return ", ".join(f"{word} {100 * one:.0f} %" for word, one in named.items())


def _phrases(neighbours: Sequence[Neighbour]) -> str:
    return ", ".join(comparison_phrase(one) for one in neighbours)


def _comparison_text(comparison: PairComparison) -> str:
    first_wins = comparison.preference >= 0.5
    share = comparison.preference if first_wins else 1 - comparison.preference
    names = [comparison.first, comparison.second]
    winner, loser = names if first_wins else names[::-1]
    return (
        f"{winner} looks better than {loser} with probability {share:.2f}\n"
        f"  {comparison.first}: {comparison.first_score:.2f}\n"
        f"  {comparison.second}: {comparison.second_score:.2f}"
    )


def _csv_row(assessment: Assessment) -> dict[str, object]:
    return {
        "path": assessment.path,
        "score": f"{assessment.score:.4f}",
        "std": f"{assessment.std:.4f}",
        "ci95_low": f"{assessment.ci95[0]:.4f}",
        "ci95_high": f"{assessment.ci95[1]:.4f}",
        "initial_score": f"{assessment.initial_score:.4f}",
        "word": assessment.word,
        "percentile": f"{assessment.percentile:.1f}",
        "summary": assessment.summary or "",
        "compared": sum(one.preference is not None for one in assessment.neighbours),
        "degraded": ";".join(assessment.degraded),
        "reflection": assessment.reflection or "",
        "total_ms": f"{total_ms(assessment.timings_ms):.1f}",
    }


def _surprise(neighbour: Neighbour, initial_score: float) -> float:
    if neighbour.preference is None:
        return 0.0
    z = (initial_score - neighbour.score) / math.sqrt(1 + neighbour.std**2)
    return abs(neighbour.preference - 0.5 * math.erfc(-z / math.sqrt(2)))


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
