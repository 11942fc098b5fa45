"""Tending a memory: numbers, exports for other tools, other keys, and the search for damage."""

from __future__ import annotations

import base64
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from meiqa.errors import StoreError, StoreMismatch, StoreNotFound, UsageError, install_hint
from meiqa.memory import database, versions
from meiqa.memory.cases import (
    ORIGINS,
    Entry,
    Regression,
    Version,
    decode_keys,
    encode_key,
    unit_rows,
)
from meiqa.memory.database import Identity
from meiqa.memory.index import FrozenIndex, recall_trial
from meiqa.memory.retrieval import View, key_widths, retrieval_key
from meiqa.memory.segment import Segment, disk_errors, file_sha256, publish, refuse_taken, sync
from meiqa.memory.wal import WAL_NAME, Uses, read_entries
from meiqa.types import KeyKind, Origin

Views: TypeAlias = Mapping[Origin, View]
ExportFormat = Literal["jsonl", "parquet"]

_HISTOGRAM_EDGES = tuple(1.0 + 0.5 * step for step in range(9))
_ROWS_A_BATCH = 4096


@dataclass(frozen=True)
class OriginStatistics:
    """Numbers of the cases of one origin.

    Attributes:
        recent: How many of them are not in a segment yet.
        tombstones: How many rows of the segment count no longer.
        version: Number of the current version; 0 if there is none.
        histogram: Cases by score, in bins of 0.5 from 1 to 5.
        index: "flat" or "frozen".
        recall: Share of the true 32 nearest that a search finds; None without an index.
    """

    cases: int
    recent: int
    tombstones: int
    version: int
    segment_bytes: int
    records_bytes: int
    thumbnails: int
    histogram: tuple[int, ...]
    index: str
    recall: float | None


@dataclass(frozen=True)
class MemoryStatistics:
    """Numbers of a memory; `wal_bytes` are what is stored outside segments."""

    key_kind: KeyKind
    origins: dict[Origin, OriginStatistics]
    wal_bytes: int


def statistics(views: Views, key_kind: KeyKind, path: Path, sample: int) -> MemoryStatistics:
    """Count and measure; the recall takes `sample` searches spread over the stored keys."""
    origins = {origin: _of_view(view, sample) for origin, view in views.items()}
    wal_bytes = sum(file.stat().st_size for file in path.glob(f"{WAL_NAME}*"))
    return MemoryStatistics(key_kind, origins, wal_bytes)


def _of_view(view: View, sample: int) -> OriginStatistics:
    version, recall = view.version, None
    if isinstance(version.index, FrozenIndex):
        shares = recall_trial(version.index, version.segment.arrays["keys"], sample)(None)
        # With too few keys to take any out, every search is exact.
        recall = float(shares.mean()) if len(shares) else 1.0
    return OriginStatistics(
        cases=len(view),
        recent=len(view.recent),
        tombstones=len(view.dead),
        version=version.number,
        segment_bytes=version.segment.path.stat().st_size if version.number else 0,
        records_bytes=version.records_path.stat().st_size if version.number else 0,
        thumbnails=len(view.thumbnail_bytes()),
        histogram=tuple(np.histogram(view.by_score[0], _HISTOGRAM_EDGES)[0].tolist()),
        index="flat" if version.index is None else "frozen",
        recall=recall,
    )


def export(
    views: Views, uses: Mapping[str, Uses], key_kind: KeyKind, path: Path, format: ExportFormat
) -> int:
    """Write one row for each case, anchors first, each origin by id; give how many.

    A row has the record's columns, `retrieved`, `grid`, `tokens` (how many), `key`, its kind and
    `thumbnail`, a JPEG (in JSON as base64) or null.
    """
    rows = (
        exported(entry, uses.get(entry.record.id, (0,))[0] * (origin == "contrast"), key_kind)
        for origin, view in views.items()
        for entry in view.all_entries()
    )
    return write_rows(path, rows, format)


def write_rows(path: Path, rows: Iterator[dict[str, Any]], format: ExportFormat) -> int:
    """Write rows that `exported` made to a file; give how many."""
    if format not in get_args(ExportFormat):
        raise UsageError("unknown export format", seen=format, allowed="jsonl, parquet")
    write = _write_jsonl if format == "jsonl" else _write_parquet
    with disk_errors(path):
        return write(path, rows)


