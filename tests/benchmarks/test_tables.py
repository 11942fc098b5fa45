"""Tables for people."""

from __future__ import annotations

from meiqa.benchmarks.tables import Column, table_text

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
