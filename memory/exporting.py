"""Writing the records and keys of a memory for other tools."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from meiqa.errors import UsageError
from meiqa.memory.disk import disk_errors
from meiqa.memory.store import CaseStore

__all__ = ["ExportFormat", "export_cases"]

ExportFormat = Literal["jsonl", "parquet"]

_ROWS_A_BATCH = 4096


def export_cases(store: CaseStore, path: Path, format: ExportFormat) -> int:
    """Write one row for each case, anchors first, each origin by id; give how many.

    A row has the record's columns, `retrieved`, `grid`, `tokens` (how many), `key`, its kind and
    `thumbnail`, a JPEG (in JSON as base64) or null.

    Raises:
        UsageError: unknown format, or pyarrow is not installed.
        StoreUnwritable: the file cannot be written.
        StoreCorrupted: a stored case is damaged.
    """
    if format not in get_args(ExportFormat):
        raise UsageError("unknown export format", seen=format, allowed="jsonl, parquet")
    write = _write_jsonl if format == "jsonl" else _write_parquet
    with disk_errors(path):
        return write(path, _rows(store))


def _rows(store: CaseStore) -> Iterator[dict[str, Any]]:
    uses = store.uses()
    for view in store.views().values():
        for row in view.rows():
            entry = view.whole_entry(row)
            record, features = entry.record, entry.features
            retrieved = uses.get(record.id, (0, 0.0))[0] if record.origin == "contrast" else 0
            yield {
                **asdict(record),
                "retrieved": retrieved,
                "grid": list(features.grid),
                "tokens": len(features.tokens.scales),
                "key": features.key.astype(np.float32).tolist(),
                "key_kind": store.identity.key_kind,
                "thumbnail": entry.thumbnail,
            }


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=_base64) + "\n")
            count += 1
    return count


def _base64(thumbnail: bytes) -> str:
    return base64.b64encode(thumbnail).decode("ascii")


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            "exporting to parquet needs pyarrow", hint="pip install 'meiqa[parquet]'"
        ) from error
    text, real, whole = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    schema = pyarrow.schema(
        {
            **dict.fromkeys(("id", "image_digest", "summary"), text),
            **dict.fromkeys(("score", "std"), real),
            **dict.fromkeys(("origin", "package_digest", "provenance"), text),
            "created": real,
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
