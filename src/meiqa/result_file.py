"""A file of results that a run can be killed over, and gone on with.

Each row is appended whole, and is made durable some seconds later at the most. Beside the file lies
its *record* (`FILE.run.json`): how the rows were made, so that rows which were made otherwise never
come to stand among them.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, Self

from meiqa.errors import OutputUnwritable, UsageError, one_line
from meiqa.formats import CSV_COLUMNS, result_writer
from meiqa.types import Assessment, Failure

__all__ = ["ResultFile", "RowFormat"]

RowFormat = Literal["csv", "jsonl"]

SCHEMA = 1
DURABLE_EVERY_S = 5.0
"""A power cut, not a kill, costs the rows of so many seconds."""


class ResultFile:
    """Rows of results, one a photo, appended to a file; a context manager.

    Args:
        path: the file.
        format: of its rows.
        terms: what the rows depend on, by name, as JSON values; a file is gone on with on the very
            same terms only.
        circumstances: what may change while it is gone on with, by name, as JSON values.
        resume: go on with the file, if there is one; otherwise none may be there.

    Attributes:
        failures: path, error and hint of the photos that could not be judged, those of the file's
            earlier rows among them.
        changed: circumstances as they were when the file was begun, and as they are now.

    Raises:
        UsageError: the file exists and is not to be gone on with, or cannot be: it was written on
            other terms, has rows that are none of ours, or is being written by another process.
        OutputUnwritable: the disk refuses.
    """

    def __init__(
        self,
        path: str | Path,
        format: RowFormat,
        terms: Mapping[str, Any],
        *,
        circumstances: Mapping[str, Any] | None = None,
        resume: bool,
    ) -> None:
        self.failures: list[dict[str, Any]] = []
        self.changed: dict[str, tuple[Any, Any]] = {}
        self._path, self._format = Path(path), format
        self._buffer = io.StringIO()
        self._writer = result_writer(format, self._buffer)
        self._header = self._taken()
        self._done: set[str] = set()
        with self._disk_errors():
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._begin(dict(terms), dict(circumstances or {}), resume)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._durable_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, photo: str) -> bool:
        """Whether a photo has its row."""
        return _as_written(photo) in self._done

    def __len__(self) -> int:
        """Photos that have their row."""
        return len(self._done)

    def write(self, result: Assessment | Failure) -> None:
        """Append one row.

        Raises:
            OutputUnwritable: the disk refuses, and has none of the row.
        """
        self._writer.write(result)
        self._append(self._taken())
        self._done.add(_as_written(result.path))
        if isinstance(result, Failure):
            # Not the error itself, whose traceback holds the photo's pixels.
            self.failures.append(result.to_dict())
        if time.monotonic() - self._durable_at >= DURABLE_EVERY_S:
            self._make_durable()

    def close(self) -> None:
        """Make all rows durable and let go of the file."""
        try:
            self._make_durable()
        finally:
            os.close(self._descriptor)

    def _taken(self) -> bytes:
        """What the writer has written since, as bytes."""
        text = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        return text.encode("utf-8", "backslashreplace")

    def _begin(self, terms: dict[str, Any], circumstances: dict[str, Any], resume: bool) -> None:
        """Lock the file; begin it, or check and read what it holds."""
        self._lock()
        record = self._path.with_name(f"{self._path.name}.run.json")
        terms = {
            "schema": SCHEMA,
            "format": self._format,
            "columns": self._header.decode().rstrip(),
            **terms,
        }
        if os.fstat(self._descriptor).st_size == 0:
            text = json.dumps({"terms": terms, "circumstances": circumstances}, indent=2) + "\n"
            with self._disk_errors():
                _publish(record, text)
        elif not resume:
            raise UsageError(
                f"{self._path} exists", hint="go on with it by --resume, or remove it first"
            )
        else:
            known = self._require_terms(record, terms)
            self.changed = {
                name: (known.get(name), now)
                for name, now in circumstances.items()
                if known.get(name) != now
            }
        self._size = self._read()
        with self._disk_errors():
            os.ftruncate(self._descriptor, self._size)
        if not self._size:
            self._append(self._header)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self._path} is being written by another process", hint="wait for it to end"
            ) from None

    def _require_terms(self, record: Path, terms: dict[str, Any]) -> dict[str, Any]:
        """The circumstances in which a file was begun, on these terms.

        Raises:
            UsageError: it was begun on others, or nobody knows.
        """
        another = "name another --output, or remove this one"
        try:
            begun = json.loads(record.read_text(encoding="utf-8"))
            known, circumstances = dict(begun["terms"]), dict(begun["circumstances"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self._path} cannot be gone on with: there is no record of how it was written",
                seen=error.strerror if isinstance(error, OSError) else "another file",
                allowed=str(record),
                hint=another,
            ) from error
        for name in {**terms, **known}:
            if known.get(name) != terms.get(name):
                raise UsageError(
                    f"{self._path} was written with another {name.replace('_', ' ')}",
                    seen=_shown(terms.get(name)),
                    allowed=_shown(known.get(name)),
                    hint=another,
                )
        return circumstances

    def _read(self) -> int:
        """Note the photos of the rows that are there; the bytes up to the end of the last whole.

        Raises:
            UsageError: the file holds something else than rows.
        """
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            size = 0
            for number, row in enumerate(_whole_rows(file, quoted=self._format == "csv"), 1):
                if b"\0" in row:  # never written, and left by a power cut
                    break
                if size or not self._header:
                    self._note(row, number)
                elif row != self._header:
                    raise self._foreign(number)
                size += len(row)
        return size

    def _note(self, row: bytes, number: int) -> None:
        try:
            values = _parsed(row.decode(), self._format)
        except ValueError as error:
            raise self._foreign(number) from error
        path = values["path"]
        self._done.add(_as_written(path))
        if values.get("error"):
            self.failures.append({key: values[key] for key in ("path", "error", "hint")})

    def _foreign(self, number: int) -> UsageError:
        return UsageError(
            f"{self._path} holds something else than this command's rows",
            seen=f"row {number}",
            hint="name another --output, or mend that row",
        )

    def _append(self, row: bytes) -> None:
        """Append bytes, all or none."""
        with self._disk_errors():
            try:
                written = os.write(self._descriptor, row)
                if written < len(row):  # full; what is behind the last whole row was never there
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except BaseException:
                os.ftruncate(self._descriptor, self._size)
                raise
        self._size += len(row)

    def _make_durable(self) -> None:
        with self._disk_errors():
            os.fsync(self._descriptor)
        self._durable_at = time.monotonic()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputUnwritable(
                f"cannot write {self._path}",
                seen=error.strerror,
                hint="make room or choose another place; --resume goes on where this ended",
            ) from error


def _whole_rows(file: IO[bytes], *, quoted: bool) -> Iterator[bytes]:
    """Rows with the newline that ends them; a last one without it is left out.

    Within quotes, of which a row has an even number, a newline ends nothing.
    """
    parts: list[bytes] = []
    quotes = 0
    for line in file:
        parts.append(line)
        quotes += line.count(b'"') if quoted else 0
        if line.endswith(b"\n") and quotes % 2 == 0:
            yield b"".join(parts)
            parts.clear()


def _parsed(row: str, format: RowFormat) -> dict[str, Any]:
    """A row's values.

    Raises:
        ValueError: it is not one of ours.
    """
    if format == "jsonl":
        values = json.loads(row)
        if not isinstance(values, dict) or not isinstance(values.get("path"), str):
            raise ValueError("no path")
        return values
    try:
        (cells,) = csv.reader(io.StringIO(row, newline=""), strict=True)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return dict(zip(CSV_COLUMNS, cells, strict=True))


def _as_written(path: str) -> str:
    """A path as it stands in a file: names that are not UTF-8 have escapes there."""
    return path.encode("utf-8", "backslashreplace").decode()


def _shown(value: object) -> str:
    if value is None:
        return "the default"
    if isinstance(value, str) and len(value) == 64:
        return value[:16]
    return one_line(str(value))


def _publish(path: Path, text: str) -> None:
    """Write a small file whole and durably."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
