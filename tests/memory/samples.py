"""Small cases and memories to test with; a case follows from its id alone."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.memory import AnchorWriter, Case
from meiqa.types import Origin

KEY_WIDTH, TOKEN_WIDTH = 8, 6
DIGEST = "ab12"
ROOT = Path(__file__).parents[2]


def make_case(
    case_id: str,
    origin: Origin = "contrast",
    *,
    score: float | None = None,
    image_digest: str | None = None,
    key: NDArray[Any] | None = None,
    widths: tuple[int, int] = (KEY_WIDTH, TOKEN_WIDTH),
    tokens: int = 4,
) -> Case:
    random = np.random.default_rng(zlib.crc32(case_id.encode()))
    drawn_score = float(random.uniform(1.0, 5.0))
    drawn_key = random.standard_normal(widths[0], np.float32)
    return Case(
        id=case_id,
        origin=origin,
        image_digest=f"image of {case_id}" if image_digest is None else image_digest,
        score=drawn_score if score is None else score,
        std=0.25,
        summary=f"soft and noisy, {case_id}",
        key=drawn_key if key is None else key,
        tokens=random.standard_normal((tokens, widths[1]), np.float32),
        grid=(max(tokens, 1), 1),
    )


def make_cases(count: int, origin: Origin) -> list[Case]:
    return [make_case(f"{origin}-{number:04d}", origin) for number in range(count)]


def build_anchors(path: Path, cases: Iterable[Case] = (), digest: str = DIGEST) -> Path:
    with AnchorWriter(path, digest, KEY_WIDTH, TOKEN_WIDTH) as writer:
        for case in cases:
            writer.add(case, provenance="a laboratory")
        writer.finish()
    return path


def uses_of(path: Path) -> dict[str, tuple[int, float]]:
    """How often contrast cases were retrieved, and when last, as it is on the disk."""
    with closing(sqlite3.connect(path / "cases.sqlite3")) as database:
        rows = database.execute("SELECT id, retrieved, last_retrieved FROM uses").fetchall()
    return {case_id: (retrieved, last) for case_id, retrieved, last in rows}


def python_child(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program in an interpreter like this one, which finds the same `meiqa`."""
    flags = [
        flag for flag, is_set in (("-S", sys.flags.no_site), ("-P", sys.flags.safe_path)) if is_set
    ]
    return subprocess.Popen(
        [sys.executable, *flags, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def assert_same_case(found: Case, expected: Case) -> None:
    """Compare with what was stored, within the errors that the encodings document."""
    for name in ("id", "origin", "image_digest", "score", "std", "summary", "grid"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.key.dtype == found.tokens.dtype == np.float32
    length = max(float(np.linalg.norm(expected.key)), 1e-9)
    np.testing.assert_allclose(found.key, expected.key / length, atol=1e-3)
    peaks = np.abs(expected.tokens).max(axis=1, keepdims=True, initial=0.0)
    assert found.tokens.shape == expected.tokens.shape
    assert (np.abs(found.tokens - expected.tokens) <= peaks * (1 / 254 + 1e-6)).all()
