"""How results are written: text for people, JSON, JSON lines and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self, TextIO

from meiqa.errors import one_line
from meiqa.types import (
    Answer,
    Assessment,
    CulledPhoto,
    Culling,
    Failure,
    Neighbour,
    PairComparison,
    RankedPhoto,
    Ranking,
    digits_of,
)

Format = Literal["text", "json", "jsonl", "csv"]
RowFormat = Literal["csv", "jsonl"]

CSV_COLUMNS = (
    *("path", "score", "std", "ci95_low", "ci95_high", "initial_score", "word", "percentile"),
    *("summary", "compared", "degraded", "reflection", "total_ms", "error", "hint"),
)

_LEAST_SHARE = 0.05


class ResultWriter:
    """Write results one by one as they come; closing completes the document.

    JSON is one array, whatever the number of photos; it is complete even if the run is cut short.
    In text, failures are left to the list at the end of the run.
    """

    def __init__(self, format: Format, stream: TextIO) -> None:
        self._format, self._stream = format, stream
        self._separator = "[\n"
        if format == "csv":
            stream.write(header_text(format))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Complete the document."""
        if self._format == "json":
            self._stream.write("[]\n" if self._separator == "[\n" else "\n]\n")
        self._stream.flush()

    def write(self, result: Assessment | Failure) -> None:
        """Write one result and hand it to the reader at once."""
        if self._format == "json":
            self._stream.write(self._separator + json_text(result.to_dict(), indent=2))
            self._separator = ",\n"
        elif self._format != "text":
            self._stream.write(row_text(result, self._format))
        elif isinstance(result, Assessment):
            self._stream.write(assessment_text(result) + "\n")
        self._stream.flush()


def csv_line(cells: Iterable[object]) -> str:
    """Give cells, which may hold anything, as a line of CSV."""
    # Before Python 3.13 carriage returns are quoted only where they end the rows, and are not read
    # unquoted.
    line = io.StringIO(newline="")
    csv.writer(line).writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def csv_row(columns: Iterable[str], values: Mapping[str, Any]) -> str:
    """Give values as a line under these columns; what they lack is left empty."""
    return csv_line(_cell(name, values.get(name)) for name in columns)


def _cell(name: str, value: Any) -> Any:
    """A value as it stands in a table: numbers with the decimals they deserve."""
    if isinstance(value, float):
        return f"{value:.{digits_of(name)}f}" if math.isfinite(value) else ""
    return ";".join(value) if isinstance(value, list | tuple) else value


def header_text(format: RowFormat) -> str:
    """Give what stands above the rows of a file."""
    return csv_line(CSV_COLUMNS) if format == "csv" else ""


def row_text(result: Assessment | Failure, format: RowFormat) -> str:
    """Give a result as one row."""
    if format == "jsonl":
        return json_text(result.to_dict()) + "\n"
    values = cells_of(result) if isinstance(result, Assessment) else result.to_dict()
    return csv_row(CSV_COLUMNS, values)


def cells_of(assessment: Assessment) -> dict[str, Any]:
    """Give an assessment's values for a table, with what its columns sum up."""
    low, high = assessment.ci95
    return {
        **assessment.to_dict(),
        "ci95_low": low,
        "ci95_high": high,
        "compared": _compared(assessment),
        "total_ms": total_ms(assessment.timings_ms),
    }


def json_text(value: object, indent: int | None = None) -> str:
    """Serialise to JSON that every parser takes: ASCII, and null for NaN and infinities.

    >>> json_text({"srcc": float("nan")})
    '{"srcc": null}'
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def tree_text(values: Mapping[str, Any], depth: int = 0) -> str:
    """Lay out nested values, one to a line; a list of records becomes a table."""
    indent, lines = "  " * depth, []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}", tree_text(value, depth + 1)]
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{name}", *(f"{indent}  {row}" for row in _aligned(value))]
        else:
            lines.append(f"{indent}{name:<18}  {_shown(value)}")
    return "\n".join(lines)


def _aligned(records: Sequence[Mapping[str, object]]) -> list[str]:
    """Records under their names, in columns."""
    rows = [list(records[0]), *([_shown(v) for v in record.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _shown(value: object) -> str:
    if isinstance(value, list | tuple | Mapping):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


CLOSEST = 8
"""Neighbours on either side that say whether a score is in their line.

