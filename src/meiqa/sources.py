"""Where photos of a bulk run come from: folders, lists, object storage, tables and tars.

`pictures_of` lists a source once, without reading photos; `images_of` reads listed ones, one by
one, where they are scored.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import sys
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from itertools import groupby
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from meiqa.engine.files import IMAGE_SUFFIXES
from meiqa.engine.images import ImageSource, NamedBytes
from meiqa.errors import DecodeError, PhotoUnreachable, UsageError
from meiqa.folders import gather, lot

CLOUDS = ("s3", "gs", "az", "abfs", "abfss", "file")
"""Schemes of URIs: pyarrow's file systems, with `az` for Azure's `abfs`."""
LISTS = (".txt", ".list", ".lst")
_AWAY = frozenset(CLOUDS) - {"file"}
_COLUMNS = ("bytes", "image", "jpg", "path", "url", "uri")
"""Names of a table's column of photos, the first of which is taken that is there."""
_READ = IMAGE_SUFFIXES | {".parquet", ".tar"}
_CELLS_AT_ONCE = 32


class Picture(NamedTuple):
    """A photo in a source.

    Attributes:
        id: says which photo it is, in every run; path: what people call it.
        file: what holds it, where that isn't `path`: a table, a tar.
        place: where in that file: its row, or its first byte; size: its bytes in a tar.
        column: of a table.
    """

    id: str
    path: str
    file: str | None = None
    place: int | None = None
    size: int | None = None
    column: str | None = None


@dataclass(frozen=True)
class Source:
    """What `meiqa bulk` is given.

    Attributes:
        where: a folder, a glob, a photo, a list of paths or URIs (or - for standard input), a
            parquet table or a tar, on disk or in object storage.
        id_column, column: of a table: the one that names photos, and the one that holds them.
        by_content: the id is the SHA-256 of a photo's file, which is read for that.
        hidden: look into hidden folders, too.
    """

    where: str
    id_column: str | None = None
    column: str | None = None
    by_content: bool = False
    hidden: bool = False


def pictures_of(source: Source, tell: Callable[[str], None]) -> Iterator[Picture]:
    """List the photos of a source, without reading them; ids are told apart by `unique`.

    Args:
        tell: is told what was passed over.

    Raises:
        UsageError: there is nothing of that kind, or it holds nothing.
    """
    listed = unique(_listed(source, tell), tell)
    first = next(listed, None)
    if first is None:
        raise UsageError(f"{source.where} holds no photos")
    yield first
    yield from listed


def unique(pictures: Iterable[Picture], tell: Callable[[str], None]) -> Iterator[Picture]:
    """Leave out photos whose id came before, and tell how many."""
    seen = set[int]()
    doubles = 0
    for picture in pictures:
        number = lot(picture.id)
        if number in seen:
            doubles += 1
        else:
            seen.add(number)
            yield picture
    if doubles:
        tell(f"named twice, and scored once: {doubles}")


def images_of(pictures: Sequence[Picture]) -> Iterator[ImageSource]:
    """Give what the engine reads photos from, in their order; nothing is read ahead but of tables.

    What can't be read any more becomes an error of that photo once the engine reads it.

    Raises:
        UsageError: the photos of a table are not in the order of its rows.
    """
    for (table, column), group in groupby(
        pictures, lambda one: (one.column and one.file, one.column)
    ):
        if table and column:
            yield from _cells(table, column, list(group))
        else:
            yield from map(_image, group)


class StoredPhoto:
    """A photo in object storage or in a tar, which is read when the engine gets to it."""

    def __init__(self, picture: Picture) -> None:
        self._picture, self.name = picture, picture.path

    def read(self) -> bytes:
        """Read it; DecodeError if that can't be."""
        with _opened(self._picture.file or self._picture.path) as file:
            file.seek(self._picture.place or 0)
            data: bytes = file.read(self._picture.size)
        return data


class _Lost:
    """A photo of a table that can't be read."""

    def __init__(self, name: str, error: DecodeError) -> None:
        self.name, self._error = name, error

    def read(self) -> bytes:
        raise self._error.with_traceback(None)


@contextmanager
def _opened(where: str) -> Iterator[pa.NativeFile]:
    """Open a file and say what keeps it from being read, there and while this lasts.

    Raises:
        PhotoUnreachable: the storage didn't answer; DecodeError: anything else.
    """
    try:
        system, path = located(where)
    except UsageError as error:
        raise _unread(where, error, error.__cause__) from None
    try:
        with system.open_input_file(path) as file:
            yield file
    except FileNotFoundError:
        raise DecodeError(f"{where}: no such file", hint="check the path") from None
    except (OSError, tarfile.TarError, pa.ArrowException) as error:
        raise _unread(where, error, error) from None


