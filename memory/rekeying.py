"""Giving a memory keys of another kind, made of what it stores; no photograph is looked at."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from meiqa.errors import StoreMismatch, UsageError
from meiqa.memory.database import Identity, connect, create_database, sqlite_errors, transaction
from meiqa.memory.disk import disk_errors, publish, refuse_taken, sync
from meiqa.memory.encoding import decode_keys, dequantise_tokens, encode_key
from meiqa.memory.generation_writer import written_generation
from meiqa.memory.journal import JOURNAL_NAME
from meiqa.memory.keys import key_widths, retrieval_key, summary_of_key
from meiqa.memory.records import Entry
from meiqa.memory.store import CaseStore
from meiqa.memory.view import CaseView
from meiqa.types import KeyKind

__all__ = ["rekey_store"]


def rekey_store(store: CaseStore, kind: KeyKind, path: Path) -> int:
    """Write all cases with keys of another kind into a new memory; give how many.

    Records, thumbnails and counters of use come along. Keys of images are made of the stored
    tokens, which differ from those of the photographs by their rounding to 8 bits.

    Args:
        store: Both origins of it are written, wherever they lie.
        kind: Of the new keys.
        path: The directory to be; it must not exist, or be empty. It appears whole or not at all.

    Raises:
        UsageError: the memory has keys of this kind.
        StoreMismatch: the new keys need the summaries' keys, which the memory does not hold.
        StoreError: the directory is taken or cannot be written.
        StoreCorrupted: a stored case is damaged.
    """
    found = store.identity
    if kind == found.key_kind:
        raise UsageError("the memory has keys of this kind already", seen=kind)
    if found.key_kind == "image":
        raise StoreMismatch(
            f"the memory holds no summary keys, which keys of kind {kind} need",
            seen="keys of kind image",
            hint=f"build it from the photographs: meiqa memory build … --key {kind}",
        )
    widths = key_widths(kind, _summary_width(found), found.widths.token)
    identity = Identity(found.package_digest, widths, kind)
    refuse_taken(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with disk_errors(path):
            partial.mkdir(parents=True)
            count = _write(store, identity, partial)
            sync(partial)
            publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def _write(store: CaseStore, identity: Identity, directory: Path) -> int:
    views = store.views()
    for origin, view in views.items():
        if origin == "contrast" and not len(view):
            continue
        entries = _rekeyed(view, store.identity, identity.key_kind)
        with written_generation(directory, origin, identity, 1, entries) as publish_files:
            publish_files()
    _write_uses(store, identity, directory / JOURNAL_NAME)
    return sum(len(view) for view in views.values())


def _rekeyed(view: CaseView, found: Identity, kind: KeyKind) -> Iterator[Entry]:
    for entry in view.whole_entries():
        key = decode_keys(entry.features.key[None])[0]
        summary = summary_of_key(key, _summary_width(found))
        tokens = dequantise_tokens(entry.features.tokens)
        stored = encode_key(retrieval_key(kind, summary, tokens))
        yield replace(entry, features=replace(entry.features, key=stored))


def _summary_width(found: Identity) -> int:
    return found.widths.key - (found.widths.token if found.key_kind == "both" else 0)


def _write_uses(store: CaseStore, identity: Identity, path: Path) -> None:
    """Begin a journal that holds the counters of use."""
    create_database(path, identity)
    rows = [(case_id, *uses) for case_id, uses in store.uses().items()]
    with (
        sqlite_errors(path),
        closing(connect(path, "alone", check=False)) as connection,
        transaction(connection, "IMMEDIATE"),
    ):
        connection.executemany("INSERT INTO uses VALUES (?, ?, ?)", rows)
    with disk_errors(path):
        sync(path)
