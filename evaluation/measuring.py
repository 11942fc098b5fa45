"""What figures are measured on and with, and how they are laid out for people."""

from __future__ import annotations

import io
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from meiqa.engine.files import IMAGE_SUFFIXES
from meiqa.errors import UsageError

_PROCESSORS = Path("/proc/cpuinfo")


def run_on(*packages: str) -> dict[str, dict[str, Any]]:
    """Tell what a figure was measured on.

    Returns:
        `machine`: processor, the cores it lends and the operating system; `versions`: of Python
        and of these packages.
    """
    listed = _PROCESSORS.read_text() if _PROCESSORS.is_file() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", listed, re.MULTILINE)
    machine = {
        "processor": named[1] if named else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"machine": machine, "versions": versions}


def quantiles_ms(times_ms: Sequence[float]) -> dict[str, float]:
    """Sum up times: number, least, and 50th, 95th and 99th percentile."""
    quantiles = zip((50, 95, 99), np.percentile(times_ms, [50, 95, 99]), strict=True)
    found = {f"p{percent}_ms": round(float(ms), 4) for percent, ms in quantiles}
    return {"n": len(times_ms), "min_ms": round(min(times_ms), 4), **found}


def made_jpeg(seed: int, size: tuple[int, int] = (768, 1024), quality: int = 85) -> bytes:
    """Draw clouds with grain and encode them as JPEG: (height, width) pixels, all from a seed.

    Times are measured on such where no photographs are given: content does not change the work.
    """
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (6, 8, 3)).astype(np.uint8)
    clouds = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    grain = random.normal(0, random.uniform(2, 20), (*size, 1))
    pixels = (np.asarray(clouds) + grain).clip(0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def photographs_in(directory: Path | None, count: int, seed: int = 0) -> Iterator[Path | bytes]:
    """Give so many photographs of a directory, in order of their names, or made ones.

    Raises:
        UsageError: the directory holds fewer.
    """
    if directory is None:
        yield from (made_jpeg(seed + number) for number in range(count))
        return
    found = sorted(p for p in directory.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if len(found) < count:
        raise UsageError(
            "there are too few photographs", seen=f"{len(found)} in {directory}", allowed=count
        )
    yield from found[:count]


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        key: of the rows; heading: above the column.
        form: how numbers are written, as ".3f"; none for words, which stand to the left.
    """

    key: str
    heading: str
    form: str = ""


def table_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Lay out rows under their headings; what is missing or not a number stays blank.

    >>> print(table_text([{"name": "a", "srcc": 0.5}], [Column("name", "name"),
    ...                                                 Column("srcc", "SRCC", ".3f")]))
    name   SRCC
    a     0.500
    """
    written = []
    for column in columns:
        values = (row.get(column.key) for row in rows)
        cells = [column.heading, *(format(v, column.form) if _said(v) else "" for v in values)]
        width = max(map(len, cells))
        written.append([c.rjust(width) if column.form else c.ljust(width) for c in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*written, strict=True))


def _said(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))
