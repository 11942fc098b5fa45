from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from meiqa.errors import DecodeError, UsageError
from meiqa.types import (
    Assessment,
    Budget,
    CulledPhoto,
    Culling,
    Failure,
    Neighbour,
    PairComparison,
    RankedPhoto,
    Ranking,
)


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf])
def test_budget_refuses_what_is_no_limit(limit: float) -> None:
    with pytest.raises(UsageError, match="must be positive"):
        Budget(ms=limit)
    with pytest.raises(UsageError, match="budget's std"):
        Budget(std=limit)


def test_budget_without_limits() -> None:
    assert Budget() == Budget(ms=None, std=None)


def test_json_of_an_assessment_keeps_its_names() -> None:
    neighbour = Neighbour("a7", "anchor", 3.2, 0.1, None)
    values = Assessment(
        "p.jpg", 3.4, 0.2, (3.0, 3.8), 3.1, "good", 61.0, None, (neighbour,), ("summary",)
    ).to_dict()
    assert list(values) == [
        "path",
        "score",
        "std",
        "ci95",
        "initial_score",
        "word",
        "percentile",
        "summary",
        "neighbours",
        "degraded",
        "reflection",
        "memory_score",
        "grades",
        "distortions",
        "reference",
        "detail",
        "embedding",
        "timings_ms",
        "counters",
    ]
    assert values["neighbours"] == [
        {"id": "a7", "origin": "anchor", "score": 3.2, "preference": None, "device": None}
    ]
    assert json.loads(json.dumps(values)) == values


def test_json_of_a_failure() -> None:
    values = Failure("p.jpg", DecodeError("p.jpg is empty", hint="fetch it again")).to_dict()
    assert values == {
        "path": "p.jpg",
        "error": "p.jpg is empty; fetch it again",
        "hint": "fetch it again",
    }


def test_json_of_a_comparison() -> None:
    values = PairComparison("a", "b", 0.7, 3.0, 2.0, {"total": 5.0}).to_dict()
    assert list(values) == [
        *("first", "second", "preference", "first_score", "second_score"),
        *("timings_ms", "degraded"),
    ]


def test_json_of_sets() -> None:
    ranked = RankedPhoto(1, "a", 3.00001, 0.2, 2.9, 4, 1, "Sharp.")
    values = Ranking((ranked,), (Failure("b", DecodeError("b is empty")),), ("pairs",)).to_dict()
    assert values["photos"] == [
        {
            **{"rank": 1, "path": "a", "score": 3.0, "std": 0.2, "alone": 2.9},
            **{"compared": 4, "places": 1},
        }
    ]
    assert values["failures"] == [{"path": "b", "error": "b is empty", "hint": None}]
    assert values["degraded"] == ["pairs"]
    shot = CulledPhoto(2, "a", 3.0, 0.2, 2.9, 0.987654, kind="burst", too_close=True)
    values = Culling(((shot,),)).to_dict()
    assert values["groups"] == [
        [
            {
                **{"kind": "burst", "place": 2, "best": False, "kept": False, "path": "a"},
                **{"score": 3.0, "std": 0.2, "alone": 2.9, "likeness": 0.9877},
                **{"too_close": True, "reason": None},
            }
        ]
    ]


def test_what_is_not_finite_is_null() -> None:
    values = Assessment("p", math.nan, 0.2, (1.0, math.inf), 3.1, "good", math.nan, None).to_dict()
    assert (values["score"], values["ci95"], values["percentile"]) == (None, [1.0, None], None)


@pytest.mark.parametrize("limit", ["300", [1], True, Budget()])
def test_budget_refuses_what_is_no_number(limit: Any) -> None:
    with pytest.raises(TypeError, match=r"a budget's ms is a number, not "):
        Budget(ms=limit)


def test_budget_takes_numbers_of_numpy() -> None:
    assert Budget(ms=np.float32(3.0)).ms == 3


def test_what_is_said_of_a_photo_is_not_left_out() -> None:
    notes = ("small: judged as the 9 x 9 pixels it has", "pixels damaged: x", "no summary")
    found = Assessment("p.jpg", 3.4, 0.2, (3.0, 3.8), 3.1, "good", 61.0, None, degraded=notes)
    assert found.left_out == ("no summary",)
