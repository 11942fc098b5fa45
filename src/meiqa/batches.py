"""Scores for batches of photos: a plain callable for data engines, and the rows it gives."""

from __future__ import annotations

import json
import operator
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from meiqa.errors import UsageError
from meiqa.locations import embedded_assets
from meiqa.types import Assessment, Budget, Failure

if TYPE_CHECKING:
    import pyarrow as pa

    from meiqa.engine.engine import Engine
    from meiqa.engine.images import ImageSource

RESULT_COLUMNS = (
    *("score", "std", "word", "summary", "distortions"),
    *("error", "package", "options"),
)
"""What a row says of a photo: either its score or its error, and what made it. It has an
`embedding`, too, where one is asked for."""
_opening = threading.Lock()
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


@dataclass(frozen=True)
class ScoreOptions:
    """How photos are scored; see `Engine.open` and `Engine.score`.

    Nothing is learned, and the memory is by default that of the embedded anchors alone, so that
    all machines score alike.
    """

    package: str | None = None
    memory: str | None = None
    device: str = "cpu"
    threads: int | None = 1
    budget_ms: float | None = None
    k: int | None = None
    embedding: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """What rows have."""
        return (*RESULT_COLUMNS, *(["embedding"] if self.embedding else []))

    @property
    def text(self) -> str:
        """What is not the default of what scores depend on, as JSON."""
        named = {"device": self.device, "budget_ms": self.budget_ms, "k": self.k}
        return json.dumps({name: value for name, value in named.items() if value is not None})


class BatchScorer:
    """Scores batches; it can be pickled, and each process opens one engine for all of them.

    Args:
        column: which column of a batch holds paths or encoded photos.
    """

    def __init__(self, options: ScoreOptions, column: str) -> None:
        self.options, self.column = options, column

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Give a batch, which is a sequence for each column, with the options' columns beside.

        A photo that can't be judged has an error in place of a score.

        Raises:
            UsageError: the batch has no such column, or has one of these already.
        """
        if self.column not in batch:
            seen = ", ".join(map(str, batch))
            hint = "name the column of paths or encoded photos: column="
            raise UsageError(f"the batch has no column {self.column}", seen=seen, hint=hint)
        if taken := [name for name in self.options.columns if name in batch]:
            raise UsageError(f"the batch has a column {taken[0]}", hint="rename or drop it")
        rows = [self.row_of(result) for result in self.results(batch[self.column])]
        return {**batch, **{name: [row[name] for row in rows] for name in self.options.columns}}

    def results(self, images: Iterable[ImageSource]) -> Iterable[Assessment | Failure]:
        """Score photos one after the other."""
        budget = None if self.options.budget_ms is None else Budget(ms=self.options.budget_ms)
        # A missing value reads as an empty photo, which is an error of its own row.
        given = (b"" if image is None else image for image in images)
        return self.engine.score_many(
            given,
            budget=budget,
            k=self.options.k,
            learn=False,
            detail=False,
            embedding=self.options.embedding,
        )

    def row_of(self, result: Assessment | Failure) -> dict[str, Any]:
        """Give a result's values under `ScoreOptions.columns`."""
        made = {"package": self.engine.model.digest, "options": self.options.text}
        values = {**result.to_dict(), **made}
        if isinstance(result, Assessment) and result.embedding is not None:
            values["embedding"] = result.embedding.to_dict()["values"]
        return {name: values.get(name) for name in self.options.columns}

    @property
    def schema(self) -> pa.Schema:
        """Arrow's types of these columns, for engines that would guess them from a first row."""
        import pyarrow as pa

        distortion = pa.struct(
            [("kind", pa.string()), ("strength", pa.float64()), ("probability", pa.float64())]
        )
        kinds = {"score": pa.float64(), "std": pa.float64(), "distortions": pa.list_(distortion)}
        kinds["embedding"] = pa.list_(pa.float32())
        return pa.schema([(name, kinds.get(name, pa.string())) for name in self.options.columns])

    @property
    def engine(self) -> Engine:
        """The engine of this process."""
        return opened_engine(self.options)


def opened_engine(options: ScoreOptions) -> Engine:
    """Give the one engine of this process with these options."""
    with _opening:
        return _opened(options)


@cache
def _opened(options: ScoreOptions) -> Engine:
    from meiqa.engine.engine import Engine

    return Engine.open(
        options.package,
        options.memory or embedded_assets() / "memory",
        device=options.device,
        threads=options.threads,
        learn=False,
    )


def scorer(
    column: str = "bytes",
    *,
    package: str | None = None,
    memory: str | None = None,
    device: str = "cpu",
    budget_ms: float | None = None,
    k: int | None = None,
    embedding: bool = False,
) -> BatchScorer:
    """Make a picklable callable that scores batches, for Daft, Spark or datasets: docs/bulk.md.

    It takes a sequence for each column and gives them with score, std, word, summary, distortions,
    error, package and options beside. Nothing is learned.

    Args:
        column: which column holds paths or encoded photos.
        package, memory, device: see `Engine.open`; with one thread, since data engines run a
            process for each core.
        budget_ms, k: what each photo may cost, and how many neighbours it is compared with.
        embedding: give a column of embeddings, too.

    >>> scorer("path", k=8).column
    'path'
    """
    options = ScoreOptions(package, memory, device, 1, budget_ms, k, embedding)
    return BatchScorer(options, column)


@dataclass(frozen=True)
class Condition:
    """Bounds of numbers in a row, all of which have to hold: `score >= 3.5 and std < 0.4`.

    Raises:
        UsageError: the text says something else.
    """

    text: str

    def __post_init__(self) -> None:
        self._bounds()

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row of a photo that has a score is within the bounds."""
        return all(compare(row[name], bound) for name, compare, bound in self._bounds())

    def _bounds(self) -> list[tuple[str, Callable[[float, float], bool], float]]:
        bounds = []
        for part in re.split(r"\s+and\s+", self.text.strip()):
            found = re.fullmatch(r"(score|std)\s*(>=|<=|>|<)\s*(\d+(?:\.\d+)?)", part)
            if found is None:
                allowed = "score or std, then >=, >, <= or <, then a number; several with and"
                raise UsageError("the condition can't be read", seen=part, allowed=allowed)
            name, sign, bound = found.groups()
            bounds.append((name, _COMPARISONS[sign], float(bound)))
        return bounds
