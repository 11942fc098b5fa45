"""The output of a bulk run: parts, each of which is written whole, once, or not at all.

What is to be scored is listed first, and the list is kept: row group n of the plan is part n. Who
scores part n writes `part-n` under that name, whole, and then its report. A part with a report is
done. Whoever is killed, cut off or slow writes the same rows under the same name as the one that
took over, so each photo has one row, however often that happens, and no ids have to be remembered.

    OUT/part-00012.parquet          rows
    OUT/_meiqa/record.json          what the rows depend on
    OUT/_meiqa/plan-00000.parquet   photos, a row group for each part; the next part's number
    OUT/_meiqa/done-00012.json      report of a part
    OUT/_meiqa/trail-00012.json     of a part that is begun: what its workers died of
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from meiqa.batches import BatchScorer, Condition
from meiqa.engine.calibration import model_terms
from meiqa.errors import DecodeError, OutputUnwritable, PackageError, PhotoUnreachable, UsageError
from meiqa.folders import lot
from meiqa.formats import json_text
from meiqa.outputs import Kind, as_written, changes_since, disk_errors, open_output, record_text
from meiqa.sources import Picture, images_of, located
from meiqa.types import Assessment, Failure

PartFormat = Literal["parquet", "jsonl"]
_NAMES = pa.schema([("id", pa.string()), ("path", pa.string())])
_PLAN_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.binary()),  # names of files need not be UTF-8
        ("file", pa.binary()),
        ("place", pa.int64()),
        ("size", pa.int64()),
        ("column", pa.string()),
    ]
)
_OWN = "_meiqa"
_FEWEST, _MOST = 16, 1024
"""Photos of a part. It grows with the list, so that a lost part is a small share of all work."""
_PARTS_FOR_GROWTH = 64
MOST_DEATHS = 3
"""Workers that may die at the same photo before it is left out, with an error: a decoder crashed,
or memory ran out. Fewer may have been killed by chance."""
BINS_PER_POINT = 4
"""Of the histogram of scores."""


@dataclass
class Report:
    """What came of photos.

    Attributes:
        failed: by the kind of the error; left_out: scored, and not written by --filter.
        histogram: of scores, in quarters of a point from 1 on.
        score_s: time that it took, of one worker.
    """

    scored: int = 0
    left_out: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    histogram: list[int] = field(default_factory=lambda: [0] * (4 * BINS_PER_POINT))
    score_s: float = 0.0

    @property
    def photos(self) -> int:
        return self.scored + self.failed.total()

    def add(self, other: Report) -> None:
        """Add another's counts."""
        self.scored += other.scored
        self.left_out += other.left_out
        self.failed += other.failed
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]
        self.score_s += other.score_s

    def note(self, score: float) -> None:
        """Count a score."""
        self.scored += 1
        place = int((score - 1.0) * BINS_PER_POINT)
        self.histogram[min(max(place, 0), len(self.histogram) - 1)] += 1

    @classmethod
    def read(cls, text: bytes) -> Report:
        """Read what `json.dumps(vars(report))` wrote."""
        values = json.loads(text)
        return cls(**{**values, "failed": Counter(values["failed"])})


