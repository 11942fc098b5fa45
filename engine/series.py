"""Series: shots that were taken as one, and are worth nothing apart.

An exposure bracket, a focus stack and a panorama are known by what the camera wrote of each shot
(EXIF) and by small pictures of them; a shot without a time and an exposure is in none. All of a
series come within seconds of each other, from one camera into one folder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.images import Pixels
from meiqa.types import GroupKind

Floats = NDArray[np.float64]
Span = tuple[int, int]

FEWEST, MOST_BRACKETED = 3, 9
WITHIN_S = 5.0
"""Seconds from one shot to the next, beside two exposures: the shot's own and its dark frame."""
LEAST_EV, UNEVEN_EV = 0.9, 0.34
"""Steps of a bracket, on the mean, and how far one may be off: shutters are named in round numbers,
of which 1/8 s and 1/15 s are 0.91 EV apart."""
SIDE = 64
"""Pixels of a small picture's longer side."""
CLIPPED = 4
"""Levels at both ends of the scale that tell nothing of what was before the camera."""
SOFT = 0.2
"""Gradient of the logarithm of light from which on an edge is one, however strong."""
MATCH = 0.45
"""Cosine of edges from which on two pictures overlap; few strangers reach it at any offset."""
HAND, LEAST_SEEN = 0.1, 0.3
"""Share of a side by which a hand moves between the shots of a bracket, and share of a shot that is
neither black nor white, from which on it is looked at."""
LEAST_OVERLAP, MOST_OVERLAP, ASKEW = 0.15, 0.8, 0.15
"""Of neighbours in a panorama, along their row, and by how much they miss it."""
SWUNG = 0.8
"""Difference of the parts that overlap to that of the whole views, at most."""
SWING_S = 0.4
"""Seconds that a panorama takes for a shot, at least: bursts are faster."""
TILES, SHARPEST_SIDE = 8, 768
"""Sharpness is that of 8 x 8 tiles, of a picture at least so long where the photo is."""
STILL = 12.0
"""Levels by which no sixteenth of a picture differs from the shot before, if only its focus moved;
where something moves before the camera, more does."""
BLURRED, LEAST_BLURRED = 0.5, 6
"""Share of its best contrast to which a tile falls out of focus, and how many tiles do."""
LEAST_THIRD = 0.1
"""Share of those tiles that are sharpest in the first, middle and last third of a stack."""
TRAVEL, BACK = 0.15, 0.05
"""Share of the frame that the focus travels through, at least, and by how much it may waver."""
LEAST_TOLD, MOST_TOLD = 1e-7, 1e7
"""Times in seconds, f-numbers and sensitivities beyond these are no camera's."""

_DATE, _SUBSECOND, _TIME, _F_NUMBER = 36867, 37521, 33434, 33437
_ISO, _BIAS, _FOCAL_LENGTH, _MODEL, _SERIAL = 34855, 37380, 37386, 272, 42033


@dataclass(frozen=True)
class Exposure:
    """What a camera wrote of a shot.

    Attributes:
        begun: seconds since 1970 in the camera's own time; seconds: how long the shutter was open.
        light: that was let in or amplified, in EV, from a level that is the same for one camera.
        settings: time, f-number and sensitivity.
    """

    begun: float
    seconds: float
    light: float
    settings: tuple[float | None, ...]


@dataclass(frozen=True, eq=False)
class Frame:
    """A shot as far as series go.

    Attributes:
        source: folder, shape, camera, focal length: what all of a series have in common.
        luma: (h, w) levels, its longer side `SIDE`.
        contrast: (8, 8) energy of gradients in tiles of the photo.
    """

    exposure: Exposure
    source: tuple[str, ...]
    luma: NDArray[np.uint8]
    contrast: Floats


@dataclass(frozen=True)
class Series:
    """Photos that stay together: their indices in the order in which they were taken."""

    kind: GroupKind
    members: tuple[int, ...]


