"""What was taken as one is found by its EXIF and its pictures, and bursts are not taken for it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from scipy.ndimage import gaussian_filter

from meiqa.engine.files import IMAGE_SUFFIXES
from meiqa.engine.images import NamedBytes, load_pixels
from meiqa.engine.series import Frame, exposure_of, frame_of, series_in, shift_between
from tests.engine.shoots import (
    SECOND,
    Levels,
    bracket,
    burst,
    exposed,
    panorama,
    scene,
    shot,
    stack,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
EXIF = {36867: "2026:05:01 12:00:59", 37521: "25", 33434: 0.01, 33437: 4.0, 34855: 100}


def frames(shots: Sequence[bytes]) -> list[Frame | None]:
    return [frame_of(load_pixels(each)) for each in shots]


def found(shots: Sequence[bytes]) -> list[tuple[str, tuple[int, ...]]]:
    return [(each.kind, each.members) for each in series_in(frames(shots))]


@pytest.mark.parametrize("evs", [(0, -2, 2), (-2, 0, 2), (0, -1, 1, -2, 2), (-4, -2, 0, 2, 4)])
def test_a_bracket_is_one_though_its_pictures_differ(evs: tuple[float, ...]) -> None:
    assert found(bracket(scene(1), evs)) == [("bracket", tuple(range(len(evs))))]


def test_two_brackets_in_a_row_are_two() -> None:
    evs = (0, -2, 2)
    shots = bracket(scene(1), evs) + bracket(scene(1), evs, at=1.2)
    assert found(shots) == [("bracket", (0, 1, 2)), ("bracket", (3, 4, 5))]


def test_a_bracket_is_told_by_bias_where_the_shutter_is_unknown() -> None:
    evs = (0, -2, 2)
    tags: dict[str, Any] = {"ExposureTime": 0, "FNumber": 0}
    shots = [
        shot(exposed(scene(1), ev), number, ExposureBiasValue=float(ev), **tags)
        for number, ev in enumerate(evs)
    ]
    assert found(shots) == [("bracket", (0, 1, 2))]


@pytest.mark.parametrize(
    "evs", [(0, -2), (0, 0, 0), (0, -0.3, 0.3), (0, -2, 0.7)], ids=["two", "equal", "close", "odd"]
)
def test_what_is_no_bracket(evs: tuple[float, ...]) -> None:
    assert found(bracket(scene(1), evs)) == []


def test_exposures_of_other_views_or_hours_or_that_get_darker_are_no_bracket() -> None:
    evs = (0, -2, 2)
    views = [shot(exposed(scene(9 + ev), ev), ev + 2, SECOND * 2**ev) for ev in evs]
    hours = [bracket(scene(1), evs, at=600 * number)[number] for number in range(3)]
    darker = [shot(exposed(scene(1), -ev), ev + 2, SECOND * 2**ev) for ev in evs]
    assert found(views) == found(hours) == found(darker) == []


def test_what_cannot_be_seen_is_no_bracket() -> None:
    """Two lens caps and something else, evenly exposed."""
    black = np.zeros((240, 360, 3))
    levels = [black, black + 1, exposed(scene(1), 2)]
    shots = [shot(each, 0.4 * n, SECOND * 4**n) for n, each in enumerate(levels)]
    assert found(shots) == []


@pytest.mark.parametrize("count", [3, 4, 9])
def test_a_focus_stack_is_still_but_for_its_focus(count: int) -> None:
    assert found(stack(scene(2), count)) == [("focus stack", tuple(range(count)))]


def test_two_focus_stacks_in_a_row_are_two() -> None:
    shots = stack(scene(2), 5) + stack(scene(2), 5, at=5)
    assert found(shots) == [("focus stack", tuple(range(5))), ("focus stack", tuple(range(5, 10)))]


@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.7])
def test_a_panorama_is_a_row_of_parts(count: int, overlap: float) -> None:
    assert found(panorama(count, overlap)) == [("panorama", tuple(range(count)))]


def test_a_panorama_goes_one_way_at_one_exposure() -> None:
    forth_and_back = panorama(2) + panorama(2, at=2.4)
    assert found(forth_and_back) == []
    first, *_, last = panorama(4)
    assert found([first, last]) == []
    assert found([shot(scene(n), n, SECOND * (1 + n)) for n in range(4)]) == []


@pytest.mark.parametrize("subject", [None, scene(5, (90, 70))], ids=["still", "moving"])
@pytest.mark.parametrize("view", ["sharp", "soft"])
@pytest.mark.parametrize("apart_s", [0.1, 1.0])
def test_a_burst_is_a_burst(subject: Levels | None, view: str, apart_s: float) -> None:
    """Equal settings, seconds apart; and a sharp subject that passes before a soft wall."""
    levels = scene(4) if view == "sharp" else gaussian_filter(scene(4), (9, 9, 0))
    assert found(burst(levels, 8, apart_s, subject)) == []


def test_shots_from_a_hand_some_of_them_shaken_are_a_burst() -> None:
    random, shots = np.random.default_rng(6), []
    for number in range(12):
        view = np.roll(scene(4), random.integers(-5, 6, 2).tolist(), (0, 1))
        widths = random.uniform(0, 2.5, 2).tolist()
        shots.append(shot(gaussian_filter(view, (*widths, 0)), 0.3 * number))
    assert found(shots) == []


def test_a_bracket_among_other_shots() -> None:
    evs = (0, -2, 2)
    shots = [*burst(scene(1), 3, 0.2), *bracket(scene(1), evs, at=2), shot(scene(8), 4)]
    assert found(shots) == [("bracket", (3, 4, 5))]
    assert found(shots[::-1]) == [("bracket", (3, 2, 1))]


def test_what_lies_in_two_folders_is_not_one() -> None:
    one = bracket(scene(1), (0, -2, 2))
    two = [NamedBytes(each, "backup/a.jpg") for each in one]
    both = [each for pair in zip(one, two, strict=True) for each in pair]
    assert found(both) == [("bracket", (0, 2, 4)), ("bracket", (1, 3, 5))]


def test_without_exif_nothing_is_a_series() -> None:
    bare = [np.asarray(Image.open(io.BytesIO(e))) for e in bracket(scene(1), (0, -2, 2))]
    assert [frame_of(load_pixels(each)) for each in bare] == [None, None, None]
    assert series_in([None, None, None]) == []
    assert series_in([]) == []


@pytest.mark.parametrize(
    "changed",
    [
        *({36867: value} for value in (None, "", "0000:00:00 00:00:00", b"\0\xff", 3)),
        {33434: None, 37380: None},
        {33434: "x"},
        {33434: TiffImagePlugin.IFDRational(1, 0)},
    ],
)
def test_unreadable_exif_is_none(changed: dict[int, Any]) -> None:
    assert exposure_of({**EXIF, **changed}) is None


@pytest.mark.parametrize(
    "changed",
    [
        {33437: 1e200},
        {33434: 1e-300, 33437: 1e100},
        {33434: 1e300, 34855: 1e300},
        {34855: 10**400},
        {34855: 1e-300},
        {33434: None, 37380: -1e308},
    ],
)
def test_what_no_camera_writes_counts_as_unknown(changed: dict[int, Any]) -> None:
    exif = {**EXIF, **changed}
    without = {tag: None if tag in changed else value for tag, value in exif.items()}
    assert exposure_of(exif) == exposure_of(without)


def test_times_have_parts_of_a_second() -> None:
    told = [exposure_of({**EXIF, 37521: part}) for part in ("25", "5\0", None, "x", "")]
    seconds = [each.begun % 60 for each in told if each is not None]
    assert seconds == pytest.approx([59.25, 59.5, 59.0, 59.0, 59.0])


@pytest.mark.parametrize("size", [(40, 64), (64, 3), (17, 64)])
def test_a_move_is_what_it_was(size: tuple[int, int]) -> None:
    big = scene(7, (size[0] + 8, size[1] + 8)).mean(axis=2).astype(np.uint8)
    here, there = big[4 : 4 + size[0], 4 : 4 + size[1]], big[1 : 1 + size[0], 6 : 6 + size[1]]
    move = shift_between(here, there)
    if min(size) < 10:
        assert move is None  # too little to see
    else:
        assert move == pytest.approx((3 / size[0], -2 / size[1]))


@pytest.mark.parametrize("size", [(16, 1600), (16, 16), (97, 16), (1700, 17)])
def test_any_shape_of_photo_has_its_frame(size: tuple[int, int]) -> None:
    shots = [shot(np.full((*size, 3), level, np.float64), level / 90) for level in (80, 120, 160)]
    shapes = [(frame.luma.shape, frame.contrast.shape) for frame in frames(shots) if frame]
    assert len(shapes) == 3
    assert all(max(luma) == 64 and tiles == (8, 8) for luma, tiles in shapes)
    assert found(shots) == []


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_picture_of_nothing_moves_nowhere(level: int) -> None:
    nothing = np.full((40, 64), level, np.uint8)
    assert shift_between(nothing, nothing) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["large", "pristine"])
def test_photographs_taken_one_by_one_are_no_series(name: str) -> None:
    """As if all had been taken within seconds, at one exposure."""
    folder = SHARED / name / "images"
    if not folder.is_dir():
        pytest.skip(f"needs the photographs of {folder}")
    paths = sorted(each for each in folder.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES)[:120]
    known = []
    for number, path in enumerate(paths):
        with Image.open(path) as image:
            small = image.convert("RGB").resize((384, 256))
        known.append(shot(np.asarray(small, np.float64), 1.5 * number))
    assert found(known) == []
