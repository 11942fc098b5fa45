"""Label tables: photographs and their human scores."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from meiqa.errors import UsageError

_IMAGE_COLUMNS = ("file", "path", "image", "filename", "name")
_SCORE_COLUMNS = ("mos", "score", "quality")
_KNOWN_RANGES = ((0.0, 1.0), (1.0, 5.0), (0.0, 100.0))
_DOUBTFUL = 10.0
"""Scores of which none is above this are hardly on the scale 0–100."""
_GUESSED = "0 to 1, 1 to 5 or, with some above 10, 0 to 100"
_HINT = "give the ends of the scale with --mos-range LO HI"


@dataclass(frozen=True)
class LabelTable:
    """Image files and their human scores on the scale `mos_range`, higher is better."""

    files: tuple[str, ...]
    scores: tuple[float, ...]
    mos_range: tuple[float, float]

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        split: str | None = None,
        mos_range: Sequence[float] | None = None,
    ) -> Self:
        """Read a CSV file with a header, of commas, semicolons (decimal commas, too) or tabs.

        The image column is the first of file, path, image, filename, name that is there; the score
        column the first of mos, score, quality; an optional column split selects rows.

        Args:
            path: The table.
            split: Only rows whose split is this.
            mos_range: Ends of the human scale; without it the first of 0–1, 1–5 and 0–100 that
                holds every score of the table, whatever its split, and leaves no doubt.

        Raises:
            UsageError: the file, its columns, a score or the split make no sense.
        """
        rows, columns = _rows(Path(path))
        image, column = (
            _column(columns, names, path) for names in (_IMAGE_COLUMNS, _SCORE_COLUMNS)
        )
        scores = [_score(row[column], line, path) for line, row in rows]
        limits = _range_of(scores, mos_range, path)
        if split is not None and "split" not in columns:
            seen = f"the columns {', '.join(columns)}"
            raise UsageError(f"{path} has no split column", seen=seen)
        chosen = [
            (row[image], score)
            for (_, row), score in zip(rows, scores, strict=True)
            if split is None or row["split"] == split
        ]
        if not chosen:
            allowed = ", ".join(sorted({row["split"] for _, row in rows}))
            raise UsageError(f"{path} has no such split", seen=split, allowed=allowed)
        files, kept = zip(*chosen, strict=True)
        return cls(files, kept, limits)

    def spread(self, limit: int | None) -> Self:
        """Keep `limit` rows at equal distances, for tables are often sorted by kind or score."""
        if limit is None or limit >= len(self):
            return self
        chosen = [index * len(self) // limit for index in range(limit)]
        files, scores = (self.files[i] for i in chosen), (self.scores[i] for i in chosen)
        return type(self)(tuple(files), tuple(scores), self.mos_range)

    def contradictions(self) -> dict[str, list[float]]:
        """Give the files that have several scores, with these."""
        scores: dict[str, dict[float, None]] = {}
        for file, score in zip(self.files, self.scores, strict=True):
            scores.setdefault(file, {})[score] = None
        return {file: [*given] for file, given in scores.items() if len(given) > 1}

    def scores_1_to_5(self) -> tuple[float, ...]:
        """Map the human scores linearly to 1–5."""
        low, high = self.mos_range
        return tuple(1 + 4 * (score - low) / (high - low) for score in self.scores)


def _rows(path: Path) -> tuple[list[tuple[int, dict[str, str]]], tuple[str, ...]]:
    """Read (line number, row) pairs and the column names in lower case."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=header.count)
            reader = csv.DictReader(file, restval="", restkey="", delimiter=delimiter)
            columns = tuple((name or "").strip().lower() for name in reader.fieldnames or ())
            reader.fieldnames = list(columns)
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        allowed = "a CSV file with an image and a score column"
        raise UsageError(f"{path}: {error.strerror}", allowed=allowed) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if not rows:
        raise UsageError(f"{path} holds no rows")
    return rows, columns


def _column(columns: Sequence[str], accepted: Sequence[str], path: str | Path) -> str:
    for name in accepted:
        if name in columns:
            return name
    kind = "image" if accepted is _IMAGE_COLUMNS else "score"
    seen, allowed = f"the columns {', '.join(columns)}", ", ".join(accepted)
    raise UsageError(f"{path} has no {kind} column", seen=seen, allowed=allowed, hint="rename one")


def _score(text: str, line: int, path: str | Path) -> float:
    try:
        score = float(text.replace(",", "."))
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise UsageError(f"{path}, line {line}: the score is not a number", seen=repr(text))
    return score


def _range_of(
    scores: Sequence[float], mos_range: Sequence[float] | None, path: str | Path
) -> tuple[float, float]:
    """The ends of the scale that holds all scores: those that were given, or a known one's."""
    seen = f"{min(scores):g} to {max(scores):g}"
    for low, high in _KNOWN_RANGES if mos_range is None else [mos_range]:
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError("the range of human scores is empty", seen=f"{low:g} to {high:g}")
        if low <= min(scores) and max(scores) <= high:
            if mos_range is None and high > _DOUBTFUL >= max(scores):
                what = f"{path} has scores whose scale is in doubt"
                raise UsageError(what, seen=seen, allowed=_GUESSED, hint=_HINT)
            return low, high
    if mos_range is None:
        what, allowed = f"{path} has scores on an unknown scale", _GUESSED
    else:
        what = f"{path} has scores outside the range given"
        allowed = f"{mos_range[0]:g} to {mos_range[1]:g}"
    raise UsageError(what, seen=seen, allowed=allowed, hint=_HINT)
