"""What speaks for one shot against another of its scene, in a phrase that is true by a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meiqa.types import Detail, Distortion

SHARPER, LESS_MOTION, LESS_NOISE = 1.25, 1.5, 1.3
"""How many times as sharp, as moved and as noisy one of two is, at least, of whom that is said."""
LEAST_MOTION, LEAST_NOISE = 3.0, 1.0
"""And by how much the other is worse: in pixels, more than defocus is taken for, and in grey
levels."""
WEAKER = 1.0
"""By how much less of a distortion one shows: its strength (0-5) times its probability."""
COMPARED = "preferred in the comparison"
_WITHOUT = {
    "motion blur": "less motion",
    **dict.fromkeys(("gaussian blur", "lens blur"), "sharper"),
    **dict.fromkeys(
        ("white noise", "colour noise", "impulse noise", "multiplicative noise"), "less noise"
    ),
    **dict.fromkeys(("brightening", "darkening", "mean shift"), "better exposed"),
    **dict.fromkeys(("JPEG compression", "JPEG 2000 compression"), "less compressed"),
}
"""What a photo is that shows less of a distortion."""
_TURNED = {"less": "more", "sharper": "softer", "better": "worse", "preferred": "less preferred"}


@dataclass(frozen=True)
class Observation:
    """What is seen of a photo beside its score; `size` is its height and width in pixels."""

    size: tuple[int, int]
    detail: Detail | None = None
    distortions: tuple[Distortion, ...] = ()


NOTHING_SEEN = Observation((0, 0))


def reason_for(best: Observation, other: Observation) -> str | None:
    """Say what speaks for the better of two photos: its detail, or else its distortions."""
    if phrase := seen_at_full_size(best, other):
        return phrase
    more = {
        phrase: _shown(phrase, other.distortions) - _shown(phrase, best.distortions)
        for phrase in _WITHOUT.values()
    }
    phrase = max(more, key=lambda each: more[each])
    return phrase if more[phrase] >= WEAKER else None


def turned(reason: str) -> str:
    """Say of the other photo what speaks for the better one.

    >>> turned("sharper at the centre")
    'softer at the centre'
    """
    word, space, rest = reason.partition(" ")
    return _TURNED[word] + space + rest


def seen_at_full_size(best: Observation, other: Observation) -> str | None:
    """Say what speaks for a photo against another at full size.

    Detail is compared at one size only: a photo that was scaled down has sharper edges.
    """
    one, two = best.detail, other.detail
    if one is not None and two is not None and best.size == other.size:
        if two.motion >= max(LESS_MOTION * one.motion, one.motion + LEAST_MOTION):
            return "less motion"
        if one.sharpness >= SHARPER * two.sharpness:
            return f"sharper at the {_named(one.place, best.size)}"
        if two.noise >= max(LESS_NOISE * one.noise, one.noise + LEAST_NOISE):
            return "less noise"
    return None


def _shown(phrase: str, distortions: Sequence[Distortion]) -> float:
    of_kind = (each for each in distortions if _WITHOUT.get(each.kind) == phrase)
    return sum(each.strength * each.probability for each in of_kind)


def _named(place: tuple[int, int, int, int], size: tuple[int, int]) -> str:
    """Name the ninth of a photo that the middle of a cut lies in."""
    x, y, width, height = place
    row = ("top", "", "bottom")[min(3 * (y + height // 2) // size[0], 2)]
    column = ("left", "", "right")[min(3 * (x + width // 2) // size[1], 2)]
    return f"{row} {column}".strip() or "centre"