class Directory:
    """A directory on disk or in object storage, whose files are there whole or not at all."""

    def __init__(self, where: str) -> None:
        self.where = where.rstrip("/")
        system, self._path = located(where)
        self.local = Path(self._path) if isinstance(system, fs.LocalFileSystem) else None

    @property
    def _system(self) -> fs.FileSystem:
        return located(self.where)[0]

    def names(self, inside: str = "") -> list[str]:
        """Name the files directly in a folder, in order."""
        path = f"{self._path}/{inside}".rstrip("/")
        selector = fs.FileSelector(path, allow_not_found=True)
        with self._errors(inside):
            return sorted(each.base_name for each in self._system.get_file_info(selector))

    def read(self, name: str) -> bytes | None:
        """Read a file, None if there is none."""
        try:
            with self._errors(name), self._system.open_input_file(f"{self._path}/{name}") as file:
                data: bytes = file.read()
                return data
        except FileNotFoundError:
            return None

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file to be written, which is there once it is whole, in place of another.

        Raises:
            OutputUnwritable: the disk or the storage refuses.
        """
        if self.local is not None:
            path = self.local / name
            with disk_errors(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            with open_output(path, Kind(path.stem), force=True) as file:
                yield file
            return
        with tempfile.TemporaryFile(prefix="meiqa-") as held:
            yield held
            held.seek(0)
            with self._errors(name), self._system.open_output_stream(f"{self._path}/{name}") as to:
                shutil.copyfileobj(held, to)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError), self._errors(name):
            self._system.delete_file(f"{self._path}/{name}")

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise OutputUnwritable(f"{self.where}/{name} cannot be used", seen=error) from error


class BulkOutput:
    """The parts of a run: what is to be scored, and what of it is done; it can be pickled.

    Args:
        format: of the files of rows.
    """

    def __init__(self, where: str, format: PartFormat) -> None:
        self.directory, self.format = Directory(where), format

    @cached_property
    def plans(self) -> list[tuple[int, str]]:
        """The first part of each plan, and its name."""
        names = [name for name in self.directory.names(_OWN) if name.startswith("plan-")]
        return [(int(name[5:-8]), f"{_OWN}/{name}") for name in names]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out, on disk.

        Raises:
            UsageError: one is at it, or the directory holds something else.
        """
        rows, where, local = self.directory.names(), self.directory.where, self.directory.local
        if rows and _OWN not in rows:
            raise UsageError(f"{where} holds something else", hint="name another --out")
        if local is None:
            yield
            return
        with disk_errors(local):
            (local / _OWN).mkdir(parents=True, exist_ok=True)
            lock = os.open(local / _OWN / "lock", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            what = f"{where} is being written by another run"
            raise UsageError(what, hint="wait for it to end") from None
        finally:
            os.close(lock)

    def begin(self, terms: Mapping[str, Any], *, resume: bool, force: bool) -> None:
        """Record how rows are made, or see that it is as the record of an earlier run says.

        Raises:
            UsageError: there is a run, and neither `resume` nor `force`, or it was another one.
        """
        record = f"{_OWN}/record.json"
        rows, terms = self.directory.names(), {"format": self.format, **terms}
        own = [f"{_OWN}/{name}" for name in self.directory.names(_OWN)]
        # A run of which nothing was planned is none.
        known = self.directory.read(record) if any("/plan-" in name for name in own) else None
        for name in [*rows, *own]:
            if name.startswith((".meiqa-part-", f"{_OWN}/.meiqa-")):
                self.directory.remove(name)  # a killed worker's
        if known is not None and not force:
            if not resume:
                hint = "go on with it: --resume, or begin it anew: --force"
                raise UsageError(f"{self.directory.where} exists", hint=hint)
            changes_since(known, self.directory.where, "--out", terms, {})
            for name, report in self._reports():
                if report.failed[PhotoUnreachable.__name__]:
                    self.directory.remove(name)  # so that its part is scored again
            return
        if known is not None:  # in an order in which a kill leaves a run that can be gone on with
            parts = filter(re.compile(r"part-\d{5,}\.(parquet|jsonl)").fullmatch, rows)
            done, trails, plans = (
                [name for name in own if name.startswith(f"{_OWN}/{each}-")]
                for each in ("done", "trail", "plan")
            )
            for name in [*done, *parts, *trails, *plans]:
                self.directory.remove(name)
        with self.directory.writing(record) as file:
            file.write(record_text(terms, {}))

    def unplanned(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """Give the photos that are in no plan yet."""
        known = {lot(one.id) for one in self.pictures()}
        return (one for one in pictures if lot(one.id) not in known)

    def plan(self, pictures: Iterable[Picture]) -> int:
        """Plan to score photos that are in no plan yet; give their number."""
        first = next(pictures := iter(pictures), None)
        if first is None:
            return 0
        planned, pictures = 0, chain([first], pictures)
        plan = f"{_OWN}/plan-{self.count:05}.parquet"
        with self.directory.writing(plan) as file, pq.ParquetWriter(file, _PLAN_SCHEMA) as writer:
            while part := list(islice(pictures, _part_size(planned))):
                writer.write_table(_plan_table(part))
                planned += len(part)
        del self.plans
        return planned

    @property
    def count(self) -> int:
        """How many parts are planned."""
        if not self.plans:
            return 0
        first, plan = self.plans[-1]
        with self._opened(plan) as table:
            return first + int(table.num_row_groups)

    def waiting(self) -> dict[int, int]:
        """Give the parts that are not done, and how many photos each has; the last ones first.

        These are the largest, and what begins last is to be short.
        """
        done = {name for name in self.directory.names(_OWN) if name.startswith("done-")}
        sizes = {}
        for first, plan in self.plans:
            with self._opened(plan) as table:
                for group in range(table.num_row_groups):
                    if f"done-{first + group:05}.json" not in done:
                        sizes[first + group] = table.metadata.row_group(group).num_rows
        return dict(sorted(sizes.items(), reverse=True))

    def pictures(self, part: int | None = None) -> Iterator[Picture]:
        """Give the photos of a part, or of all of them."""
        for first, plan in reversed(self.plans):
            if part is not None and part < first:
                continue
            with self._opened(plan) as table:
                groups = range(table.num_row_groups) if part is None else [part - first]
                for group in groups:
                    yield from map(_picture_of, table.read_row_group(group).to_pylist())
            if part is not None:
                return

    def commit(
        self, part: int, rows: list[dict[str, Any]], schema: pa.Schema, report: Report
    ) -> None:
        """Write the rows of a part, then its report, which says that it is done."""
        name = f"part-{part:05}.{self.format}"
        if not rows:
            self.directory.remove(name)  # of errors, which an earlier run wrote
        else:
            with self.directory.writing(name) as file:
                if self.format == "parquet":
                    table = pa.Table.from_pylist(rows, schema)
                    pq.write_table(table, file, compression="zstd")
                else:
                    file.writelines(f"{json_text(row)}\n".encode() for row in rows)
        with self.directory.writing(f"{_OWN}/done-{part:05}.json") as file:
            file.write(json.dumps(vars(report)).encode())
        self.directory.remove(f"{_OWN}/trail-{part:05}.json")

    def trail(self, part: int) -> tuple[list[int], int | None] | None:
        """Give what a worker left that began a part and may have died: see `leave_trail`."""
        found = self.directory.read(f"{_OWN}/trail-{part:05}.json")
        return None if found is None else tuple(json.loads(found))

    def leave_trail(self, part: int, deaths: list[int], place: int | None) -> None:
        """Say which photos of a part earlier workers died at, and which is begun now."""
        with self.directory.writing(f"{_OWN}/trail-{part:05}.json") as file:
            file.write(json.dumps([deaths, place]).encode())

    def report(self) -> Report:
        """Sum up the parts that are done."""
        total = Report()
        for _, report in self._reports():
            total.add(report)
        return total

    def _reports(self) -> Iterator[tuple[str, Report]]:
        for name in self.directory.names(_OWN):
            if name.startswith("done-"):
                path = f"{_OWN}/{name}"
                yield path, Report.read(self.directory.read(path) or b"")

    @contextmanager
    def _opened(self, plan: str) -> Iterator[pq.ParquetFile]:
        path = f"{self.directory.where}/{plan}"
        system, inside = located(path)
        with pq.ParquetFile(system.open_input_file(inside)) as table:
            yield table


@dataclass(frozen=True)
class PartScorer:
    """Scores a part and writes it; it can be pickled.

    Attributes:
        model: the `model_terms` that all rows are made on.
        condition: what a photo's row has to fulfil to be written.
    """

    output: BulkOutput
    scorer: BatchScorer
    model: Mapping[str, str]
    condition: Condition | None = None

    def __call__(self, part: int) -> Report:
        """Score a part.

        Raises:
            MeiqaError: package or calibration are others here, or the output can't be written.
        """
        began, model = time.monotonic(), self.scorer.engine.model
        for name, here in model_terms(model.digest, model.calibration).items():
            if here != (wanted := self.model[name]):
                what = f"the {name} is another one on {os.uname().nodename}"
                raise PackageError(what, seen=here[:16], allowed=wanted[:16])
        pictures, report = list(self.output.pictures(part)), Report()
        rows = []
        for picture, result in zip(pictures, self._results(part, pictures), strict=True):
            row = {"id": picture.id, "path": as_written(picture.path), **self.scorer.row_of(result)}
            if isinstance(result, Failure):
                report.failed[type(result.error).__name__] += 1
            else:
                report.note(result.score)
                if self.condition is not None and not self.condition.holds(row):
                    report.left_out += 1
                    continue
            rows.append(row)
        report.score_s = time.monotonic() - began
        schema = pa.unify_schemas([_NAMES, self.scorer.schema])
        self.output.commit(part, rows, schema, report)
        return report

    def _results(self, part: int, pictures: list[Picture]) -> Iterator[Assessment | Failure]:
        """Score photos; where an earlier worker died, one by one, without those that it died of."""
        if (trail := self.output.trail(part)) is None:
            self.output.leave_trail(part, [], None)
            yield from self.scorer.results(images_of(pictures))
            return
        deaths, last = trail
        deaths += [] if last is None else [last]
        for place, picture in enumerate(pictures):
            if deaths.count(place) >= MOST_DEATHS:
                what = f"{picture.path}: the processes that judged it died"
                yield Failure(picture.path, DecodeError(what, hint="look at it alone"))
            else:
                self.output.leave_trail(part, deaths, place)
                yield from self.scorer.results(images_of([picture]))


def _part_size(listed: int) -> int:
    return min(max(listed // _PARTS_FOR_GROWTH, _FEWEST), _MOST)


def _plan_table(pictures: Sequence[Picture]) -> pa.Table:
    rows = []
    for one in pictures:
        file = None if one.file is None else os.fsencode(one.file)
        rows.append({**one._asdict(), "path": os.fsencode(one.path), "file": file})
    return pa.Table.from_pylist(rows, _PLAN_SCHEMA)


def _picture_of(row: dict[str, Any]) -> Picture:
    file = None if row["file"] is None else os.fsdecode(row["file"])
    return Picture(**{**row, "path": os.fsdecode(row["path"]), "file": file})
