"""A reason is given where it is true by a margin, and only there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meiqa.engine.images import load_pixels
from meiqa.engine.reasons import NOTHING_SEEN, Observation, reason_for
from meiqa.types import Detail, Distortion
from tests.engine.test_detail import Picture, blurred, scene, seen, shaken

SHARED = Path(__file__).parents[3] / "shared" / "data"
SHARP = Detail(sharpness=0.5, motion=1.0, noise=2.0, place=(1400, 900, 200, 200))
SEEN = Observation((2000, 3000), SHARP)


def beside(**changes: float) -> str | None:
    """What speaks for a photo beside one that is the same but for its detail."""
    return reason_for(SEEN, replace(SEEN, detail=replace(SHARP, **changes)))


def test_detail_speaks_by_a_margin() -> None:
    assert beside(sharpness=0.39) == "sharper at the centre"
    assert beside(motion=4.1) == "less motion"
    assert beside(motion=3.9, sharpness=0.2) == "sharper at the centre"
    assert beside(noise=3.1) == "less noise"
    assert beside(sharpness=0.41) is None
    assert beside(motion=3.9) is None
    assert beside(noise=2.9) is None
    assert beside(sharpness=0.9, motion=0.0, noise=0.0) is None


@pytest.mark.parametrize("radius", [1, 2, 2.5, 3, 4.5, 6])
def test_a_shot_out_of_focus_is_not_called_moved(radius: float) -> None:
    reason = reason_for_pictures(scene(800, 1000), blurred(scene(800, 1000), radius))
    assert reason is not None
    assert reason.startswith("sharper at the ")


@pytest.mark.parametrize("length", [8, 12, 16, 24])
def test_a_shaken_shot_is_called_moved(length: int) -> None:
    reason = reason_for_pictures(scene(800, 1000), shaken(scene(800, 1000), length, axis=1))
    assert reason == "less motion"


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_hardly_a_photograph_out_of_focus_is_called_moved(radius: float) -> None:
    folder = SHARED / "pristine" / "images"
    if not folder.is_dir():
        pytest.skip(f"needs the photographs of {folder}")
    reasons = []
    for path in sorted(folder.iterdir())[:24]:
        photo = load_pixels(path).array[:900, :900]
        reasons.append(reason_for_pictures(photo, blurred(photo, radius)))
    assert reasons.count("less motion") <= 1


def reason_for_pictures(best: Picture, other: Picture) -> str | None:
    one, two = (Observation((800, 1000), seen(picture)) for picture in (best, other))
    return reason_for(one, two)


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
    small = Observation((200, 300), replace(SHARP, sharpness=0.1))
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
    best = Observation((20, 30), distortions=(Distortion(kind, 1.0, 0.5),))
    assert (
        reason_for(best, Observation((20, 30), distortions=(Distortion(kind, 3.0, 0.6),))) == phrase
    )
    assert (
        reason_for(best, Observation((20, 30), distortions=(Distortion(kind, 2.0, 0.6),))) is None
    )