def exposure_of(exif: Mapping[int, Any]) -> Exposure | None:
    """Read an exposure from EXIF tags; None without a time, or without anything of the exposure.

    >>> exif = {36867: "2026:05:01 12:00:00", 37521: "25", 33434: 0.01, 33437: 2.0, 34855: 100}
    >>> exposure_of(exif).light
    -8.643856189774725
    """
    try:
        begun = datetime.strptime(str(exif[_DATE]).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except (KeyError, ValueError):
        return None
    digits = str(exif.get(_SUBSECOND)).strip("\0 ")
    part = float(f"0.{digits}") if digits.isdecimal() else 0.0
    settings = seconds, f_number, iso = tuple(
        value if (value := _number(exif.get(tag))) and value >= LEAST_TOLD else None
        for tag in (_TIME, _F_NUMBER, _ISO)
    )
    bias = _number(exif.get(_BIAS))
    if seconds is None and bias is None:
        return None
    light = bias or 0.0
    if seconds is not None:
        # A lens that tells no aperture tells none of any shot: what is not known stays the same.
        light = math.log2((iso or 100.0) / 100.0 * seconds / (f_number or 1.0) ** 2)
    since = (begun - datetime(1970, 1, 1)).total_seconds()
    return Exposure(since + part, seconds or 0.0, light, settings)


def _number(value: Any) -> float | None:
    try:
        number = float(value[0] if isinstance(value, tuple) else value)
    except (TypeError, ValueError, IndexError, ArithmeticError):
        return None
    return number if abs(number) <= MOST_TOLD else None


def frame_of(photo: Pixels) -> Frame | None:
    """Give what series need of a photo, None if its file says nothing of when and how."""
    exposure = exposure_of(photo.exif)
    if exposure is None:
        return None
    camera = (str(photo.exif.get(tag)) for tag in (_MODEL, _SERIAL, _FOCAL_LENGTH))
    height, width = photo.array.shape[:2]
    image = Image.fromarray(photo.array)
    middle = image.reduce(max(1, max(height, width) // SHARPEST_SIDE)).convert("L")
    levels = np.asarray(middle, np.float32)
    down, right = np.diff(levels, axis=0)[:, :-1], np.diff(levels, axis=1)[:-1]
    share = SIDE / max(height, width)
    small = (max(2, round(width * share)), max(2, round(height * share)))
    return Frame(
        exposure=exposure,
        source=(os.path.dirname(photo.name), f"{width} x {height}", *camera),
        luma=np.asarray(middle.resize(small, Image.Resampling.BOX)),
        contrast=_tiled(down * down + right * right, TILES),
    )


def _tiled(values: NDArray[Any], tiles: int) -> Floats:
    """Means (tiles, tiles) of values (h, w)."""
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((tiles, tiles), Image.Resampling.BOX), np.float64)


def series_in(frames: Sequence[Frame | None]) -> list[Series]:
    """Find brackets first, then focus stacks, then panoramas; no photo is in two."""
    found, left = [], list(_runs(frames))
    for kind, find in _FINDERS.items():
        rest = []
        for run in left:
            done = 0
            for start, stop in find([frame for _, frame in run]):
                found.append(Series(kind, tuple(index for index, _ in run[start:stop])))
                rest.append(run[done:start])
                done = stop
            rest.append(run[done:])
        left = rest
    return found


def _runs(frames: Sequence[Frame | None]) -> Iterator[list[tuple[int, Frame]]]:
    """Shots of one source, each within seconds of the one before."""
    known = [(index, frame) for index, frame in enumerate(frames) if frame is not None]
    known.sort(key=lambda each: (each[1].source, each[1].exposure.begun, each[0]))
    for _, same in groupby(known, key=lambda each: each[1].source):
        run: list[tuple[int, Frame]] = []
        for each in same:
            if run:
                one, other = run[-1][1].exposure, each[1].exposure
                if other.begun - one.begun > WITHIN_S + 2.0 * max(one.seconds, other.seconds):
                    yield run
                    run = []
            run.append(each)
        yield run


def _brackets(run: Sequence[Frame]) -> Iterator[Span]:
    """Exposures that are evenly apart, of one view; the longest that begins with a shot."""
    start = 0
    while start + FEWEST <= len(run):
        longest = min(MOST_BRACKETED, len(run) - start)
        counts = range(longest, FEWEST - 1, -1)
        count = next((n for n in counts if _is_bracket(run[start : start + n])), 0)
        if count:
            yield start, start + count
        start += count or 1


def _is_bracket(frames: Sequence[Frame]) -> bool:
    frames = sorted(frames, key=lambda frame: frame.exposure.light)
    steps = np.diff([frame.exposure.light for frame in frames])
    if steps.mean() < LEAST_EV or np.abs(steps - steps.mean()).max() > UNEVEN_EV:
        return False
    if np.any(np.diff([frame.luma.mean() for frame in frames]) < 0.0):  # the light changed instead
        return False
    seen = [frame.luma for frame in frames if _edges(frame.luma)[1].mean() >= LEAST_SEEN]
    moves = [shift_between(one, other) for one, other in pairwise(seen)]
    # Where fewer than two can be seen, nothing says that they show one view.
    return bool(moves) and all(move is not None and max(map(abs, move)) <= HAND for move in moves)


def _stacks(run: Sequence[Frame]) -> Iterator[Span]:
    """Still frames of one exposure whose focus travels one way."""
    start = 0
    for stop in range(1, len(run) + 1):
        if stop == len(run) or not _is_still(run[stop - 1], run[stop]):
            if stop - start >= FEWEST:
                contrast = np.stack([frame.contrast.ravel() for frame in run[start:stop]])
                yield from ((start + begin, start + end) for begin, end in _focused(contrast))
            start = stop


def _focused(contrast: Floats) -> Iterator[Span]:
    """Spans of n frames, by the contrast of their tiles (n, 64), through which focus travels."""
    shares = contrast / np.maximum(contrast.max(axis=0), 1e-6)
    # A frame that is blurred all over, by a hand, is still sharpest where it is.
    shares /= np.maximum(shares.max(axis=1, keepdims=True), 1e-6)
    changing = shares.min(axis=0) <= BLURRED
    if changing.sum() < LEAST_BLURRED:
        return
    weights = shares[:, changing] ** 4
    centres = (np.indices((TILES, TILES)).reshape(2, -1).T[changing] + 0.5) / TILES
    places = weights @ centres / weights.sum(axis=1, keepdims=True)
    around = places - places.mean(axis=0)
    for start, stop in _sweeps(around @ np.linalg.svd(around, full_matrices=False)[2][0]):
        # In a burst from a hand, nearly everything is sharpest in the same frame.
        sharpest = contrast[start:stop, changing].argmax(axis=0)
        thirds = np.bincount(3 * sharpest // (stop - start), minlength=3)
        if thirds.min() >= LEAST_THIRD * changing.sum():
            yield start, stop


def _sweeps(places: Floats) -> Iterator[Span]:
    """Spans of three of n places (n,), and more, that go far one way."""
    start, far, way = 0, 0, 0.0
    for each in range(1, len(places) + 1):
        ends = each == len(places)
        if ends or way * (places[far] - places[each]) > BACK:
            stop = each if ends else far + 1
            if stop - start >= FEWEST and abs(places[far] - places[start]) >= TRAVEL:
                yield start, stop
            start, far, way = stop, stop, 0.0
        elif way * (places[each] - places[far]) > 0.0:
            far = each
        elif not way and abs(places[each] - places[start]) > BACK:
            far, way = each, float(np.sign(places[each] - places[start]))


def _is_still(one: Frame, other: Frame) -> bool:
    """Tell whether nothing moved, neither the camera nor what is before it."""
    if one.exposure.settings != other.exposure.settings:
        return False
    cells = _tiled(one.luma, 2 * TILES) - _tiled(other.luma, 2 * TILES)
    return bool(np.abs(cells).max() <= STILL)


def _rows(run: Sequence[Frame]) -> Iterator[Span]:
    """Neighbours of one exposure that overlap by a part, one way."""
    steps = [_swing(one, other) for one, other in pairwise(run)]
    for start, stop in _one_way(steps):
        taken_s = run[stop - 1].exposure.begun - run[start].exposure.begun
        if taken_s >= SWING_S * (stop - start - 1):
            yield start, stop


def _swing(one: Frame, other: Frame) -> Floats | None:
    """How far a camera swung between shots, None if they don't overlap as a panorama's do."""
    if one.exposure.settings != other.exposure.settings:
        return None
    move = shift_between(one.luma, other.luma)
    if move is None or max(map(abs, move)) < 1.0 - MOST_OVERLAP:
        return None
    # Where something passes before a camera that rests, the rest of the view fits as it is.
    there, here = (_mean_difference(one.luma, other.luma, at) for at in (move, (0.0, 0.0)))
    return np.array(move) if there <= SWUNG * here else None


def _mean_difference(
    one: NDArray[np.uint8], other: NDArray[np.uint8], move: tuple[float, float]
) -> float:
    """Mean difference in levels where two views (h, w) overlap, the other being moved."""
    down, right = (round(part * side) for part, side in zip(move, one.shape, strict=True))
    height, width = one.shape

    def part(luma: NDArray[np.uint8], down: int, right: int) -> Floats:
        rows = luma[max(down, 0) : height + min(down, 0)]
        return rows[:, max(right, 0) : width + min(right, 0)].astype(np.float64)

    return float(np.abs(part(one, -down, -right) - part(other, down, right)).mean())


def _one_way(steps: Sequence[Floats | None]) -> Iterator[Span]:
    """Spans of three photos and more whose steps, n - 1 of n, all go the way of the one before."""
    start = 0
    while start < len(steps):
        stop = start
        while stop < len(steps) and (step := steps[stop]) is not None:
            before = steps[stop - 1] if stop > start else step
            if before is not None and before @ step <= 0.5 * np.hypot(*before) * np.hypot(*step):
                break
            stop += 1
        if stop + 1 - start >= FEWEST:
            yield start, stop + 1
            stop += 1
        start = max(stop, start + 1)


def shift_between(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> tuple[float, float] | None:
    """Tell by what shares of its sides (down, right) a view (h, w) moved, None if it isn't that.

    Edges of the logarithm of light are compared at every offset along a row or a column (masked
    normalised correlation: Padfield, IEEE TIP 21(5), 2012): they stay what they are under any
    exposure, but where it clips.
    """
    (edges, seen), (others, seen_there) = _edges(one), _edges(other)
    height, width = one.shape
    shape = (2 * height, 2 * width)

    def correlation(first: NDArray[Any], second: NDArray[Any]) -> Floats:
        product = np.conj(np.fft.fft2(first, shape)) * np.fft.fft2(second, shape)
        return np.asarray(np.fft.ifft2(product).real)

    energies = np.abs(edges) ** 2, np.abs(others) ** 2
    shared = correlation(energies[0], seen_there) * correlation(seen, energies[1])
    down = np.fft.fftfreq(2 * height, 0.5 / height)[:, None] / height
    right = np.fft.fftfreq(2 * width, 0.5 / width)[None] / width
    straight = np.minimum(np.abs(down), np.abs(right)) <= ASKEW
    inside = np.maximum(np.abs(down), np.abs(right)) <= 1.0 - LEAST_OVERLAP
    # What little two pictures share by a corner or a sky may look like anything.
    enough = shared > 0.01 * energies[0].sum() * energies[1].sum()
    cosines = correlation(edges, others) / np.sqrt(np.maximum(shared, 1e-9))
    cosines = np.where(straight & inside & enough, cosines, -1.0)
    row, column = divmod(int(cosines.argmax()), 2 * width)
    if cosines[row, column] < MATCH:
        return None
    return float(down[row, 0]), float(right[0, column])


def _edges(luma: NDArray[np.uint8]) -> tuple[NDArray[np.complex128], Floats]:
    """Edges as complex numbers, at most of length 1, and where they can be seen."""
    seen = (luma > CLIPPED) & (luma < 255 - CLIPPED)
    seen[[0, -1]] = seen[:, [0, -1]] = False
    down, right = np.gradient(2.2 * np.log(np.maximum(luma, 1.0) / 255.0))
    edges = right + 1j * down
    return np.where(seen, edges / (np.abs(edges) + SOFT), 0.0), seen.astype(np.float64)


_FINDERS: dict[GroupKind, Callable[[Sequence[Frame]], Iterator[Span]]] = {
    "bracket": _brackets,
    "focus stack": _stacks,
    "panorama": _rows,
}
