"""What figures were measured on, made photographs, and tables for people."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meiqa.engine.images import load_pixels
from meiqa.errors import UsageError
from meiqa.evaluation.measuring import (
    Column,
    made_jpeg,
    photographs_in,
    run_on,
    table_text,
)

COLUMNS = [Column("name", "judge"), Column("srcc", "SRCC", ".2f"), Column("n", "photos", "d")]


def test_words_stand_left_and_numbers_right() -> None:
    rows = [{"name": "sharpness", "srcc": 0.5, "n": 12}, {"name": "a", "srcc": -1.0, "n": 3}]
    assert table_text(rows, COLUMNS).splitlines() == [
        "judge       SRCC  photos",
        "sharpness   0.50      12",
        "a          -1.00       3",
    ]


def test_what_is_missing_stays_blank() -> None:
    rows = [{"name": "a", "srcc": None}, {"name": "b", "srcc": float("nan"), "n": 0}]
    assert table_text(rows, COLUMNS).splitlines()[1:] == ["a", "b                 0"]


def test_machine_and_versions() -> None:
    found = run_on("numpy")
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["machine"]["processor"]
    assert found["versions"] == {"python": platform.python_version(), "numpy": np.__version__}


def test_made_photographs_differ_and_are_the_same_in_every_run() -> None:
    one, other = photographs_in(None, 2)
    assert one == made_jpeg(0)
    assert one != other
    assert load_pixels(made_jpeg(3, (40, 60))).array.shape == (40, 60, 3)


def test_given_photographs_are_taken_by_name(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.JPG", "c.txt"):
        (tmp_path / name).write_bytes(made_jpeg(0, (20, 20)))
    given: list[Any] = list(photographs_in(tmp_path, 2))
    assert [path.name for path in given] == ["a.JPG", "b.jpg"]
    with pytest.raises(UsageError, match="too few"):
        list(photographs_in(tmp_path, 3))
