"""A reason is given where it is true by a margin, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meiqa.engine.reasons import NOTHING_SEEN, Evidence, reason_for
from meiqa.types import Detail, Distortion

SHARP = Detail(sharpness=0.5, motion=1.0, noise=2.0, place=(1400, 900, 200, 200))
SEEN = Evidence((2000, 3000), SHARP)


def beside(**changes: float) -> str | None:
    """What speaks for a photo beside one that is the same but for its detail."""
    return reason_for(SEEN, replace(SEEN, detail=replace(SHARP, **changes)))


def test_detail_speaks_by_a_margin() -> None:
    assert beside(sharpness=0.39) == "sharper at the centre"
    assert beside(motion=3.1) == "less motion"
    assert beside(motion=3.1, sharpness=0.2) == "less motion"
    assert beside(noise=3.1) == "less noise"
    assert beside(sharpness=0.41) is None
    assert beside(motion=2.9) is None
    assert beside(noise=2.9) is None
    assert beside(sharpness=0.9, motion=0.0, noise=0.0) is None


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ((0, 0, 200, 200), "top left"),
        ((1400, 1800, 200, 200), "bottom"),
        ((2800, 900, 200, 200), "right"),
    ],
)
def test_a_place_is_named(place: tuple[int, int, int, int], name: str) -> None:
    best = replace(SEEN, detail=replace(SHARP, place=place))
    worse = replace(SEEN, detail=replace(SHARP, sharpness=0.2))
    assert reason_for(best, worse) == f"sharper at the {name}"


def test_detail_of_another_size_says_nothing() -> None:
    small = Evidence((200, 300), replace(SHARP, sharpness=0.1))
    assert reason_for(SEEN, small) is None
    assert reason_for(SEEN, NOTHING_SEEN) is None


@pytest.mark.parametrize(
    ("kind", "phrase"),
    [
        ("darkening", "better exposed"),
        ("motion blur", "less motion"),
        ("lens blur", "sharper"),
        ("white noise", "less noise"),
        ("JPEG compression", "less compressed"),
        ("colour shift", None),
    ],
)
def test_a_distortion_that_the_other_has_speaks(kind: str, phrase: str | None) -> None:
    best = Evidence((20, 30), distortions=(Distortion(kind, 1.0, 0.5),))
    assert reason_for(best, Evidence((20, 30), distortions=(Distortion(kind, 3.0, 0.6),))) == phrase
    assert reason_for(best, Evidence((20, 30), distortions=(Distortion(kind, 2.0, 0.6),))) is None