def exported(entry: Entry, retrieved: int, key_kind: KeyKind) -> dict[str, Any]:
    """Give a case as the row of an export; see `export`."""
    record, features = entry.record, entry.features
    return {
        **asdict(record),
        "retrieved": retrieved,
        "grid": list(features.grid),
        "tokens": len(features.scales),
        "key": features.key.astype(np.float32).tolist(),
        "key_kind": key_kind,
        "thumbnail": entry.thumbnail,
    }


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    def base64_text(thumbnail: bytes) -> str:
        return base64.b64encode(thumbnail).decode("ascii")

    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=base64_text) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        what = "exporting to parquet needs pyarrow"
        raise UsageError(what, hint=install_hint("parquet")) from error
    text, real, whole = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    schema = pyarrow.schema(
        {
            **dict.fromkeys(("id", "image_digest", "summary"), text),
            **dict.fromkeys(("score", "std"), real),
            **dict.fromkeys(("origin", "package_digest", "provenance"), text),
            "created": real,
            "device": text,
            "retrieved": whole,
            "grid": pyarrow.list_(whole, 2),
            "tokens": whole,
            "key": pyarrow.list_(pyarrow.float32()),
            "key_kind": text,
            "thumbnail": pyarrow.binary(),
        }
    )
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, _ROWS_A_BATCH)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
            count += len(batch)
    return count


def rekey(
    views: Views, uses: Mapping[str, Uses], found: Identity, kind: KeyKind, path: Path
) -> int:
    """Write all cases with keys of another kind into a new memory; give how many.

    Records, thumbnails and counters of use come along. Keys of images are made of the stored
    tokens, which differ from those of the photographs by their rounding to 8 bits. The directory
    must not exist, or be empty; it appears whole or not at all.

    Raises:
        UsageError: the memory has keys of this kind, or there is no such kind.
        StoreMismatch: the new keys need the summaries' keys, or tokens, which it does not hold.
    """
    if kind == found.key_kind:
        raise UsageError("the memory has keys of this kind already", seen=kind)
    if found.key_kind == "image":
        what = f"the memory holds no summary keys, which keys of kind {kind} need"
        hint = f"build it from the photographs: meiqa memory build … --key {kind}"
        raise StoreMismatch(what, seen="keys of kind image", hint=hint)
    summary_width = found.widths.key - (found.widths.token if found.key_kind == "both" else 0)
    widths = key_widths(kind, summary_width, found.widths.token)
    identity = Identity(found.package_digest, widths, kind)

    def rekeyed(entry: Entry) -> Entry:
        if not len(entry.features.scales):
            what = f"the new keys need visual tokens, which case {entry.record.id!r} has not"
            raise StoreMismatch(what, hint=f"build it from the photographs with --key {kind}")
        # With the summary's key a "summary" or "both" key begins.
        summary = unit_rows(decode_keys(entry.features.key[None])[:, :summary_width])[0]
        key = retrieval_key(kind, summary, entry.features.tokens)
        return replace(entry, features=replace(entry.features, key=encode_key(key)))

    written = {origin: map(rekeyed, view.all_entries()) for origin, view in views.items()}
    _write_anew(path, identity, written, uses, views["anchor"].version.regression)
    return sum(len(view) for view in views.values())


def thin(views: Views, uses: Mapping[str, Uses], identity: Identity, path: Path, keep: int) -> int:
    """Write a small memory: fewer anchors, spread evenly over their order by score; give how many.

    Anchors lose their visual tokens and thumbnails, so they are found and count for percentiles,
    and are not compared with; what was learned of all their tokens, the regression, stays. Contrast
    cases and counters of use come along. The directory must not exist, or be empty; it appears
    whole or not at all.

    Raises:
        UsageError: fewer than one are to be kept.
        StoreMismatch: anchors are not in a version yet, so nothing was learned of them.
    """
    if keep < 1:
        raise UsageError("a memory needs anchors", seen=keep, allowed="1 or more")
    anchors = views["anchor"]
    if anchors.recent:
        raise StoreMismatch(
            "anchors that were added are not merged yet",
            seen=len(anchors.recent),
            hint="merge them first: meiqa memory compact MEMORY",
        )
    ids = [record.id for record in sorted(anchors.records(), key=lambda r: (r.score, r.id))]
    places = np.linspace(0, len(ids) - 1, min(keep, len(ids))).round().astype(int)
    chosen = {ids[place] for place in places}
    bare = (_without_tokens(each) for each in anchors.all_entries() if each.record.id in chosen)
    written: dict[Origin, Iterator[Entry]] = {
        "anchor": bare,
        "contrast": views["contrast"].all_entries(),
    }
    _write_anew(path, identity, written, uses, anchors.version.regression)
    return len(chosen)


def _without_tokens(entry: Entry) -> Entry:
    features = entry.features
    bare = replace(features, levels=features.levels[:0], scales=features.scales[:0])
    return replace(entry, features=bare, thumbnail=None)


