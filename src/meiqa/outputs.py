"""Files that commands write: where they may lie, and rows of results that outlive a kill."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import secrets
import stat
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, Self

from meiqa.errors import OutputUnwritable, UsageError
from meiqa.formats import CSV_COLUMNS, RowFormat, header_text, row_text
from meiqa.types import Assessment, Failure

STDOUT = frozenset({"-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"})


@dataclass(frozen=True)
class Kind:
    """A kind of file that a command writes.

    Attributes:
        name: what messages call it.
        marker: what is among its first bytes, by which one of ours is known, which may be
            replaced; None for a kind of which none is replaced unasked.
    """

    name: str
    marker: bytes | None = None


PAGE = Kind("page", b"<!-- made by meiqa -->")
PICTURE = Kind("picture", b"Software\0meiqa")
_RECORD = Kind("record", b'{\n  "terms": {')


def output_target(
    path: str | Path, kind: Kind, *, force: bool = False, inputs: Iterable[str | Path] = ()
) -> Path:
    """Give the file that an output goes to: `path`, or what it links to.

    It may be written if nothing is there, or one of its own kind, or with `force` any file; never
    an input, a device, a pipe or a directory.

    Raises:
        OutputUnwritable: no file can be there.
        UsageError: what is there would be lost.
    """
    target = Path(os.path.realpath(path))
    with disk_errors(path):
        if not target.exists():
            if not target.parent.is_dir():
                raise OutputUnwritable(
                    f"cannot write {path}",
                    seen=f"no directory {target.parent}",
                    hint=f"make it: mkdir -p {target.parent}",
                )
            return target
        status = target.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
            raise OutputUnwritable(f"cannot write {path}", seen=what, allowed="a file")
        for source in inputs:
            if os.path.exists(source) and os.path.samestat(status, os.stat(source)):
                raise UsageError(
                    f"{path} would be written over, and is to be read", hint="name another file"
                )
        if status.st_size and not force and not _is_ours(target, kind):
            foreign = "" if kind.marker is None else f", and is no {kind.name} that meiqa made"
            hint = "name another file, or replace it: --force"
            raise UsageError(f"{path} exists{foreign}", hint=hint)
    return target


def _is_ours(file: Path, kind: Kind) -> bool:
    with file.open("rb") as stream:
        return kind.marker is not None and kind.marker in stream.read(128)


@contextmanager
def open_output(
    path: str | Path, kind: Kind, *, force: bool = False, inputs: Iterable[str | Path] = ()
) -> Iterator[IO[bytes]]:
    """Open a file to be written, which has its name once it is whole; "-" is standard output.

    It is opened before the work, so that a place that cannot be written is refused at once. If
    nothing is written, nothing is made.

    Raises:
        OutputUnwritable, UsageError: see `output_target`.
    """
    if str(path) in STDOUT:
        with NamedTemporaryFile(prefix="meiqa-") as held:
            yield held.file
            held.flush()
            sys.stdout.flush()
            sys.stdout.buffer.write(Path(held.name).read_bytes())
        return
    inputs = tuple(inputs)
    target = output_target(path, kind, force=force, inputs=inputs)
    mark = secrets.token_hex(4)  # processes of several machines may have one number
    unfinished = target.with_name(f".meiqa-{kind.name}-{os.getpid()}-{mark}.tmp")
    try:
        with disk_errors(path):
            stream = unfinished.open("w+b")
        with stream:
            yield stream
            with disk_errors(path):
                stream.flush()
                os.fsync(stream.fileno())
        if unfinished.stat().st_size:
            output_target(path, kind, force=force, inputs=inputs)  # as it is by now
            with disk_errors(path):
                os.replace(unfinished, target)
                sync_folder(target.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a file's new name durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: str | Path, hint: str | None = None) -> Iterator[None]:
    """Name the file that a disk refuses to write."""
    try:
        yield
    except OSError as error:
        raise OutputUnwritable(f"cannot write {path}", seen=error.strerror, hint=hint) from error


def append_whole(descriptor: int, row: bytes) -> None:
    """Append bytes to a file that nobody else writes, all or none; OSError if the disk refuses."""
    size = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, row) < len(row):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except BaseException:
        os.ftruncate(descriptor, size)
        raise


def marked_png(png: bytes) -> bytes:
    """Give a PNG file the mark of `PICTURE`: a text chunk behind its header."""
    chunk = b"tEXt" + (PICTURE.marker or b"")
    length, check = (len(chunk) - 4).to_bytes(4, "big"), zlib.crc32(chunk).to_bytes(4, "big")
    return png[:33] + length + chunk + check + png[33:]


ROWS = Kind("file of rows")

_SCHEMA = 1
_DURABLE_EVERY_S = 5.0
"""A power cut, not a kill, costs the rows of so many seconds."""


class ResultFile:
    """Rows of results, one a photo, appended to a file that a killed run goes on with.

    Each row is appended whole. Beside the file lies its *record* (`FILE.run.json`): how the rows
    were made, so that rows which were made otherwise never come to stand among them.

    Args:
        terms: what the rows depend on, by name: a file is gone on with on the same terms only.
        circumstances: what may change meanwhile, by name.
        resume, force: go on with a file that is there, or begin it anew; otherwise none may be.

    Attributes:
        failures: path, error and hint of photos that could not be judged, in earlier runs too.
        changed: the names of circumstances that were others when the file was begun.

    Raises:
        UsageError: the file is there, or is none to go on with, or another process writes it.
        OutputUnwritable: the disk refuses.
    """

    def __init__(
        self,
        path: str | Path,
        format: RowFormat,
        terms: Mapping[str, Any],
        circumstances: Mapping[str, Any] | None = None,
        *,
        resume: bool,
        force: bool = False,
    ) -> None:
        self.failures: list[dict[str, Any]] = []
        self.changed: set[str] = set()
        self._path, self._format = output_target(path, ROWS, force=True), format
        self._done: dict[str, float | None] = {}
        header = header_text(format).encode()
        with self._disk_errors():
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if force and not resume:
                os.ftruncate(self._descriptor, 0)
            named = {"schema": _SCHEMA, "format": format, "columns": header.decode().rstrip()}
            self._begin({**named, **terms}, dict(circumstances or {}), resume, force)
            size = self._read(header)
            with self._disk_errors():
                os.ftruncate(self._descriptor, size)
            if not size:
                self._append(header)
        except BaseException as error:
            os.close(self._descriptor)
            if isinstance(error, BlockingIOError):
                what = f"{self._path} is being written by another process"
                raise UsageError(what, hint="wait for it to end") from None
            raise
        self._durable_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Make all rows durable and let go of the file."""
        try:
            self._make_durable()
        finally:
            os.close(self._descriptor)

    def __contains__(self, photo: str) -> bool:
        """Whether a photo has its row."""
        return as_written(photo) in self._done

    def __len__(self) -> int:
        """Photos that have their row."""
        return len(self._done)

    def score_of(self, photo: str) -> float | None:
        """Give the score in a photo's row, None if there is none."""
        return self._done.get(as_written(photo))

    def write(self, result: Assessment | Failure) -> None:
        """Append one row.

        Raises:
            OutputUnwritable: the disk refuses, and has none of the row.
        """
        self._append(as_written(row_text(result, self._format)).encode())
        score = result.score if isinstance(result, Assessment) else None
        self._done[as_written(result.path)] = score
        if isinstance(result, Failure):  # not kept itself: its traceback holds the photo's pixels
            self.failures.append(result.to_dict())
        if time.monotonic() - self._durable_at >= _DURABLE_EVERY_S:
            self._make_durable()

    def _begin(
        self, terms: dict[str, Any], circumstances: dict[str, Any], resume: bool, force: bool
    ) -> None:
        """Record how rows are made, or see that it is as the record of earlier ones says."""
        record = self._path.with_name(f"{self._path.name}.run.json")
        if os.fstat(self._descriptor).st_size == 0:
            with open_output(record, _RECORD, force=force) as file, self._disk_errors():
                file.write(record_text(terms, circumstances))
            return
        if not resume:
            hint = "go on with it: --resume, or begin it anew: --force"
            raise UsageError(f"{self._path} exists", hint=hint)
        try:
            known = record.read_bytes()
        except OSError as error:
            raise _unrecorded(self._path, "--output", error.strerror, record) from error
        self.changed = changes_since(known, self._path, "--output", terms, circumstances)

    def _read(self, header: bytes) -> int:
        """Note the photos of the rows that are there; give the bytes of the whole ones."""
        size = 0
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            for number, row in enumerate(_whole_rows(file, quoted=self._format == "csv"), 1):
                if b"\0" in row:  # never written, and left by a power cut
                    break
                try:
                    if size or not header:
                        values = _parsed(row.decode(), self._format)
                        score = values.get("score")
                        self._done[as_written(values["path"])] = float(score) if score else None
                        if values.get("error"):
                            failure = {key: values[key] for key in ("path", "error", "hint")}
                            self.failures.append(failure)
                    elif row != header:
                        raise ValueError("another header")
                except (ValueError, KeyError, csv.Error) as error:
                    raise UsageError(
                        f"{self._path} holds something else than this command's rows",
                        seen=f"row {number}",
                        hint="name another --output, or mend that row",
                    ) from error
                size += len(row)
        return size

    def _append(self, row: bytes) -> None:
        with self._disk_errors():
            append_whole(self._descriptor, row)

    def _make_durable(self) -> None:
        with self._disk_errors():
            os.fsync(self._descriptor)
        self._durable_at = time.monotonic()

    def _disk_errors(self) -> AbstractContextManager[None]:
        hint = "make room or choose another place; --resume goes on where this ended"
        return disk_errors(self._path, hint)