def _unread(where: str, error: Exception, cause: BaseException | None) -> DecodeError:
    """Tell storage that is away, or lets nobody in, from a file that can't be read."""
    away = isinstance(cause, OSError) and where.partition("://")[0] in _AWAY
    return (PhotoUnreachable if away else DecodeError)(f"{where} cannot be read: {error}")


def located(where: str) -> tuple[fs.FileSystem, str]:
    """Give the file system of a path or URI, and the path in it.

    Raises:
        UsageError: it is none that pyarrow knows.
    """
    scheme, found, rest = where.partition("://")
    if not found:
        return fs.LocalFileSystem(), os.path.abspath(where)
    if scheme not in CLOUDS:
        allowed = ", ".join(f"{each}://" for each in CLOUDS)
        raise UsageError(f"{where} is in no storage that is read", seen=scheme, allowed=allowed)
    if scheme == "file":
        return fs.LocalFileSystem(), rest
    bucket, _, inside = rest.partition("/")
    system, root = _file_system(f"{'abfs' if scheme == 'az' else scheme}://{bucket}")
    return system, f"{root}/{inside}".rstrip("/")


@cache
def _file_system(uri: str) -> tuple[fs.FileSystem, str]:
    """Open one; that of a bucket may ask for its region."""
    try:
        system, root = fs.FileSystem.from_uri(uri)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{uri} cannot be opened: {error}") from error
    return system, root


def _listed(source: Source, tell: Callable[[str], None]) -> Iterator[Picture]:
    where = source.where
    if where == "-" or where.endswith(LISTS):
        files: Iterable[tuple[str, str]] = ((line, "") for line in _lines(where))
    elif "://" in where and not where.startswith("file://"):
        files = _stored_below(where)
    else:
        files = ((path, _stamp_of(path)) for path in _local(source, tell))
    for path, stamp in files:
        stamp = stamp or _stamp_of(path)
        try:
            yield from _in_file(path, source, stamp)
        except PhotoUnreachable as error:  # another run may list it
            raise UsageError(str(error)) from error
        except DecodeError as error:
            tell(f"warning: {error}")
            yield _picture(path, stamp, source)


def _in_file(path: str, source: Source, stamp: str) -> Iterator[Picture]:
    if path.endswith(".parquet"):
        yield from _in_table(path, source, stamp)
    elif path.endswith(".tar"):
        yield from _in_tar(path, source, stamp)
    else:
        yield _picture(path, stamp, source)


def _picture(path: str, stamp: str, source: Source) -> Picture:
    """A file of its own; paths of this machine are whole, since workers stand elsewhere."""
    path = path if "://" in path else os.path.abspath(path)
    picture = Picture("", path)
    if source.by_content:
        try:
            content = StoredPhoto(picture).read()
        except PhotoUnreachable:
            raise  # or it would have another id once it is reached
        except DecodeError:
            return picture._replace(id=_digest(path, "unreadable"))
        return picture._replace(id=hashlib.sha256(content).hexdigest()[:32])
    return picture._replace(id=_digest(path, stamp))


def _lines(where: str) -> Iterator[str]:
    """Lines of a list, without those that are empty."""
    with _text(where) as lines:
        yield from filter(None, (line.rstrip("\r\n") for line in lines))


def _text(where: str) -> IO[str]:
    if where == "-":
        return io.TextIOWrapper(sys.stdin.buffer, "utf-8", "surrogateescape")
    try:
        system, path = located(where)
        return io.TextIOWrapper(system.open_input_stream(path), "utf-8", "surrogateescape")
    except FileNotFoundError as error:
        raise UsageError(f"{where}: no such file", hint="check the path") from error
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{where} cannot be read: {error}") from error


def _local(source: Source, tell: Callable[[str], None]) -> Iterator[str]:
    """Photos, tables and tars of this machine: of a folder, of a glob, or one."""
    where = source.where.removeprefix("file://")
    names = [where] if os.path.lexists(where) else sorted(glob.glob(where, recursive=True))
    if not names:
        hint = "check the path; a glob stands in quotes"
        raise UsageError(f"no such file, folder or glob: {where}", hint=hint)
    found = gather(names, hidden=source.hidden)
    if found.failures and not found.photos:
        raise found.failures[0].error
    for failure in found.failures:
        tell(f"warning: {failure.error}")
    if found.passed_over:
        tell(str(found))
    yield from found.photos


