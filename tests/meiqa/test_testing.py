"""The engine without a model behaves as the one that has one."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meiqa import Assessment, Budget, DecodeError, Engine, Failure, testing
from meiqa.testing import Call, FakeEngine

Grey = Callable[..., Path]
PHOTO = np.zeros((4, 6, 3), np.uint8)


def test_its_examples_run() -> None:
    assert doctest.testmod(testing).failed == 0


@pytest.mark.parametrize("name", ["score", "score_many", "rank", "cull", "compare", "options_many"])
def test_its_methods_take_what_the_engines_take(name: str) -> None:
    real, fake = (inspect.signature(getattr(kind, name)) for kind in (Engine, FakeEngine))
    assert list(real.parameters) == list(fake.parameters)
    for each in real.parameters.values():
        assert fake.parameters[each.name].kind is each.kind
        assert fake.parameters[each.name].default == each.default or callable(each.default)


def test_the_same_photo_has_the_same_score() -> None:
    with FakeEngine() as engine:
        one, other = engine.score(PHOTO), engine.score(PHOTO + np.uint8(1))
        assert one.score == engine.score(PHOTO).score != other.score
        assert 1 <= one.score <= 5
    assert FakeEngine(4.5).score(PHOTO).word == "excellent"


def test_it_notes_what_is_asked_and_fails_where_photos_do(grey: Grey) -> None:
    engine, photo, budget = FakeEngine(2), str(grey("a.png")), Budget(ms=30)
    found = list(engine.score_many([photo, "none.png"], budget=budget, k=2, learn=False))
    assert [type(each) for each in found] == [Assessment, Failure]
    assert engine.calls[0] == Call(photo, budget, 2, False, None)
    with pytest.raises(DecodeError):
        engine.score("none.png")


def test_a_test_can_step_in() -> None:
    def refuse(name: str) -> None:
        raise DecodeError(f"{name} is broken")

    engine = FakeEngine(before=refuse)
    (found,) = engine.score_many([PHOTO])
    assert isinstance(found, Failure)
    assert str(found.error) == "<array> is broken"
    hurried = FakeEngine(3, adjust=lambda found: replace(found, degraded=("summary",)))
    assert hurried.score(PHOTO).degraded == ("summary",)


def test_sets_follow_from_the_scores(grey: Grey) -> None:
    engine = FakeEngine(lambda pixels: 1 + float(pixels.array.mean()) / 64)
    dark, light = str(grey("dark.png", 9)), str(grey("light.png", 200))
    ranking = engine.rank([dark, light, "none.png"])
    assert [(each.rank, each.path) for each in ranking.photos] == [(1, light), (2, dark)]
    assert [each.path for each in ranking.failures] == ["none.png"]
    culling = engine.cull([dark, light, PHOTO])
    assert [[each.path for each in group] for group in culling.groups] == [
        [light, dark],
        ["<array>"],
    ]
    assert engine.compare(light, dark).preference > 0.5