def record_text(terms: Mapping[str, Any], circumstances: Mapping[str, Any]) -> bytes:
    """Give the record of how rows are made, for `changes_since`."""
    return json.dumps({"terms": terms, "circumstances": circumstances}, indent=2).encode() + b"\n"


def changes_since(
    record: bytes,
    path: str | Path,
    option: str,
    terms: Mapping[str, Any],
    circumstances: Mapping[str, Any],
) -> set[str]:
    """See that rows are made on the terms of an earlier run's record.

    Args:
        path: of the rows; option: that names it.

    Returns:
        The names of the circumstances that were others.

    Raises:
        UsageError: some term is another, or it is no record.
    """
    try:
        begun = json.loads(record)
        known, before = dict(begun["terms"]), dict(begun["circumstances"])
    except (ValueError, KeyError, TypeError) as error:
        raise _unrecorded(path, option, "another file", "the record that lay beside it") from error
    for name in {**terms, **known}:
        if known.get(name) != terms.get(name):
            raise UsageError(
                f"{path} was written with another {name.replace('_', ' ')}",
                seen=_shown(terms.get(name)),
                allowed=_shown(known.get(name)),
                hint=_anew(option),
            )
    return {name for name, now in circumstances.items() if before.get(name) != now}


def _unrecorded(path: str | Path, option: str, seen: object, allowed: object) -> UsageError:
    what = f"{path} cannot be gone on with: there is no record of how it was written"
    return UsageError(what, seen=seen, allowed=allowed, hint=_anew(option))


def _anew(option: str) -> str:
    return f"name another {option}, or begin it anew: --force"


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
    if format == "csv":
        (cells,) = csv.reader(io.StringIO(row, newline=""), strict=True)
        return dict(zip(CSV_COLUMNS, cells, strict=True))
    values = json.loads(row)
    if not isinstance(values, dict) or not isinstance(values.get("path"), str):
        raise ValueError("no path")
    return values


def as_written(text: str) -> str:
    """Give text as it stands in a file: what is not UTF-8 has escapes there."""
    return text.encode("utf-8", "backslashreplace").decode()


def _shown(value: object) -> str:
    text = "the default" if value is None else str(value)
    return text[:16] if len(text) == 64 else text