def _write_anew(
    path: Path,
    identity: Identity,
    entries: Mapping[Origin, Iterator[Entry]],
    uses: Mapping[str, Uses],
    learned: Regression | None,
) -> None:
    """Write cases of each origin, in the order of their ids, into a memory that appears whole."""
    refuse_taken(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with disk_errors(path):
            partial.mkdir(parents=True)
            for origin, given in entries.items():
                first = next(given, None)
                if origin == "anchor" or first is not None:
                    every = chain([] if first is None else [first], given)
                    written = versions.write_version(
                        partial, origin, identity, 1, every, learned=learned
                    )
                    with written as appear:
                        appear()
            database.create_database(partial / WAL_NAME, identity)
            with database.filling(partial / WAL_NAME) as connection:
                rows = [(case_id, *each) for case_id, each in uses.items()]
                connection.executemany("INSERT INTO uses VALUES (?, ?, ?)", rows)
            sync(partial)
            publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file of a memory."""

    file: Path
    problem: str


def verify_memory(path: str | Path) -> list[Finding]:
    """Read all of a memory and tell what is wrong with it; nothing, if the list is empty.

    Reported are files, arrays and cases that were altered, records without vectors and vectors
    without records, orders and links of the index that lead nowhere, files that belong to no
    version, and cases of another package than the anchors'. StoreNotFound if there is no memory.
    """
    directory, wal = Path(path), Path(path) / WAL_NAME
    origins = [each for each in ORIGINS if os.path.exists(versions.segment_path(directory, each))]
    if not origins and not os.path.exists(wal):
        raise StoreNotFound(f"there is no memory in {directory}")
    identities: dict[Path, Identity] = {}
    findings: list[Finding] = []
    for origin in ORIGINS:
        kept = None
        if origin in origins:
            segment = versions.segment_path(directory, origin)
            try:
                Segment.open(segment, verify=True)
                version = versions.open_version(directory, origin)
            except StoreError as error:
                findings.append(Finding(segment, str(error)))
                continue
            identities[segment], kept = version.identity, version.records_path.name
            findings += _of_version(version)
        lost = "it belongs to no version; the next writer removes it"
        findings += [Finding(file, lost) for file in versions.left_over(directory, origin, kept)]
    if os.path.exists(wal):
        findings += _of_wal(wal, identities)
    first = next(iter(identities.values()), None)
    for file, identity in identities.items():
        if identity != first:
            problem = f"it was written for another engine package: {identity}"
            findings.append(Finding(file, problem))
    return findings


def _of_version(version: Version) -> Iterator[Finding]:
    """Check that each row has its record and its vectors, and that its orders are orders."""
    segment, database = version.segment.path, version.records_path
    if file_sha256(database) != version.segment.attributes.get("records_sha256"):
        yield Finding(database, "it was altered")
    try:
        records = len(version.records())
    except StoreError as error:
        yield Finding(database, str(error))
    else:
        if records != len(version):
            yield Finding(database, f"{records} records for {len(version)} rows of vectors")
    previous = ""
    for row in range(len(version)):
        try:
            record = version.entries([row])[0].record
            found = row in version.rows_of_image(record.image_digest)
        except StoreError as error:
            yield Finding(segment, str(error))
            continue
        if record.id <= previous:
            yield Finding(database, f"case {record.id!r} is out of order")
        if not found:
            yield Finding(segment, f"case {record.id!r} is not found by its image")
        previous = record.id
    arrays, every = version.segment.arrays, np.arange(len(version))
    for name in ("by_score", "image_rows"):
        if not np.array_equal(np.sort(arrays[name]), every):
            yield Finding(segment, f"{name} is not an order of the rows")
    for name in ("sorted_scores", "image_hashes"):
        if (arrays[name][1:] < arrays[name][:-1]).any():
            yield Finding(segment, f"{name} are not sorted")
    try:
        if isinstance(version.index, FrozenIndex):
            version.index.verify()
    except StoreError as error:
        yield Finding(segment, str(error))


def _of_wal(path: Path, identities: dict[Path, Identity]) -> Iterator[Finding]:
    """Check every case that waits; also note what they were written for."""
    try:
        with closing(database.connect(path, "r")) as connection, database.sqlite_errors(path):
            identity = identities[path] = database.read_identity(path, connection)[0]
            known, vectors = (
                {revision for (revision,) in connection.execute(f"SELECT revision FROM {table}")}
                for table in ("records", "features")
            )
            for revision in sorted(vectors - known):
                yield Finding(path, f"the vectors of revision {revision} have no record")
            for revision in sorted(known):
                try:
                    list(read_entries(path, connection, identity.widths, [revision]))
                except StoreError as error:
                    yield Finding(path, str(error))
    except StoreError as error:
        yield Finding(path, str(error))