def _stored_below(where: str) -> Iterator[tuple[str, str]]:
    """Photos, tables and tars in object storage, with size and time: of a prefix, of a glob, one.

    Only their names tell what they are: nothing is read of any.
    """
    head = where.partition("*")[0] if "*" in where else where
    folder = head if head == where else head.rpartition("/")[0]
    system, path = located(folder)
    root = folder.rstrip("/").removesuffix(path.partition("/")[2]).rstrip("/")
    try:
        info = system.get_file_info(path)
        if info.type == fs.FileType.File:
            yield where, _stamp(info)
            return
        below = system.get_file_info(fs.FileSelector(path, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{where} cannot be listed: {error}") from error
    for info in sorted(below, key=lambda each: each.path):
        uri = f"{root}/{info.path.partition('/')[2]}"
        wanted = info.type == fs.FileType.File and f".{info.extension.lower()}" in _READ
        if wanted and (head == where or fnmatch(uri, where)):
            yield uri, _stamp(info)


def _in_tar(file: str, source: Source, stamp: str) -> Iterator[Picture]:
    """Photos of a tar, such as a WebDataset's shards, by their places in it."""
    _refuse_by_content(file, source)
    with _opened(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            if member.isfile() and os.path.splitext(member.name)[1].lower() in IMAGE_SUFFIXES:
                id = _digest(_whole(file), stamp, member.name)
                name = f"{file}/{member.name}"
                yield Picture(id, name, _whole(file), member.offset_data, member.size)


def _in_table(file: str, source: Source, stamp: str) -> Iterator[Picture]:
    """Photos of a parquet table: its rows, or what a column of paths names."""
    with _opened(file) as stream, pq.ParquetFile(stream) as table:
        column, holds_bytes = _column_of(table, file, source.column)
        if holds_bytes:
            _refuse_by_content(file, source)
        read = [] if holds_bytes else [column]
        if source.id_column is not None:
            _require_column(table, file, source.id_column)
            read.append(source.id_column)
        rows = _rows(table, read)
        for place, row in enumerate(rows):
            named = row.get(source.id_column) if source.id_column else None
            if not holds_bytes:
                one = _picture(str(row[column]), _stamp_of(str(row[column])), source)
                yield one if named is None else one._replace(id=str(named))
            else:
                id = _digest(_whole(file), stamp, str(place)) if named is None else str(named)
                yield Picture(id, f"{file}:{place}", _whole(file), place, None, column)


def _refuse_by_content(file: str, source: Source) -> None:
    if source.by_content:
        hint = "leave it out: such photos are told apart by their places"
        raise UsageError(f"--by-content is for files of their own, not for {file}", hint=hint)


def _rows(table: pq.ParquetFile, columns: list[str]) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(table.metadata.num_rows))
        return
    for batch in table.iter_batches(columns=columns):
        yield from batch.to_pylist()


def _column_of(table: pq.ParquetFile, file: str, asked: str | None) -> tuple[str, bool]:
    """Which column holds photos, and whether as bytes; of a struct it is the field `bytes`."""
    schema = table.schema_arrow
    if asked is not None:
        _require_column(table, file, asked)
    name = asked or next((each for each in _COLUMNS if each in schema.names), None)
    if name is None:
        seen, hint = ", ".join(schema.names), "name the column: --column NAME"
        raise UsageError(f"{file} has no column of photos that is known", seen=seen, hint=hint)
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{name}.bytes", True
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return name, True
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return name, False
    raise UsageError(f"{file}: {name} holds no photos", seen=kind, allowed="bytes, or paths")


def _require_column(table: pq.ParquetFile, file: str, name: str) -> None:
    if name not in table.schema_arrow.names:
        seen = ", ".join(table.schema_arrow.names)
        raise UsageError(f"{file} has no column {name}", seen=seen)


def _cells(file: str, column: str, wanted: list[Picture]) -> Iterator[ImageSource]:
    """Give encoded photos of a table; once it can't be read any more, the rest are errors."""
    places = [one.place or 0 for one in wanted]
    if places != sorted(places):  # as an earlier version planned samples
        what, hint = f"photos of {file} are planned in another order", "begin it anew: --force"
        raise UsageError(what, hint=hint)
    left = deque(wanted)
    try:
        for cell in _cells_at(file, column, {*places}):
            yield NamedBytes(cell, left.popleft().path)
        if left:
            raise DecodeError(f"{file} has fewer rows than when it was listed")
    except DecodeError as error:
        yield from (cast(IO[bytes], _Lost(one.path, error)) for one in left)


def _cells_at(file: str, column: str, places: set[int]) -> Iterator[bytes]:
    """Read a column's cells in some rows; only their row groups are read."""
    with _opened(file) as stream, pq.ParquetFile(stream) as table:
        place = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if places.isdisjoint(range(place, place + count)):
                place += count
                continue
            for batch in table.iter_batches(_CELLS_AT_ONCE, row_groups=[group], columns=[column]):
                cells = batch.column(0)
                cells = cells.field("bytes") if pa.types.is_struct(cells.type) else cells
                for cell in cells:
                    if place in places:
                        yield cell.as_py() or b""
                    place += 1


def _image(picture: Picture) -> ImageSource:
    if picture.file is None and "://" not in picture.path:
        return picture.path
    return cast(IO[bytes], StoredPhoto(picture))


def _whole(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _stamp_of(path: str) -> str:
    """Size and time of a file of this machine; nothing of others, and of one that isn't there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _stamp(info: fs.FileInfo) -> str:
    return f"{info.size} {info.mtime_ns}"
