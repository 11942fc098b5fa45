"""Looking for damage: every byte of a memory is read, and every finding is told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meiqa.errors import StoreError, StoreNotFound
from meiqa.memory.database import Identity, connect, read_identity, sqlite_errors
from meiqa.memory.disk import file_sha256
from meiqa.memory.generation import Generation, left_over, segment_path
from meiqa.memory.journal import JOURNAL_NAME
from meiqa.memory.records import read_entry
from meiqa.memory.search import IndexedTable
from meiqa.memory.segment import Segment
from meiqa.types import Origin

__all__ = ["Finding", "verify_memory"]

_ORIGINS: tuple[Origin, ...] = ("anchor", "contrast")


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file of a memory."""

    file: Path
    problem: str


def verify_memory(path: str | Path) -> list[Finding]:
    """Read all of a memory and tell what is wrong with it; nothing, if the list is empty.

    Reported are files, arrays and cases that were altered, records without vectors and vectors
    without records, orders and links of the index that lead nowhere, files that belong to no
    generation, and cases of another package than the anchors'.

    Raises:
        StoreNotFound: there is no memory in the directory.
    """
    directory = Path(path)
    segments = [each for each in _ORIGINS if os.path.exists(segment_path(directory, each))]
    journal = directory / JOURNAL_NAME
    if not segments and not os.path.exists(journal):
        raise StoreNotFound(f"there is no memory in {directory}")
    findings = [finding for each in segments for finding in _of_generation(directory, each)]
    if os.path.exists(journal):
        findings += _of_journal(journal)
    return findings + list(_of_identities(directory, segments)) + list(_left_over(directory))


def _of_generation(directory: Path, origin: Origin) -> Iterator[Finding]:
    path = segment_path(directory, origin)
    try:
        Segment.open(path, verify=True)
        generation = Generation.open(directory, origin)
    except StoreError as error:
        yield Finding(path, str(error))
        return
    recorded = generation.segment.attributes.get("records_sha256")
    if file_sha256(generation.records_path) != recorded:
        yield Finding(generation.records_path, "it was altered")
    yield from _of_rows(generation)
    yield from _of_orders(generation)
    try:
        if isinstance(generation.table, IndexedTable):
            generation.table.index.verify()
    except StoreError as error:
        yield Finding(path, str(error))


def _of_rows(generation: Generation) -> Iterator[Finding]:
    """Check that each row has its record and its vectors, and that no record is without a row."""
    try:
        records = sum(1 for _ in generation.records())
    except StoreError as error:
        yield Finding(generation.records_path, str(error))
    else:
        if records != len(generation):
            problem = f"{records} records for {len(generation)} rows of vectors"
            yield Finding(generation.records_path, problem)
    previous = ""
    for row in range(len(generation)):
        try:
            record = generation.entry(row).record
        except StoreError as error:
            yield Finding(generation.segment.path, str(error))
            continue
        if record.id <= previous:
            yield Finding(generation.records_path, f"case {record.id!r} is out of order")
        if row not in generation.rows_of_image(record.image_digest):
            yield Finding(generation.segment.path, f"case {record.id!r} is not found by its image")
        previous = record.id


def _of_orders(generation: Generation) -> Iterator[Finding]:
    arrays = generation.segment.arrays
    every = np.arange(len(generation))
    for name in ("by_score", "image_rows"):
        if not np.array_equal(np.sort(arrays[name]), every):
            yield Finding(generation.segment.path, f"{name} is not an order of the rows")
    for name in ("sorted_scores", "image_hashes"):
        if (arrays[name][1:] < arrays[name][:-1]).any():
            yield Finding(generation.segment.path, f"{name} are not sorted")


def _of_journal(path: Path) -> Iterator[Finding]:
    try:
        with closing(connect(path, "r")) as connection, sqlite_errors(path):
            identity, _ = read_identity(path, connection)
            revisions = connection.execute("SELECT revision FROM records").fetchall()
            orphans = connection.execute(
                "SELECT revision FROM features WHERE revision NOT IN (SELECT revision FROM records)"
            ).fetchall()
            for (revision,) in orphans:
                yield Finding(path, f"the vectors of revision {revision} have no record")
            for (revision,) in revisions:
                try:
                    read_entry(path, connection, revision, identity.widths)
                except StoreError as error:
                    yield Finding(path, str(error))
    except StoreError as error:
        yield Finding(path, str(error))


def _of_identities(directory: Path, segments: list[Origin]) -> Iterator[Finding]:
    """Compare what the parts were written for, as far as they can be read."""
    found: dict[Path, Identity] = {}
    for origin in segments:
        try:
            generation = Generation.open(directory, origin)
        except StoreError:
            continue  # told by _of_generation
        found[generation.segment.path] = generation.identity
    journal = directory / JOURNAL_NAME
    if os.path.exists(journal):
        try:
            with closing(connect(journal, "r")) as connection:
                found[journal] = read_identity(journal, connection)[0]
        except StoreError:
            pass  # told by _of_journal
    first = next(iter(found.values()), None)
    for path, identity in found.items():
        if identity != first:
            yield Finding(path, f"it was written for another engine package: {identity}")


def _left_over(directory: Path) -> Iterator[Finding]:
    """Find what killed writers left; the next writer removes it."""
    for origin in _ORIGINS:
        try:
            kept = Generation.open(directory, origin).records_path.name
        except StoreNotFound:
            kept = None
        except StoreError:
            continue  # told by _of_generation
        for file in left_over(directory, origin, kept):
            yield Finding(file, "it belongs to no generation; the next writer removes it")