Those next to it are near ties: 27 % of BIQ2021's photos would be out of the line of 3, 10 % of 8.
"""


def reasons_for(
    score: float, neighbours: Iterable[Neighbour]
) -> tuple[tuple[Neighbour, ...], bool]:
    """Choose the comparisons that carried a score: the closest on either side in line with it.

    A neighbour agrees with the score if it is beaten and scores below, or wins and scores above.

    Returns:
        One of either side at most, and whether they agree. Where most of the closest do not, the
        photo is out of their line, and the closest that disagree are given.

    >>> below = Neighbour("a", "anchor", 3.0, 0.1, 0.8)
    >>> above = Neighbour("b", "anchor", 4.0, 0.1, 0.9)
    >>> reasons_for(3.5, [below, above]) == ((below,), True)
    True
    """

    def agrees(one: Neighbour) -> bool:
        return ((one.preference or 0.0) > 0.5) == (score > one.score)

    asked = [one for one in neighbours if one.preference is not None]
    asked.sort(key=lambda one: abs(one.score - score))
    below = [one for one in asked if one.score <= score]
    sides = below, [one for one in asked if one.score > score]
    closest = [agrees(one) for side in sides for one in side[:CLOSEST]]
    agree = 2 * sum(closest) >= len(closest)
    chosen = (next((one for one in side if agrees(one) == agree), None) for side in sides)
    return tuple(one for one in chosen if one is not None), agree


def reasons_phrase(assessment: Assessment) -> str:
    """Say which comparisons carried a score, or that they say otherwise; "" without any."""
    neighbours, agree = reasons_for(assessment.score, assessment.neighbours)
    phrase = ", ".join(map(comparison_phrase, neighbours))
    return phrase if agree or not phrase else f"its neighbours say otherwise: {phrase}"


def comparison_phrase(neighbour: Neighbour) -> str:
    """Say how the photo fared against a neighbour that it was compared with.

    >>> comparison_phrase(Neighbour("a7", "anchor", 3.2, 0.1, 0.81))
    'beats a7 (3.20) 81 %'
    """
    preference = neighbour.preference or 0.0
    verb = "beats" if preference >= 0.5 else "loses to"
    share = max(preference, 1 - preference)
    return f"{verb} {neighbour.id} ({neighbour.score:.2f}) {100 * share:.0f} %"


def failure_line(path: str, error: str) -> str:
    """Say what went wrong with which photo; most errors name it themselves."""
    path, error = one_line(path), one_line(error)
    return error if path in error else f"{path}: {error}"


def total_ms(timings_ms: Mapping[str, float]) -> float:
    """Give the whole time of a photo: the "total" stage, or else the sum of the stages."""
    return timings_ms["total"] if "total" in timings_ms else sum(timings_ms.values())


def write_comparison(comparison: PairComparison, format: Format, stream: TextIO) -> None:
    """Write one pair comparison; JSON is one object."""
    if format == "text":
        names = [comparison.first, comparison.second]
        winner, loser = names if comparison.preference >= 0.5 else names[::-1]
        share = max(comparison.preference, 1 - comparison.preference)
        probability = "over 0.99" if share >= 0.995 else f"{share:.2f}"
        if comparison.preference == 0.5 and comparison.first_score == comparison.second_score:
            stream.write(f"no difference between {comparison.first} and {comparison.second}\n")
        else:
            stream.write(f"{winner} looks better than {loser} with probability {probability}\n")
        stream.write(f"  {comparison.first}: {comparison.first_score:.2f}\n")
        stream.write(f"  {comparison.second}: {comparison.second_score:.2f}\n")
        if comparison.degraded:
            stream.write(f"  note: {'; '.join(comparison.degraded)}\n")
    elif format == "csv":
        values = {**comparison.to_dict(), "total_ms": total_ms(comparison.timings_ms)}
        del values["timings_ms"]
        stream.write(csv_line(values) + csv_row(values, values))
    else:
        indent = 2 if format == "json" else None
        stream.write(json_text(comparison.to_dict(), indent) + "\n")


def write_answers(answers: Sequence[Answer], format: Format, stream: TextIO) -> None:
    """Write how probable options are, the likeliest first; JSON is one array."""
    if format in ("json", "jsonl"):
        found = [answer.to_dict() for answer in answers]
        rows = [json_text(found, 2)] if format == "json" else map(json_text, found)
        stream.writelines(f"{row}\n" for row in rows)
        return
    columns = ("path", "question", "second", "option", "probability", "logprob")
    if format == "csv":
        stream.write(csv_line(columns))
    for answer in answers:
        beside = f" beside {one_line(answer.second)}" if answer.second else ""
        if format == "text":
            stream.write(f"{one_line(answer.path)}{beside}: {one_line(answer.question)}\n")
        for option, share in sorted(answer.probabilities.items(), key=lambda each: -each[1]):
            asked, log = (answer.path, answer.question, answer.second), answer.logprobs[option]
            if format == "csv":
                cells = zip(columns, (*asked, option, share, log), strict=True)
                stream.write(csv_row(columns, dict(cells)))
            else:
                stream.write(f"  {share:6.1%}  {one_line(option)}   (log-probability {log:.2f})\n")


def write_set(found: Ranking | Culling, format: Format, stream: TextIO) -> None:
    """Write photos best first, and behind them those that could not be judged, but in text.

    Those of a culling stand in their groups.
    """
    if isinstance(found, Ranking):
        columns = ["rank", "path", "score", "std", "alone", "compared", "places"]
        lines = [_ranked_text(photo) for photo in found.photos]
        entries = [photo.to_dict() for photo in found.photos]
    else:
        columns = ["group", "kind", "place", "best", "kept", "path", "score", "std", "alone"]
        columns += ["likeness", "too_close", "reason"]
        groups = list(enumerate(found.groups, 1))
        lines = [_culled_text(photo, len(group)) for _, group in groups for photo in group]
        entries = [{"group": n, **photo.to_dict()} for n, group in groups for photo in group]
    entries += [failure.to_dict() for failure in found.failures]
    if format == "text":
        stream.writelines(f"{line}\n" for line in lines)
    elif format == "csv":
        columns += ["error", "hint"]
        stream.write(csv_line(columns))
        stream.writelines(csv_row(columns, entry) for entry in entries)
    else:
        stream.write(json_text(entries, indent=2) + "\n")


def _culled_text(photo: CulledPhoto, shots: int) -> str:
    mark = "*" if photo.kept else " "
    score = f"{mark} {photo.score:.2f} ± {photo.std:.2f}  {one_line(photo.path)}"
    return f"{score}   ({place_phrase(photo, shots)})" if shots > 1 else score


def place_phrase(photo: CulledPhoto, shots: int) -> str:
    """Say how a photo stands in its group of so many shots, and why it is the best.

    >>> best = CulledPhoto(1, "a.jpg", 4.7, 0.3, 4.71, 1.0, kind="burst", reason="less noise")
    >>> place_phrase(best, 2)
    '1 of 2, 4.71 alone: less noise'
    """
    series = f"{photo.kind}, " if photo.in_series else ""
    like = "" if photo.place == 1 or photo.in_series else f", likeness {photo.likeness:.2f}"
    close = ", too close to call" if photo.too_close else ""
    reason = f": {photo.reason}" if photo.reason else ""
    return f"{series}{photo.place} of {shots}, {photo.alone:.2f} alone{like}{close}{reason}"


def _ranked_text(photo: RankedPhoto) -> str:
    moved = f", {abs(photo.places)} {'up' if photo.places > 0 else 'down'}" if photo.places else ""
    score = f"{photo.score:.2f} ± {photo.std:.2f}"
    facts = f"{photo.alone:.2f} alone, {photo.compared} compared{moved}"
    return f"{photo.rank:>4}  {score}  {one_line(photo.path)}   ({facts})"


def assessment_text(assessment: Assessment) -> str:
    """Lay out an assessment as a paragraph."""
    facts = [f"initial {assessment.initial_score:.2f}"]
    if not math.isnan(assessment.percentile):
        facts.append(f"better than {assessment.percentile:.0f} % of the anchors")
    facts.append(f"{total_ms(assessment.timings_ms):.0f} ms")
    score = f"{assessment.score:.2f} ± {assessment.std:.2f}  {assessment.word}"
    lines = [one_line(assessment.path), f"  {score}   ({', '.join(facts)})"]
    if assessment.summary:
        lines.append(f"  {assessment.summary}")
    if (detail := assessment.detail) is not None:
        x, y, *_ = detail.place
        lines.append(
            f"  at 100 %: edges {1 / detail.sharpness:.1f} px wide, motion {detail.motion:.1f} px, "
            f"noise {detail.noise:.1f}   (sharpest at {x}, {y})"
        )
        if (jpeg := detail.jpeg) is not None:
            lines.append(f"  JPEG quality {jpeg.quality} ({jpeg.source})")
    if assessment.distortions:
        seen = (
            f"{each.kind} {each.strength:.1f} of 5 ({100 * each.probability:.0f} %)"
            for each in assessment.distortions
        )
        lines.append(f"  {', '.join(seen)}")
    if (beside := assessment.reference) is not None:
        lines.append(
            f"  beside {beside.path}: {beside.score:.2f} ± {beside.std:.2f}, "
            f"which moved the score by {beside.moved:+.2f}"
        )
    if assessment.grades:
        likely = (
            f"{word} {100 * share:.0f} %"
            for word, share in assessment.grades.items()
            if share >= _LEAST_SHARE
        )
        lines.append(f"  the model's grade: {', '.join(likely)}")
    if asked := _compared(assessment):
        lines.append(f"  {reasons_phrase(assessment)} ({asked} compared)")
    # Where the score alone moved, the corrected description says the same.
    if assessment.reflection and not assessment.reflection.startswith(assessment.summary or ""):
        lines.append(f"  on reflection: {assessment.reflection}")
    if assessment.degraded:
        lines.append(f"  note: {'; '.join(assessment.degraded)}")
    return "\n".join(lines)


def _compared(assessment: Assessment) -> int:
    return sum(one.preference is not None for one in assessment.neighbours)
